"""The mean loss of small calls on a GPU as one node of autograd's graph that begins at the caller's tensors.

What a call does before its first launch (checks, views, cluster ids) would take the host as long as all launches. It is
a function of shapes, dtypes and options, so tapes hold it too: a replay looks up its tape by these and launches.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends.choose import choose_backend
from ..backends.triton_tape import SEES_HOOKS, Taped, comparable
from ..library import intercepted, without_autocast
from . import direct
from .op import BACKENDS
from .records import TENSORS, Gradients, gradient_places

# From what the caller describes the call by, whether of both sets and the scale only the anchors need a gradient, the
# backend (a backward runs on that of its forward, whichever is chosen then), and tensors: the arguments of the forward
# operator. The first of the tensors are those that have `GRADIENTS`, in order.
Build = Callable[..., tuple[Any, ...]]
GRADIENTS = Gradients._fields[:5]


def _forward(options: Any, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The mean loss, and what the backward needs of `direct.mean`."""
    build, call, only_anchors, backend, differentiated = options
    args = build(call, only_anchors, backend, *tensors)
    loss, _, *kept = direct.mean_forward((*direct.hashable(args[TENSORS:]), differentiated), *args[:TENSORS])
    return loss, *kept


def _backward(options: Any, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The gradients of the first tensors, from what `_forward` returned and the gradient of the mean."""
    build, call, only_anchors, backend, count, needs, tape = options
    *given, grad = tensors
    own, kept = given[:count], given[count:]
    args = build(call, only_anchors, backend, *own)
    kept = kept if tape is None else tape.outputs(kept)
    flags = tuple(needs) + (False,) * (len(Gradients._fields) - len(GRADIENTS))
    found = direct.mean_backward((*direct.hashable(args[TENSORS:]), flags, None), *args[:TENSORS], *kept, grad)
    return _as_given(found, own)


def _as_given(found: Sequence[Tensor | None], own: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    pairs = zip(found, own, strict=False)
    return tuple(
        None if gradient is None or tensor is None else gradient.to(tensor.dtype).view(tensor.shape)
        for gradient, tensor in pairs
    )[: len(GRADIENTS)]


FORWARD, BACKWARD = Taped(_forward, own=1), Taped(_backward, own=len(GRADIENTS))


class _Mean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, options: Any, backend: str, setting: Any, *tensors: Tensor | None) -> Tensor:
        build, call, grad_mode = options
        ctx.backend, needs = backend, ctx.needs_input_grad[3 : 3 + len(GRADIENTS)]
        ctx.options = build, call, grad_mode and needs[0] and not any(needs[1:3]), backend
        differentiated = grad_mode and any(needs)
        (loss, *kept), tape = FORWARD((*ctx.options, differentiated), *setting, *tensors)
        saved, ctx.tape = comparable(kept, tape)
        assert loss is not None
        ctx.count, ctx.needs = len(tensors), needs
        ctx.save_for_backward(*tensors, *saved)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved, tape = ctx.saved_tensors, ctx.tape
        own = saved[: ctx.count]
        rest = (None,) * (ctx.count - len(GRADIENTS))
        options = (*ctx.options, ctx.count, ctx.needs, tape)
        if torch.is_grad_enabled() or intercepted(own[0], grad):  # run the operator, which a tracer sees
            return None, None, None, *_by_operator(options, saved, grad), *rest
        setting = None if tape is None and SEES_HOOKS else direct.TAPE_SETTINGS[BACKENDS[ctx.backend]](own[0].device)
        if setting is None:
            return None, None, None, *_backward(options, *saved, grad), *rest
        with without_autocast(own[0].device):
            found, _ = BACKWARD(options, *setting, *saved, grad, at_once=tape is not None)
        return None, None, None, *found, *rest


def _by_operator(options: Any, saved: Sequence[Any], grad: Tensor) -> tuple[Tensor | None, ...]:
    build, call, only_anchors, backend, count, needs, tape = options
    own, kept = saved[:count], saved[count:]
    args = build(call, only_anchors, backend, *own)
    kept = kept if tape is None else tape.outputs(kept)
    flags = [*needs, *[False] * (len(Gradients._fields) - len(GRADIENTS))]
    found = direct.derived((*args[:TENSORS], *kept), args[TENSORS:], flags, grad, None)
    return _as_given([found[place] for place in gradient_places(args)], own)


def takes(*tensors: Any) -> bool:
    """Whether calls with these values, None or of any type, the anchors first, may be replayed."""
    anchors = tensors[0]
    if not isinstance(anchors, Tensor) or anchors.device.type != direct.TAPED:
        return False
    known = all(value is None or type(value) in (Tensor, torch.nn.Parameter) for value in tensors)
    return known and all(value is None or value.dtype != torch.float64 for value in tensors)


def mean_loss(build: Build, call: Hashable, *tensors: Tensor | None) -> Tensor | None:
    """The mean loss of `direct.DirectMean` of the problem that `build` makes of the tensors; None: it is not replayed.

    tensors, which `takes` knows: anchors [..., D], contrasts [M, D], scale [], bias [M], positives [..., D], others.
    """
    anchors, contrasts = tensors[0], tensors[1]
    assert anchors is not None
    d = anchors.shape[-1] if anchors.dim() else 0
    n, m = (tensor.numel() // max(d, 1) for tensor in (anchors, anchors if contrasts is None else contrasts))
    if 0 in (n, m, d) or not direct.few(n, m, d) or intercepted(*tensors):
        return None
    device = anchors.device
    backend = choose_backend(device, torch.float32, "contrastive_stats")
    setting_of = direct.TAPE_SETTINGS.get(BACKENDS[backend])
    setting = None if setting_of is None else setting_of(device)
    if setting is None:
        return None
    with without_autocast(device):  # a tape holds operators as they run without it
        loss: Tensor = _Mean.apply((build, call, torch.is_grad_enabled()), backend, setting, *tensors)
    return loss
