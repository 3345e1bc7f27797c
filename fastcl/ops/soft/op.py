"""The operator of statistics over soft assignments: schema, shapes for tracing, derivative, table of backends.

It differs from the contrastive statistics in one point: num_pos is a sum of weights, and so has a derivative.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..contrastive import chunked, infinite, reference
from ..contrastive.records import (
    ARGUMENTS,
    PLACES,
    SCHEMA,
    TENSORS,
    Gradients,
    Needs,
    Problem,
    Side,
    Statistics,
    flatten,
    gradient_places,
    unflatten,
)
from ..library import LIBRARY, intercepted, register, without_autocast
from ..small import PLAIN
from . import cpu, triton
from .assignments import assignment_gradients


class SoftBackend(Protocol):
    """`contrastive.backend.Backend` for problems with assignments. Only `cpu` keeps anything for the backward."""

    def forward(self, p: Problem) -> Statistics: ...

    def backward(
        self, p: Problem, saved: Statistics, grad: Tensor, grad_contrasts: Tensor, needs: Needs
    ) -> Gradients: ...


BACKENDS: dict[str, SoftBackend] = {"reference": reference, "chunked": chunked, "cpu": cpu, "triton": triton}

_LENGTH = len(ARGUMENTS) + 1  # the last argument is the backend's name
_FOUND = (
    "Tensor fields, Tensor sizes, Tensor parts, Tensor contrast_fields, Tensor contrast_sizes, Tensor contrast_parts, "
    "Tensor anchor_inverse_norms, Tensor contrast_inverse_norms"
)
LIBRARY.define(f"soft_stats_fwd({SCHEMA}, str backend) -> ({_FOUND})")
LIBRARY.define(
    f"soft_stats_bwd({SCHEMA}, str backend, {_FOUND}, Tensor grad_fields, Tensor grad_contrast_fields, bool[] needs) "
    f"-> ({', '.join(f'Tensor {name}' for name in Gradients._fields)})"
)
forward_op = torch.ops.fastcl.soft_stats_fwd
backward_op = torch.ops.fastcl.soft_stats_bwd


class SoftSide(NamedTuple):
    """The statistics of one side."""

    fields: Tensor  # [3, N]: lse_all, sum_pos, num_pos
    size: Tensor  # [N], the number of admissible contrasts


def _parsed(args: Sequence[Any]) -> tuple[Problem, SoftBackend]:
    return unflatten(args[:-1]), BACKENDS[args[-1]]


def _forward(*args: Any) -> tuple[Tensor, ...]:
    return _found(args, False)[0]


def _found(args: Sequence[Any], keep: bool) -> tuple[tuple[Tensor, ...], Tensor]:
    """The outputs of the operator, and with `keep` what `cpu` keeps for the backward."""
    problem, backend = _parsed(args)
    with without_autocast(problem.device):
        problem = infinite.as_nan(problem)
        found = cpu.forward(problem, keep) if backend is cpu else backend.forward(problem)
    anchors, contrasts, *norms, kept = found

    def outputs(side: Side) -> tuple[Tensor, ...]:
        num_pos, size = side.counts
        return torch.stack((*side.fields[:, 0], num_pos)), size.clone(), side.parts[:, 0, 0].clone()

    return (*outputs(anchors), *outputs(contrasts), *norms), kept


def _backward(*args: Any) -> tuple[Tensor, ...]:
    return _differentiated(args, None)


def _differentiated(args: Sequence[Any], kept: Tensor | None) -> tuple[Tensor, ...]:
    """kept: by the forward."""
    problem, backend = _parsed(args[:_LENGTH])
    *outputs, grad, grad_contrasts, flags = args[_LENGTH:]
    needs = Needs(*flags)
    sides = _side(*outputs[:3]), _side(*outputs[3:6])
    saved = Statistics(sides[0], sides[1], outputs[6], outputs[7], grad.new_empty(0) if kept is None else kept)
    own, other = (_over_sets(side, g) for side, g in zip(sides, (grad, grad_contrasts), strict=True))
    with without_autocast(problem.device):
        swept = backend.backward(problem, saved, own[:2, None], other[:2, None], needs)
        flags = needs.anchor_assignments, needs.contrast_assignments
        of_anchors, of_contrasts = assignment_gradients(problem, own[1:], other[1:], flags)
    found = swept._replace(anchor_assignments=of_anchors, contrast_assignments=of_contrasts)
    sources = [args[place] for place in gradient_places(args)]
    return tuple(
        grad.new_empty(0) if gradient is None or not need or source is None else gradient.to(source.dtype).contiguous()
        for need, gradient, source in zip(needs, found, sources, strict=True)
    )


def _over_sets(side: Side, grad: Tensor) -> Tensor:
    """The gradients [3, N] of the fields that the backward uses; the others become 0.

    Rows without admissible pairs have none. In rows whose weights sum to 0, gradients of sum_pos and num_pos that are
    not finite are dropped: a formula divides by num_pos.
    """
    weighed, some = side.counts != 0  # true for a NaN weight
    usable = some & (weighed | grad.isfinite())
    return torch.where(torch.stack((some, usable[1], usable[2])), grad, 0)


def _side(fields: Tensor, sizes: Tensor, parts: Tensor) -> Side:
    """The side, restored from the outputs of the forward operator."""
    return Side(fields[:2, None], torch.stack((fields[2], sizes)), parts[:, None, None])


def _forward_fake(*args: Any) -> tuple[Tensor, ...]:
    problem, _ = _parsed(args)
    _, n, m = problem.sizes
    new = problem.logit_scale.new_empty

    def side(size: int) -> tuple[Tensor, ...]:
        return new((3, size)), new(size), new((2, size))

    c = m if problem.contrasts is not None and problem.contrasts.normalize else 0
    return *side(n), *side(m if problem.both else 0), new(n if problem.anchors.normalize else 0), new(c)


def _backward_fake(*args: Any) -> tuple[Tensor, ...]:
    sources = [args[place] for place in gradient_places(args)]
    return tuple(
        source.new_empty(source.shape) if need and source is not None else args[PLACES["logit_scale"]].new_empty(0)
        for need, source in zip(args[-1], sources, strict=True)
    )


def _unused_numbers(args: Sequence[Any]) -> int:
    """How many numbers the operator, run under a mode, does not keep: checkpointing expects the same memory of it."""
    problem, backend = _parsed(args)
    plain = type(problem.anchors.values) in PLAIN and not torch.compiler.is_compiling()
    return cpu.kept_numbers(problem) if plain and backend is cpu and cpu.keeps_weights(problem) else 0


class _SoftStats(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        outputs: tuple[Tensor, ...]
        ctx.swept = not intercepted(*args[:TENSORS])
        with torch._C._AutoDispatchBelowAutograd():
            if not ctx.swept:
                outputs = forward_op(*args)
                kept = outputs[0].new_empty(_unused_numbers(args) if any(ctx.needs_input_grad) else 0)
            else:
                outputs, kept = _found(args, any(ctx.needs_input_grad))
        ctx.mark_non_differentiable(*(output for k, output in enumerate(outputs) if k not in (0, 3)))
        ctx.save_for_backward(*args[:TENSORS], *outputs, kept)
        ctx.options = args[TENSORS:]
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        *saved, kept = ctx.saved_tensors
        places = gradient_places(saved)
        needs = [ctx.needs_input_grad[place] for place in places]
        arguments = (*saved[:TENSORS], *ctx.options, *saved[TENSORS:])
        arguments = *arguments, grads[0].contiguous(), grads[3].contiguous(), needs
        if not ctx.swept or torch.is_grad_enabled() or intercepted(saved[0], kept, grads[0], grads[3]):
            gradients = backward_op(*arguments)  # the operator makes a second derivative raise
        else:
            gradients = _differentiated(arguments, kept)
        found: list[Tensor | None] = [None] * _LENGTH
        for place, need, gradient in zip(places, needs, gradients, strict=True):
            found[place] = gradient if need else None
        return tuple(found)


register("soft_stats", _SoftStats, (_forward, _forward_fake), (_backward, _backward_fake), "contrastive_stats")


def at_unit(assignments: Tensor) -> tuple[Tensor, Tensor]:
    """Divides assignments by a power of two, so that each row's largest number lies around 1, at most 2^37.

    Otherwise the sums of products of large numbers overflow, and the products of small numbers underflow. The power,
    float64 [], is returned too. It is near the geometric mean of the largest row and the smallest non-zero row. It is a
    constant for derivatives and stays on the device. float16 assignments are not scaled: float32 can add up their
    products.
    """
    one = assignments.new_ones((), dtype=torch.float64)
    if assignments.numel() == 0 or assignments.dtype == torch.float16:
        return assignments, one
    most = 2.0**900 if assignments.dtype == torch.float64 else 2.0**100  # the power and its inverse are normal numbers
    rows = assignments.detach().amax(1).double()
    largest = rows.amax()
    smallest = torch.where(rows > 0, rows, largest).amin()
    middle = torch.maximum(largest.sqrt() * smallest.sqrt(), largest * 2.0**-36)
    mantissa, _ = torch.frexp(inside := middle.clamp(1 / most, most))
    unit = torch.where(largest > 0, inside / mantissa, one)  # exact
    return assignments * (1 / unit).to(assignments.dtype), unit


def statistics(p: Problem, backend: str) -> tuple[SoftSide, SoftSide]:
    """The statistics of the anchors and, with `both`, of the contrasts."""
    fields, sizes, _, contrast_fields, contrast_sizes, *_ = forward_op(*flatten(p), backend)
    return SoftSide(fields, sizes), SoftSide(contrast_fields, contrast_sizes)
