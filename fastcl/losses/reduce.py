"""Evaluates the formula of a loss: one sweep, weights, and the reduction over the rows that count."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..checks import check_flag, check_vector, scalar_tensor, values_visible
from ..distributed import Property, World, tell_others
from ..ops.backends.rows import accumulation_dtype
from ..ops.contrastive.records import Problem
from ..ops.library import uncompiled
from ..swept import mean_loss, statistics
from .batch import Batch, per_row, with_shared_queue
from .formulas import Formula
from .gathered import agreed, gathered_mean, has_gradient, statistics_of
from .options import LossOptions
from .summary import LossStats, summary

LossResult = Tensor | tuple[Tensor, LossStats]  # a tuple with return_stats


def scalar(name: str, value: float | Tensor, rows: Batch) -> Tensor:
    """The value as a 0-dimensional tensor in the dtype of the logits."""
    dtype = accumulation_dtype(rows.anchors.values, rows.others().values, rows.positives, rows.hard_negatives)
    return scalar_tensor(name, value, rows.anchors.values.device, dtype)


def inverse_temperature(temperature: float | Tensor, rows: Batch) -> Tensor:
    if isinstance(temperature, Tensor):
        return 1 / scalar("temperature", temperature, rows)
    return scalar("temperature", 1 / temperature, rows)


def reduced_loss(
    rows: Batch,
    scale: Tensor,
    formula: Formula,
    options: LossOptions,
    weights: Tensor | None = None,
    return_stats: bool = False,
) -> LossResult:
    """The formula's terms from one sweep, times the weights, reduced over the rows that count.

    return_stats: also return a summary of the same sweep.
    """
    world, rows, weights, unit = opened(rows, options, weights, return_stats)
    problem = posed(rows, formula.scales(scale), formula.wanted(), options, return_stats)
    if world is not None:
        share: LossResult = _of_all(world, problem, rows, scale, formula, options, weights, unit)
        return share
    loss, observed = _loss(problem, rows, scale, formula, options, weights)
    return loss if observed is None else (loss, summary_of(problem, observed, rows, scale, options))


def opened(
    rows: Batch, options: LossOptions, weights: Tensor | None, return_stats: bool
) -> tuple[World | None, Batch, Tensor | None, float | Tensor | None]:
    """Checks what a call combines. Returns processes, rows, their weights [R], and what these are divided by."""
    world = World.of(options.gather, options.group)
    unit: float | Tensor | None = None
    try:
        check_flag("return_stats", return_stats)
        if options.symmetric and rows.contrasts is None:
            raise ValueError("symmetric: expected False for self-contrast (contrasts=None), got True")
        if options.symmetric and options.reduction == "none":
            n, m = rows.anchors.values.shape[0], rows.others().values.shape[0]
            if m != n:
                message = f"expected 'mean' or 'sum' for symmetric with {n} anchors and {m} contrasts, got 'none'"
                raise ValueError(f"reduction: {message}")
        if weights is not None:
            check_vector("weights", weights, rows.shape[0], rows.anchors.values.device)
            weights, unit = at_unit(weights, rows.dtype(), options.reduction)
            weights = per_row(weights, rows.views)
        if world is not None and options.symmetric:
            rows = with_shared_queue(rows, world.rank, world.size, options.reduction)
    except Exception as error:
        tell_others(options.gather, error, rows.anchors.values, group=options.group)
        raise
    return world, rows, weights, unit


def posed(rows: Batch, scales: Tensor, want: tuple[str, ...], options: LossOptions, observe: bool) -> Problem:
    return Problem(
        rows.anchors, rows.contrasts, rows.positives, scales, want, options.symmetric, observe=observe,
        hard_negatives=rows.hard_negatives,
    )  # fmt: skip


def _loss(
    problem: Problem, rows: Batch, scale: Tensor, formula: Formula, options: LossOptions, weights: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The loss, and the observed statistics or None."""
    if formula.mean_of_differences() and options.reduction == "mean" and weights is None:
        found = mean_loss(problem)  # the same formula as below, in one node of autograd's graph
        if found is not None:
            return found[0].to(rows.dtype()), found[1]
    stats, observed = statistics(problem, formula.exact(), quotients=True)
    loss = _reduce(*formula.terms(stats, scale), weights, options.reduction, rows)
    if stats.reverse is not None:
        reverse = _reduce(*formula.terms(stats.reverse, scale), None, options.reduction, rows)
        loss = (loss + reverse) / 2
    return loss, observed


@torch.no_grad()
def summary_of(
    problem: Problem,
    observed: Tensor,
    rows: Batch,
    scale: Tensor,
    options: LossOptions,
    world: World | None = None,
) -> LossStats:
    total = None if world is None else world.total
    n = rows.anchors.values.shape[0]

    def of_rows(start: int, end: int | None, shape: tuple[int, ...]) -> LossStats:
        return summary(observed[..., start:end], scale.detach(), shape, options.reduction, rows.dtype(), total)

    found = of_rows(0, n, rows.shape)
    return found._replace(reverse=of_rows(n, None, (observed.shape[-1] - n,))) if problem.both else found


@uncompiled  # processes could compile different graphs, with collectives that do not match
def _of_all(
    world: World,
    problem: Problem,
    rows: Batch,
    scale: Tensor,
    formula: Formula,
    options: LossOptions,
    weights: Tensor | None,
    unit: float | Tensor | None,
) -> LossResult:
    """This process's share of the loss over all processes' rows, times the number of processes.

    The mean over processes is then the loss. With reduction "none", the unscaled terms of the process's own rows. With
    `Problem.observe` also the summary over all rows.

    unit: what the weights were divided by.
    """
    alike: dict[str, Property] = {
        **{name: value if isinstance(value, str) else float(value) for name, value in formula._asdict().items()},
        "reduction": options.reduction,
        "weights given": weights is not None,
        "weights with a gradient": has_gradient(weights),
    }
    travelling = agreed(world, options.gather, problem, rows, type(formula).__name__, alike, problem.family)
    if formula.mean_of_differences() and options.reduction == "mean" and weights is None:
        found = gathered_mean(world, travelling, problem)
        if found is not None:
            return found.to(rows.dtype())
    stats, observed = statistics_of(world, travelling, problem, rows, formula.exact())
    sides = [(*formula.terms(stats, scale), weights)]
    if stats.reverse is not None:
        sides.append((*formula.terms(stats.reverse, scale), None))
    totals: list[Any] = [None] * len(sides)
    if options.reduction == "mean":  # one collective for both directions; float64, so that row counts are exact
        masses = []
        for k, (terms, counted, of_rows) in enumerate(sides):
            mass = _mass(counted, of_rows).double()
            # A term that is NaN or infinite makes the mean NaN in all processes.
            masses.append((mass if unit is None or k else mass * unit) + _nan_of(terms, counted))
        totals = list(world.total(torch.stack(masses)).unbind())
        if unit is not None:
            totals[0] = totals[0] / unit
        totals = [total.to(rows.dtype()) for total in totals]
    shares = [_reduce(*side, options.reduction, rows, total) for side, total in zip(sides, totals, strict=True)]
    share = shares[0] if len(shares) == 1 else (shares[0] + shares[1]) / 2
    share = share if options.reduction == "none" else share * world.size
    return share if observed is None else (share, summary_of(problem, observed, rows, scale, options, world))


def _reduce(
    terms: Tensor, counted: Tensor, weights: Tensor | None, reduction: str, rows: Batch, total: Tensor | None = None
) -> Tensor:
    """The terms of the rows that count, weighted and reduced.

    total: what the mean divides by; None for the `_mass` of these rows.
    """
    terms = torch.where(counted, terms, 0).to(rows.dtype())
    if weights is not None:
        terms = terms * weights
    if reduction == "none":
        return terms.reshape(rows.shape)
    if reduction == "sum":
        return terms.sum()
    total = _mass(counted, weights) if total is None else total
    if weights is None:
        return terms.sum() / total.clamp(min=1)
    return terms.sum() / torch.where(total == 0, 1, total)


def _nan_of(terms: Tensor, counted: Tensor) -> Tensor:
    """[]: NaN if a term that counts is not finite, else 0. It has no gradient."""
    return torch.where(counted, terms.detach() * 0, 0).sum()


# If the largest weight is in this range, the sum of the weights and its inverse stay in float32's range.
ORDINARY_WEIGHTS = 1e-20, 1e20


def at_unit(weights: Tensor, dtype: torch.dtype, reduction: str) -> tuple[Tensor, float | Tensor | None]:
    """Checked weights [N] in `dtype`, and the power of two that they are divided by, or None.

    They are divided only for a mean, which depends on nothing but ratios of weights.
    """
    values = weights.detach().double()
    if values_visible(weights) and weights.shape[0]:
        least, most = (float(value) for value in values.aminmax())
        if not (least >= 0 and most < math.inf):
            bad = values[~((values >= 0) & values.isfinite())][0].item()
            raise ValueError(f"weights: expected finite numbers of at least 0, got {bad}")
        if reduction != "mean" and most > torch.finfo(dtype).max:
            raise ValueError(
                f"weights: expected numbers in the range of {dtype} with reduction={reduction!r}, got {most}"
            )
        if reduction != "mean" or most == 0 or ORDINARY_WEIGHTS[0] <= most <= ORDINARY_WEIGHTS[1]:
            return weights.to(dtype), None
        unit: float | Tensor = math.ldexp(1.0, math.frexp(most)[1] - 1)
    elif reduction != "mean" or weights.shape[0] == 0:
        return weights.to(dtype), None
    else:
        _, exponent = torch.frexp(values.amax())
        unit = torch.ldexp(values.new_ones(()), exponent.clamp(-1000, 1000))
    return (weights.double() / unit).to(dtype), unit


def _mass(counted: Tensor, weights: Tensor | None) -> Tensor:
    """The number of rows that count, or the sum of their weights."""
    return counted.sum() if weights is None else (counted * weights).sum()
