"""The operator past torch's dispatcher, for where `intercepted` finds nobody who looks on.

A small batch takes less time than the operator's way through torch, than taking its stacked outputs apart, and than
the nodes that a formula of them leaves in autograd's graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .ops import (
    BOTH,
    DIFFERENTIABLE,
    TENSORS,
    WANT,
    by_argument,
    differentiate,
    gradients,
    posed,
    run_forward,
    save,
    statistics,
)
from .problem import Needs, Side

# Rows times contrasts times dimension, up to which a gradient costs less than the way to it.
AT_ONCE = 1 << 23


class DirectStats(torch.autograd.Function):
    """Each statistic is an output of its own, as `taken_apart` lists them."""

    @staticmethod
    def forward(ctx: Any, *args_and_scales: Any) -> tuple[Tensor, ...]:
        *args, one_scale = args_and_scales
        outputs = run_forward(*args)
        save(ctx, args, outputs)
        values = taken_apart(outputs, one_scale, args[BOTH])
        ctx.mark_non_differentiable(*_counts_among(values, len(args[WANT])))
        return values

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        wanted = len(ctx.options[WANT - TENSORS])
        both_sides = _stacked(grads[:wanted]), _stacked(grads[wanted + 2 : 2 * wanted + 2])
        return *differentiate(ctx, *both_sides), None


class DirectMean(torch.autograd.Function):
    """Mean over the rows that count of lse_i - sum_pos_i / num_pos_i, of fields that are wanted as (lse, sum_pos).

    With `both`, the mean of that over the anchors and that over the contrasts. A row counts if it has a positive and,
    for lse_neg, a negative. The derivatives in the fields are functions of the counts alone, so that the gradient can
    be had at once, to be scaled when the backward comes: for a small batch that spares another way through Python.
    """

    @staticmethod
    def forward(ctx: Any, *args_and_grad_mode: Any) -> Tensor:
        *args, grad_mode = args_and_grad_mode
        problem, backend = posed(args)
        found = statistics(problem, backend)
        outputs = (*found.anchors, *found.contrasts, *found[2:])
        sides = [found.anchors, found.contrasts] if problem.both else [found.anchors]
        counted = [_counted(side.counts, problem.want[0] == "lse_neg") for side in sides]
        ctx.counted, ctx.at_once = counted, False
        at_once: tuple[Tensor | None, ...] = ()
        work = problem.anchors.numel() * problem.sizes[2]
        if grad_mode and any(ctx.needs_input_grad) and work <= AT_ONCE:
            needs = Needs(*[ctx.needs_input_grad[i] for i in DIFFERENTIABLE.values()])
            of_fields = [_derivative(side.counts, rows, len(sides)) for side, rows in zip(sides, counted, strict=True)]
            of_contrasts = of_fields[1] if problem.both else found.contrasts.fields  # empty
            ctx.at_once, at_once = True, gradients(problem, backend, found, of_fields[0], of_contrasts, needs)
            ctx.dtypes = [None if args[i] is None else args[i].dtype for i in DIFFERENTIABLE.values()]
        save(ctx, args, outputs, *at_once)
        means = [_mean(side, rows) for side, rows in zip(sides, counted, strict=True)]
        return means[0] if len(means) == 1 else (means[0] + means[1]) / 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * len(ctx.needs_input_grad)
        if ctx.at_once and not torch.is_grad_enabled():
            at_once = ctx.saved_tensors[-len(ctx.dtypes) :]
            scaled = [
                None if gradient is None else (gradient * grad).to(dtype)
                for gradient, dtype in zip(at_once, ctx.dtypes, strict=True)
            ]
            return *by_argument(scaled), None
        counts, _, contrast_counts = ctx.saved_tensors[TENSORS : TENSORS + 3]
        of_fields: list[Tensor | None] = [None, None]
        for k, (side, rows) in enumerate(zip((counts, contrast_counts), ctx.counted, strict=False)):
            of_fields[k] = _derivative(side, rows, len(ctx.counted)) * grad
        return *differentiate(ctx, *of_fields), None


def _counted(counts: Tensor, need_negatives: bool) -> Tensor | None:
    """Which rows count, bool [N]; None: all of them, the common case, which then takes the fewest operators."""
    fewest = counts.amin(0) if need_negatives else counts[0]
    return None if float(fewest.min()) > 0 else fewest > 0


def _mean(side: Side, counted: Tensor | None) -> Tensor:
    (lse, sum_pos), num_pos = side.fields.unbind(0), side.counts[0]
    if counted is None:
        return torch.addcdiv(lse, sum_pos, num_pos, value=-1).mean()
    terms = torch.addcdiv(lse, sum_pos, num_pos.clamp(min=1), value=-1)
    return torch.where(counted, terms, 0).sum() / counted.sum().clamp(min=1)


def _derivative(counts: Tensor, counted: Tensor | None, means: int) -> Tensor:
    """Of the mean of so many `_mean`s, in the fields [2, 1, N] of one of them."""
    n = counts.shape[1]
    if counted is None:
        result = counts.new_full((2, 1, n), 1 / (n * means))
        result[1].div_(counts[0]).neg_()
        return result
    rows = counted.to(counts.dtype)
    weights = rows / (rows.sum().clamp(min=1) * means)
    return torch.stack((weights, weights / -counts[0].clamp(min=1)))[:, None]


def taken_apart(outputs: Sequence[Tensor], one_scale: bool, both: bool) -> tuple[Tensor, ...]:
    """Of each side the wanted fields, [N] with one scale, else [S, N], then num_pos and num_neg."""
    fields, counts, _, contrast_fields, contrast_counts, *_ = outputs
    values = (*(fields.flatten(0, 1) if one_scale else fields).unbind(0), *counts.unbind(0))
    if not both:
        return values
    other = contrast_fields.flatten(0, 1) if one_scale else contrast_fields
    return *values, *other.unbind(0), *contrast_counts.unbind(0)


def _counts_among(values: Sequence[Tensor], wanted: int) -> tuple[Tensor, ...]:
    return tuple(value for k, value in enumerate(values) if k % (wanted + 2) >= wanted)


def _stacked(grads: Sequence[Tensor | None]) -> Tensor | None:
    some = next((grad for grad in grads if grad is not None), None)
    if some is None:
        return None
    stacked = torch.stack([torch.zeros_like(some) if grad is None else grad for grad in grads])
    return stacked if stacked.dim() == 3 else stacked[:, None]
