"""The operator of statistics over soft assignments: schema, shapes, derivatives, and the backends that have it.

As for the contrastive statistics, but what is a count there is a sum of weights here, and so has a derivative.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..contrastive import chunked, reference
from ..contrastive.records import Gradients, Needs, Problem, Side, Statistics
from ..library import LIBRARY, register, without_autocast
from . import cpu, triton
from .assignments import assignment_gradients


class Engine(Protocol):
    """As `BACKENDS`, of problems with assignments."""

    def forward(self, p: Problem) -> Statistics: ...

    def backward(
        self, p: Problem, saved: Statistics, grad: Tensor, grad_contrasts: Tensor, needs: Needs
    ) -> Gradients: ...


ENGINES: dict[str, Engine] = {"reference": reference, "chunked": chunked, "cpu": cpu, "triton": triton}

_ARGUMENTS = (
    "Tensor anchors, Tensor? contrasts, Tensor anchor_assignments, Tensor? contrast_assignments, Tensor logit_scale, "
    "Tensor? contrast_bias, Tensor? anchor_ids, Tensor? contrast_ids, bool normalize_anchors, "
    "bool normalize_contrasts, bool both, str backend"
)
_TENSORS, _LENGTH = 8, _ARGUMENTS.count(",") + 1
_DIFFERENTIABLE = 6  # leading arguments
LIBRARY.define(
    f"soft_stats_fwd({_ARGUMENTS}) -> (Tensor fields, Tensor sizes, Tensor parts, Tensor contrast_fields, "
    "Tensor contrast_sizes, Tensor contrast_parts, Tensor anchor_inverse_norms, Tensor contrast_inverse_norms)"
)
LIBRARY.define(
    f"soft_stats_bwd({_ARGUMENTS}, Tensor fields, Tensor sizes, Tensor parts, Tensor contrast_fields, "
    "Tensor contrast_sizes, Tensor contrast_parts, Tensor anchor_inverse_norms, Tensor contrast_inverse_norms, "
    "Tensor grad_fields, Tensor grad_contrast_fields, bool[] needs) -> (Tensor anchors, Tensor contrasts, "
    "Tensor anchor_assignments, Tensor contrast_assignments, Tensor logit_scale, Tensor contrast_bias)"
)
forward_op = torch.ops.fastcl.soft_stats_fwd
backward_op = torch.ops.fastcl.soft_stats_bwd


class Weighted(NamedTuple):
    """One side's statistics, [N]."""

    fields: Tensor  # [3, N]: lse_all, sum_pos, num_pos
    size: Tensor  # of A_i


def _posed(args: Sequence[Any]) -> tuple[Problem, Engine]:
    anchors, contrasts, own, other, scale, bias, anchor_ids, contrast_ids, normalize, normalize_others, both, name = (
        args
    )
    problem = Problem(
        anchors=anchors,
        contrasts=contrasts,
        paired=None,
        anchor_clusters=None,
        contrast_clusters=None,
        logit_scale=scale,
        contrast_bias=bias,
        anchor_ids=anchor_ids,
        contrast_ids=contrast_ids,
        normalize_anchors=normalize,
        normalize_contrasts=normalize_others,
        want=("lse_all", "sum_pos"),
        both=both,
        anchor_assignments=own,
        contrast_assignments=other,
    )
    return problem, ENGINES[name]


def _forward(*args: Any) -> tuple[Tensor, ...]:
    problem, engine = _posed(args)
    with without_autocast(problem.device):
        anchors, contrasts, *norms, _ = engine.forward(problem)

    def outputs(side: Side) -> tuple[Tensor, ...]:
        num_pos, size = side.counts
        return torch.stack((*side.fields[:, 0], num_pos)), size.clone(), side.parts[:, 0, 0].clone()

    return *outputs(anchors), *outputs(contrasts), *norms


def _backward(*args: Any) -> tuple[Tensor, ...]:
    problem, engine = _posed(args[:_LENGTH])
    *outputs, grad, grad_contrasts, flags = args[_LENGTH:]
    needs = Needs(flags[0], flags[1], flags[4], flags[5], False)
    sides = _side(*outputs[:3]), _side(*outputs[3:6])
    saved = Statistics(sides[0], sides[1], outputs[6], outputs[7], grad.new_empty(0))
    own, other = (_over_sets(side, g) for side, g in zip(sides, (grad, grad_contrasts), strict=True))
    with without_autocast(problem.device):
        swept = engine.backward(problem, saved, own[:2, None], other[:2, None], needs)
        of_assignments = assignment_gradients(problem, own[1:], other[1:], (flags[2], flags[3]))
    found = (swept.anchors, swept.contrasts, *of_assignments, swept.logit_scale, swept.contrast_bias)
    return tuple(
        grad.new_empty(0) if gradient is None or not need or source is None else gradient.to(source.dtype).contiguous()
        for need, gradient, source in zip(flags, found, args, strict=False)
    )


def _over_sets(side: Side, grad: Tensor) -> Tensor:
    """Those of the fields [3, N] of rows without pairs do not count, and of rows without weight not those that a
    formula which divides by it sends back as NaN or infinity."""
    weighed, some = side.counts != 0  # NaN is a weight
    usable = some & (weighed | grad.isfinite())
    return torch.where(torch.stack((some, usable[1], usable[2])), grad, 0)


def _side(fields: Tensor, sizes: Tensor, parts: Tensor) -> Side:
    return Side(fields[:2, None], torch.stack((fields[2], sizes)), parts[:, None, None])


def _forward_fake(*args: Any) -> tuple[Tensor, ...]:
    problem, _ = _posed(args)
    _, n, m = problem.sizes
    new = problem.logit_scale.new_empty

    def side(size: int) -> tuple[Tensor, ...]:
        return new((3, size)), new(size), new((2, size))

    c = m if problem.normalize_contrasts and problem.contrasts is not None else 0
    return *side(n), *side(m if problem.both else 0), new(n if problem.normalize_anchors else 0), new(c)


def _backward_fake(*args: Any) -> tuple[Tensor, ...]:
    return tuple(
        source.new_empty(source.shape) if need and source is not None else args[4].new_empty(0)
        for need, source in zip(args[-1], args, strict=False)
    )


class _SoftStats(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        with torch._C._AutoDispatchBelowAutograd():
            outputs: tuple[Tensor, ...] = forward_op(*args)
        ctx.mark_non_differentiable(*(output for k, output in enumerate(outputs) if k not in (0, 3)))
        ctx.save_for_backward(*args[:_TENSORS], *outputs)
        ctx.options = args[_TENSORS:]
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:_DIFFERENTIABLE])
        arguments = (*saved[:_TENSORS], *ctx.options, *saved[_TENSORS:])
        gradients = backward_op(*arguments, grads[0].contiguous(), grads[3].contiguous(), needs)
        found = [gradient if need else None for need, gradient in zip(needs, gradients, strict=True)]
        return *found, *[None] * (_LENGTH - _DIFFERENTIABLE)


register("soft_stats", _SoftStats, (_forward, _forward_fake), (_backward, _backward_fake), "contrastive_stats")


def at_unit(assignments: Tensor) -> tuple[Tensor, Tensor]:
    """The assignments divided by a power of two, float64 [], so that rows' largest ones lie around 1, at most 2^37.

    Products of large ones and their sums would overflow, those of small ones underflow. The power, near the geometric
    mean of the largest and the smallest row that is not zero, is a constant for derivatives, and nobody waits for it.
    float16 has no numbers whose products float32 could not add up.
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


def statistics(*args: Any) -> tuple[Weighted, Weighted]:
    """Of the anchors, and of the contrasts where both are wanted; the operator's arguments."""
    fields, sizes, _, contrast_fields, contrast_sizes, *_ = forward_op(*args)
    return Weighted(fields, sizes), Weighted(contrast_fields, contrast_sizes)
