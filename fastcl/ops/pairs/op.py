"""The operators of the pair sums: schemas, shapes for tracing, derivatives, table of backends.

`pair_sums` returns the sums of each row, and sweeps again for their gradient. `pair_total` returns a weighted total of
them whose weights are known before the sweep, so one sweep gives the total and its gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ...checks import values_visible
from ..backends.choose import choose_backend
from ..contrastive.infinite import rows_as_nan
from ..contrastive.records import Rows
from ..library import LIBRARY, intercepted, register, without_autocast
from ..pair_maps import KINDS
from . import chunked, cpu, cuda, reference, triton
from .records import LENGTH, SCHEMA, SOURCES, TENSORS, Gradients, Needs, Pairs, Sums, flatten, unflatten


class Backend(Protocol):
    """A module that computes pair sums."""

    def sweep(self, p: Pairs, weights: Tensor | None, needs: Needs) -> tuple[Sums, Gradients]:
        """The sums and, with weights [2, N], the needed gradients of ``sum(weights * sums.values)``."""


BACKENDS: dict[str, Backend] = {"reference": reference, "chunked": chunked, "cpu": cpu, "triton": triton, "cuda": cuda}

_SUMS = "Tensor values, Tensor active, Tensor counts"
_GRADIENTS = ", ".join(f"Tensor {name}" for name in Gradients._fields)
LIBRARY.define(f"pair_sums_fwd({SCHEMA}) -> ({_SUMS})")
LIBRARY.define(f"pair_sums_bwd({SCHEMA}, Tensor weights, bool[] needs) -> ({_GRADIENTS})")
LIBRARY.define(
    f"pair_total_fwd({SCHEMA}, Tensor weights, bool[] needs) -> (Tensor total, {_SUMS}, "
    f"{', '.join(f'Tensor grad_{name}' for name in Gradients._fields)})"
)
LIBRARY.define(
    f"pair_total_bwd(Tensor grad, Tensor values, Tensor[] gradients, {SCHEMA.split(', Tensor? anchor_clusters')[0]}, "
    f"bool[] needs) -> ({_GRADIENTS}, Tensor weights)"
)
sums_fwd, sums_bwd = torch.ops.fastcl.pair_sums_fwd, torch.ops.fastcl.pair_sums_bwd
total_fwd, total_bwd = torch.ops.fastcl.pair_total_fwd, torch.ops.fastcl.pair_total_bwd


_NOTHING = Needs()


def sweep(p: Pairs, backend: str, weights: Tensor | None = None, needs: Needs = _NOTHING) -> tuple[Sums, Gradients]:
    """`Backend.sweep`, also for empty sets and for rows with infinite numbers."""
    if backend != "cpu":  # its engine knows infinite rows itself
        p = replace(p, anchors=rows_as_nan(p.anchors), contrasts=p.contrasts and rows_as_nan(p.contrasts))
    with without_autocast(p.device):
        return _counted(p, *(chunked if 0 in p.sizes else BACKENDS[backend]).sweep(p, weights, needs))


def _counted(p: Pairs, sums: Sums, found: Gradients) -> tuple[Sums, Gradients]:
    """A softplus that underflows to 0 is active too."""
    values, active, counts = sums
    return Sums(values, active if KINDS[p.kind].margins else counts, counts), found


# The sums of each row.


def _sums_forward(*args: Any) -> tuple[Tensor, ...]:
    return _apart(sweep(unflatten(args), args[-1])[0])


def _apart(sums: Sums) -> tuple[Tensor, ...]:
    """The sums as outputs of an operator, none of which may be another one's memory."""
    return sums.values.clone(), sums.active.clone(), sums.counts.clone()


def _sums_backward(*args: Any) -> tuple[Tensor, ...]:
    *problem, weights, flags = args
    needs = Needs(*flags)
    _, found = sweep(unflatten(problem), problem[-1], weights.contiguous(), needs)
    return _in_dtypes(found, problem, needs)


def _in_dtypes(found: Gradients, sources: Sequence[Any], needs: Needs) -> tuple[Tensor, ...]:
    """The gradients in their sources' dtypes; [0] for those that are not needed."""
    return tuple(
        sources[0].new_empty(0) if gradient is None or not need else gradient.to(source.dtype).contiguous()
        for gradient, source, need in zip(found, sources[:SOURCES], needs, strict=True)
    )


def _sums_fake(*args: Any) -> tuple[Tensor, ...]:
    p = unflatten(args)
    return tuple(p.logit_scale.new_empty(2, p.sizes[0], dtype=p.dtype) for _ in Sums._fields)


def _sums_backward_fake(*args: Any) -> tuple[Tensor, ...]:
    return tuple(
        args[0].new_empty(0) if source is None or not need else source.new_empty(source.shape)
        for source, need in zip(args[:SOURCES], args[-1], strict=True)
    )


class _Sums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        with torch._C._AutoDispatchBelowAutograd():
            values, active, counts = sums_fwd(*args)
        ctx.mark_non_differentiable(active, counts)
        ctx.save_for_backward(*args[:TENSORS])
        ctx.options = args[TENSORS:]
        return values, active, counts

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        needs = list(ctx.needs_input_grad[:SOURCES])
        found = sums_bwd(*ctx.saved_tensors, *ctx.options, grads[0].contiguous(), needs)
        return *_needed(found, needs), *[None] * (LENGTH - SOURCES)


def _needed(found: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
    return [gradient if need else None for gradient, need in zip(found, needs, strict=True)]


register("pair_sums", _Sums, (_sums_forward, _sums_fake), (_sums_backward, _sums_backward_fake), "contrastive_stats")


# A weighted total.


def _total_forward(*args: Any) -> tuple[Tensor, ...]:
    total, sums, found = _total_of(args)
    nothing = sums.values.new_empty
    return total, *_apart(sums), *(nothing(0) if gradient is None else gradient for gradient in found)


def _total_of(args: Sequence[Any]) -> tuple[Tensor, Sums, Gradients]:
    *problem, weights, flags = args
    needs, p, backend = Needs(*flags), unflatten(problem), problem[-1]
    if backend == "cpu" and 0 not in p.sizes:  # its engine adds up as well
        total = torch.empty((), dtype=p.dtype, device=p.device)
        return total, *_counted(p, *cpu.sweep(p, weights, needs, total))
    sums, found = sweep(p, backend, weights.contiguous() if any(flags) else None, needs)
    return weighted_total(weights, sums), sums, found


def weighted_total(weights: Tensor, sums: Sums) -> Tensor:
    """``sum(weights * values)``, added in float64."""
    return (weights * sums.values).sum(dtype=torch.float64).to(sums.values.dtype)


def _total_backward(
    grad: Tensor, values: Tensor, gradients: Sequence[Tensor], *sources_and_needs: Any
) -> tuple[Tensor, ...]:
    *sources, flags = sources_and_needs
    *flags, weights = flags
    scaled = Gradients(*(gradient * grad if need else None for gradient, need in zip(gradients, flags, strict=True)))
    return *_in_dtypes(scaled, sources, Needs(*flags)), values * grad if weights else values.new_empty(0)


def _total_fake(*args: Any) -> tuple[Tensor, ...]:
    *problem, _, flags = args
    p = unflatten(problem)
    sums = _sums_fake(*problem)
    gradients = []
    for name, source, need in zip(Gradients._fields, problem[:SOURCES], flags, strict=True):
        shape = source.shape if need and source is not None else (0,)
        wide = need and name in ("logit_scale", "offset")
        gradients.append(p.logit_scale.new_empty(shape, dtype=torch.float64 if wide else p.dtype))
    return p.logit_scale.new_empty((), dtype=p.dtype), *sums, *gradients


def _total_backward_fake(
    grad: Tensor, values: Tensor, gradients: Sequence[Tensor], *sources_and_needs: Any
) -> tuple[Tensor, ...]:
    *sources, flags = sources_and_needs
    found = _sums_backward_fake(*sources, flags[:-1])
    return *found, values.new_empty(values.shape if flags[-1] else 0)


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        with torch._C._AutoDispatchBelowAutograd():
            outputs: tuple[Tensor, ...] = total_fwd(*args)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(outputs[1], *args[:SOURCES], *outputs[len(Sums._fields) + 1 :])
        ctx.mark_non_differentiable(*outputs[1:])
        return outputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * (LENGTH + 2)
        values, *saved = ctx.saved_tensors
        needs = [*ctx.needs_input_grad[:SOURCES], ctx.needs_input_grad[LENGTH]]
        *found, weights = total_bwd(grad, values, saved[SOURCES:], *saved[:SOURCES], needs)
        return *_needed(found, needs[:-1]), *[None] * (LENGTH - SOURCES), weights if needs[-1] else None, None


class _DirectTotal(torch.autograd.Function):
    """`_Total` without the dispatcher, which costs more than a small sweep.

    The first backward gives the gradients away that the forward has computed; another one sweeps again.
    """

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        total, sums, ctx.ready = _total_of(args)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(sums.values, args[LENGTH], *args[:TENSORS])
        ctx.options = args[TENSORS:LENGTH]
        active = sums.active.clone() if sums.active is sums.counts else sums.active  # as another output
        ctx.mark_non_differentiable(sums.values, active, sums.counts)
        return total, sums.values, active, sums.counts

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * (LENGTH + 2)
        values, weights, *tensors = ctx.saved_tensors
        needs = [*ctx.needs_input_grad[:SOURCES], ctx.needs_input_grad[LENGTH]]
        ready, ctx.ready = ctx.ready, None
        if ready is None:
            p = unflatten((*tensors, *ctx.options))
            with torch.no_grad():  # plain PyTorch would record a graph
                _, ready = sweep(p, ctx.options[-1], weights.contiguous(), Needs(*needs[:-1]))
        if torch.is_grad_enabled() or intercepted(grad):  # the operator makes a second derivative raise
            ready = [values.new_empty(0) if gradient is None else gradient for gradient in ready]
            *found, of_weights = total_bwd(grad, values, ready, *tensors[:SOURCES], needs)
        else:
            if not (values_visible(grad) and float(grad) == 1):
                ready = Gradients(*(None if gradient is None else gradient.mul_(grad) for gradient in ready))
            found, of_weights = _in_dtypes(ready, tensors, Needs(*needs[:-1])), values * grad if needs[-1] else None
        return *_needed(found, needs[:-1]), *[None] * (LENGTH - SOURCES), of_weights if needs[-1] else None, None


register(
    "pair_total", _Total, (_total_forward, _total_fake), (_total_backward, _total_backward_fake), "contrastive_stats"
)


class Total(NamedTuple):
    """A weighted total of sums over pairs, and the sums."""

    total: Tensor  # [], differentiable
    values: Tensor  # [2, N], detached, as the following
    active: Tensor
    counts: Tensor


def pair_sums(p: Pairs) -> Sums:
    """The sums of each row; `values` are differentiable."""
    p, backend = _prepared(p)
    return Sums(*sums_fwd(*flatten(p, backend)))


def pair_total(p: Pairs, weights: Tensor) -> Total:
    """``sum(weights * values)`` for weights [2, N]; differentiable in the weights too."""
    p, backend = _prepared(p)
    arguments = flatten(p, backend)
    grad = torch.is_grad_enabled()
    needs = [grad and source is not None and source.requires_grad for source in arguments[:SOURCES]]
    weights = weights.to(p.dtype)
    through = intercepted(*arguments[:TENSORS], weights)
    outputs = (total_fwd if through else _DirectTotal.apply)(*arguments, weights, needs)
    return Total(*outputs[:4])


def _prepared(p: Pairs) -> tuple[Pairs, str]:
    """The problem with numbers in the dtype of its sums, and its backend."""
    dtype = p.dtype
    contrasts = p.contrasts
    if contrasts is not None and contrasts.bias is not None and contrasts.bias.dtype != dtype:
        values, clusters, ids, *_, normalize = contrasts  # torch 2.6 cannot compile _replace
        contrasts = Rows(values, clusters, ids, contrasts.bias.to(dtype), normalize=normalize)
    offset = None if p.offset is None else p.offset.to(dtype)
    scale = p.logit_scale.to(dtype)
    p = Pairs(p.anchors, contrasts, scale, offset, p.kind, p.pos_margin, p.neg_margin, p.only_positives)
    return p, choose_backend(p.device, dtype, "pair_distances" if p.of_distance else "pair_sums")
