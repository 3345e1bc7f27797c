"""The operator of the prototype losses on stored scores: schema, shapes for tracing, derivative, table of backends."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from ..backends.choose import choose_backend
from ..library import LIBRARY, register, without_autocast
from . import chunked, cpu, reference, triton
from .records import SCHEMA, Crops, Incoming, Values, Wanted, flatten, unflatten


class Backend(Protocol):
    """A module that computes prototype losses; `reference` describes its functions."""

    def forward(self, p: Crops, wanted: Wanted) -> Values: ...
    def backward(self, p: Crops, kept: Tensor, incoming: Incoming, outputs: list[Tensor]) -> None: ...


BACKENDS: dict[str, Backend] = {"reference": reference, "chunked": chunked, "cpu": cpu, "triton": triton}

_VALUES = ", ".join(f"Tensor {name}" for name in Values._fields)
LIBRARY.define(f"prototype_scores_fwd({SCHEMA}, bool[] wanted, str backend) -> ({_VALUES})")
LIBRARY.define(
    f"prototype_scores_bwd({SCHEMA}, str backend, Tensor kept, Tensor? values, Tensor? entropies, "
    "Tensor? column_sums, bool[] needs) -> Tensor[]"
)
scores_fwd, scores_bwd = torch.ops.fastcl.prototype_scores_fwd, torch.ops.fastcl.prototype_scores_bwd


def _forward(*args: Any) -> tuple[Tensor, ...]:
    *problem, wanted, backend = args
    p = unflatten(problem)
    with without_autocast(p.device):
        if p.places is not None:
            return tuple(chunked.forward(p, Wanted(*wanted), BACKENDS[backend]))
        return tuple(BACKENDS[backend].forward(p, Wanted(*wanted)))


def _forward_fake(*args: Any) -> tuple[Tensor, ...]:
    *problem, wanted, _ = args
    p, wanted = unflatten(problem), Wanted(*wanted)
    n, k = p.sizes
    sizes = n, n if wanted.entropies else 0, k if wanted.column_sums else 0
    return *map(p.new, sizes), p.new(len(p.all), 2, n)


def _backward(*args: Any) -> list[Tensor]:
    *problem, backend, kept, values, entropies, column_sums, needs = args
    p = unflatten(problem)
    outputs = _backward_fake(*args)
    # Students without a gradient take no part.
    pairs = [list(p.pairs[b * len(p.teachers) : (b + 1) * len(p.teachers)]) for b, need in enumerate(needs) if need]
    chosen = [*(b for b, need in enumerate(needs) if need), *range(len(p.students), len(p.all))]
    wanted = replace(
        p,
        students=[x for x, need in zip(p.students, needs, strict=True) if need],
        pairs=tuple(pair for row in pairs for pair in row),
    )
    if len(chosen) < len(p.all):
        kept = kept[chosen]
    incoming = Incoming(values, entropies, column_sums)
    written = [output for output, need in zip(outputs, needs, strict=True) if need]
    with without_autocast(p.device):
        if p.places is not None:
            chunked.backward(wanted, kept, incoming, written, BACKENDS[backend])
        else:
            BACKENDS[backend].backward(wanted, kept, incoming, written)
    return outputs


def _backward_fake(*args: Any) -> list[Tensor]:
    students, needs = args[0], args[-1]
    return [
        torch.empty(x.shape if need else (0,), dtype=x.dtype, device=x.device)
        for x, need in zip(students, needs, strict=True)
    ]


class _Scores(torch.autograd.Function):
    """Its tensors are arguments of their own, not in lists, so that autograd sees them."""

    @staticmethod
    def forward(ctx: Any, count: int, potentials: Any, scales: Any, options: Any, *crops: Tensor) -> Any:
        pairs, places, wanted, backend = options
        problem = list(crops[:count]), list(crops[count:]), potentials, scales, pairs, places
        with torch._C._AutoDispatchBelowAutograd():
            outputs = scores_fwd(*problem, wanted, backend)
        values = Values(*outputs)
        ctx.mark_non_differentiable(values.kept)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(values.kept, potentials, scales, places, *crops)
        ctx.count, ctx.pairs, ctx.wanted, ctx.backend = count, pairs, Wanted(*wanted), backend
        return tuple(values)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        kept, potentials, scales, places, *crops = ctx.saved_tensors
        students, teachers = crops[: ctx.count], crops[ctx.count :]
        needs = list(ctx.needs_input_grad[4 : 4 + ctx.count])
        values, entropies, column_sums, _ = (None if grad is None else grad.contiguous() for grad in grads)
        incoming = values, entropies if ctx.wanted.entropies else None, column_sums if ctx.wanted.column_sums else None
        problem = students, teachers, potentials, scales, ctx.pairs, places
        found = scores_bwd(*problem, ctx.backend, kept, *incoming, needs)
        gradients = [gradient if need else None for gradient, need in zip(found, needs, strict=True)]
        return None, None, None, None, *gradients, *[None] * len(teachers)


class _OfLists:
    @staticmethod
    def apply(students: Any, teachers: Any, potentials: Any, scales: Any, pairs: Any, *options: Any) -> Any:
        return _Scores.apply(len(students), potentials, scales, (pairs, *options), *students, *teachers)


register(
    "prototype_scores", _OfLists, (_forward, _forward_fake), (_backward, _backward_fake), "prototype_cross_entropy"
)


def prototype_scores(p: Crops, wanted: Wanted) -> Values:
    """The values of each sample; differentiable in the students."""
    backend = choose_backend(p.device, p.dtype, "prototypes")
    return Values(*scores_fwd(*flatten(p), list(wanted), backend))
