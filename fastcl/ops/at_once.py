"""Losses of few rows in one node of autograd's graph, which begins at the caller's tensors.

For few rows the nodes of a formula, checks and views take longer than the arithmetic. Here a function written out for
the loss computes it and its gradients in the forward; the backward only multiplies.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .backends.rows import FAR, NORM_FLOOR
from .library import intercepted
from .small import MOST, are_plain, needs_gradient, scaled

Gradients = Sequence[Tensor | None]
# From which tensors need a gradient, and the tensors: the loss [], and a gradient for each tensor.
Work = Callable[..., tuple[Tensor, Gradients]]


class AtOnce(torch.autograd.Function):
    """A loss whose first backward gives the gradients away that the forward has computed; another computes them again.

    further: a function of the tensors with the same loss, for derivatives of the gradients; or the name of the public
    function whose second derivatives are an error.
    """

    @staticmethod
    def forward(ctx: Any, work: Work, further: Callable[..., Tensor] | str, *tensors: Tensor | None) -> Tensor:
        loss, ctx.ready = _without_autocast(work, ctx.needs_input_grad[2:], *tensors)
        ctx.call = work, further
        ctx.save_for_backward(*tensors)  # torch checks that they are unchanged
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        tensors, needs = ctx.saved_tensors, ctx.needs_input_grad[2:]
        (work, further), ready, ctx.ready = ctx.call, ctx.ready, None
        if torch.is_grad_enabled() and not isinstance(further, str):
            return None, None, *_differentiable(further, needs, tensors, grad)
        if ready is None:
            with torch.no_grad():
                _, ready = _without_autocast(work, needs, *tensors)
        return None, None, *scaled(grad, tensors, ready, public=further if isinstance(further, str) else "")


# Without what `apply` does for functorch and for default arguments: `intercepted` has seen that there is neither.
_apply = super(torch.autograd.Function, AtOnce).apply


def _without_autocast(work: Work, needs: Sequence[bool], *tensors: Tensor | None) -> tuple[Tensor, Gradients]:
    if torch.is_autocast_enabled("cpu"):  # it would round products
        with torch.autocast("cpu", enabled=False):
            return work(needs, *tensors)
    return work(needs, *tensors)


def _differentiable(
    loss: Callable[..., Tensor], needs: Sequence[bool], tensors: Sequence[Any], grad: Tensor
) -> list[Tensor | None]:
    """Gradients that are part of a graph."""
    # Views, as one tensor may be given twice, or be made from another.
    wanted = {k: tensors[k].view_as(tensors[k]) for k, need in enumerate(needs) if need}
    value = loss(*(wanted.get(k, tensor) for k, tensor in enumerate(tensors)))
    found = torch.autograd.grad(value, list(wanted.values()), grad, create_graph=True)
    gradients = dict(zip(wanted, found, strict=True))
    return [gradients.get(k) for k in range(len(tensors))]


def at_once(work: Work, further: Callable[..., Tensor] | str, *tensors: Tensor | None) -> Tensor:
    """The loss that `work` computes of tensors on the CPU that are not `intercepted`. further: as in `AtOnce`."""
    if needs_gradient(*tensors):
        loss: Tensor = _apply(work, further, *tensors)
        return loss
    return _without_autocast(work, (False,) * len(tensors), *tensors)[0]


def are_few(*rows: Any, pairs: bool = False) -> bool:
    """Whether all are rows [N, D] of one shape and dtype on the CPU, of torch's own types, and few.

    pairs: the loss visits all pairs of rows; else the products of features may be fewer.
    """
    if torch.compiler.is_compiling() or not are_plain(*rows):
        return False
    n, d = rows[0].shape
    if n * d * (n if pairs else min(n, d)) > MOST:
        return False
    for other in rows[1:]:
        if other.shape != rows[0].shape or other.dtype != rows[0].dtype:
            return False
    return not intercepted(*rows)


def weight_of(reduction: Any, n: int) -> float | None:
    """What the sum over n rows is multiplied by; None for the terms themselves, or no reduction."""
    if type(reduction) is not str:
        return None
    return {"mean": 1 / n, "sum": 1.0}.get(reduction)


def wide(rows: Tensor) -> Tensor:
    """Rows in the dtype of sums."""
    return rows.float() if rows.dtype.itemsize == 2 else rows


class Units(NamedTuple):
    """Rows divided by their norms, in the dtype of sums and without a graph."""

    rows: Tensor  # [..., N, D], contiguous
    norms: Tensor  # [..., N, 1]


def units_of(rows: Tensor) -> Units | None:
    """None if a norm is 0, tiny, huge or NaN: `rows.unit` treats such rows in a way of their own."""
    rows = wide(rows.detach()).contiguous()
    norms = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    least, most = norms.aminmax()
    if not (least.item() > NORM_FLOOR and most.item() < FAR[norms.dtype]):
        return None
    return Units(rows / norms, norms)


def through_norms(grad: Tensor, units: Units) -> Tensor:
    """The gradient of rows from that of their unit rows, which is overwritten."""
    along = torch.linalg.vecdot(units.rows, grad).unsqueeze_(-1)
    return grad.addcmul_(units.rows, along, value=-1).div_(units.norms)
