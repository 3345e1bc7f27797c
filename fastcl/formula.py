"""Losses as formulas of the statistics of logits: what each asks for, the loss of a row, and how rows are reduced."""

from __future__ import annotations

import math
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .distributed import MODES, Property, World, has_gradient, statistics
from .kernels.blocks import uncompiled
from .kernels.checks import check_flag, check_option, check_vector, scalar_tensor, values_visible
from .kernels.problem import accumulation_dtype
from .kernels.stats import ContrastiveStats, Sweep
from .posing import Posed, per_row
from .summary import LossStats, summary

REDUCTIONS = ("mean", "sum", "none")
LossResult = Tensor | tuple[Tensor, LossStats]  # the latter with return_stats


class Formula(Protocol):
    """A NamedTuple of its options. No properties, as torch 2.6 does not compile those of tuples."""

    def wanted(self) -> tuple[str, ...]:
        """The statistics that `terms` asks for."""

    def mean_of_differences(self) -> bool:
        """Whether the loss of a row is lse - sum_pos / num_pos of what is wanted, and nothing else."""

    def exact(self) -> bool:
        """Whether log-sum-exps are wanted in float64, as `terms` takes the difference of their exponentials."""

    def _asdict(self) -> dict[str, Any]:
        """Its options, by name, as of a NamedTuple."""

    def scales(self, scale: Tensor) -> Tensor:
        """The logit scales at which they are wanted: [], or [S]."""

    def terms(self, stats: ContrastiveStats, scale: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of each row and whether it counts, both [R]. What one that does not holds is of no use."""


class InfoNCE(NamedTuple):
    """The table of `ClusterInfoNCE`."""

    form: str
    denominator: str
    margin: float

    def wanted(self) -> tuple[str, ...]:
        if self.form == "inside":
            return "lse_pos", "lse_neg"
        if self.denominator == "negatives":
            return "lse_neg", "sum_pos"
        return ("lse_all", "sum_pos") if self.margin == 0 else ("lse_pos", "lse_neg", "sum_pos")

    def mean_of_differences(self) -> bool:
        return self.form == "outside" and self.margin == 0

    def exact(self) -> bool:
        return False

    def scales(self, scale: Tensor) -> Tensor:
        return scale

    def terms(self, stats: ContrastiveStats, scale: Tensor) -> tuple[Tensor, Tensor]:
        counted = stats.num_pos > 0
        num_pos = stats.num_pos.clamp(min=1)
        if self.form == "outside" and self.denominator == "all" and self.margin == 0:
            assert stats.lse_all is not None
            assert stats.sum_pos is not None
            return stats.lse_all - stats.sum_pos / num_pos, counted
        if self.denominator == "negatives":
            counted = counted & (stats.num_neg > 0)
        lse_pos, lse_neg, sum_pos = _harmless(stats, counted)
        mean_pos = sum_pos / num_pos
        shift = scale * self.margin
        if self.form == "outside" and self.denominator == "negatives":
            return lse_neg - mean_pos + shift, counted
        log_ratio = lse_neg - lse_pos + shift
        if self.denominator == "all":
            # log(neg + pos) - log(pos) = log(1 + neg / pos) does not cancel as the positives come to dominate.
            log_ratio = torch.logaddexp(log_ratio, torch.zeros_like(log_ratio))
        return log_ratio + (num_pos.log() if self.form == "inside" else lse_pos - mean_pos), counted


LEAST_WEIGHT = {torch.float32: 1e-30, torch.float64: 1e-200}  # that an anchor counts with; its inverse is finite


class Weighted(NamedTuple):
    """That of `ClusterInfoNCE` with assignments: sum_pos and num_pos are sums of weights, at a scale of their own."""

    def wanted(self) -> tuple[str, ...]:
        return "lse_all", "sum_pos"

    def mean_of_differences(self) -> bool:
        return False  # num_pos has a gradient too

    def exact(self) -> bool:
        return False

    def scales(self, scale: Tensor) -> Tensor:
        return scale

    def terms(self, stats: ContrastiveStats, scale: Tensor) -> tuple[Tensor, Tensor]:
        assert stats.lse_all is not None
        assert stats.sum_pos is not None
        counted = ~(stats.num_pos < LEAST_WEIGHT[stats.num_pos.dtype])  # a row of NaN counts
        num_pos, sum_pos = torch.where(counted, stats.num_pos, 1), torch.where(counted, stats.sum_pos, 0)
        return stats.lse_all - sum_pos / num_pos, counted


class Debiased(NamedTuple):
    """Those of `DebiasedLoss` (beta = 0) and `HardNegativeLoss`, in the log domain."""

    tau_plus: float
    beta: float

    def wanted(self) -> tuple[str, ...]:
        return "lse_pos", "lse_neg", "sum_pos"

    def mean_of_differences(self) -> bool:
        return False

    def exact(self) -> bool:
        return True

    def scales(self, scale: Tensor) -> Tensor:
        return torch.stack((scale, self.beta * scale, (1 + self.beta) * scale)) if self.beta else scale

    def terms(self, stats: ContrastiveStats, scale: Tensor) -> tuple[Tensor, Tensor]:
        counted, some = stats.num_pos > 0, stats.num_neg > 0
        num_pos, log_n = stats.num_pos.clamp(min=1), stats.num_neg.clamp(min=1).log()
        lse_pos, _, sum_pos = _harmless(stats, counted)
        _, lse_neg, _ = _harmless(stats, some)
        if self.beta:
            lse_pos, sum_pos = lse_pos[0], sum_pos[0]
            lse_neg = lse_neg[2] - lse_neg[1] + log_n
        least = log_n - scale  # of N negatives, when all are opposite to the anchor
        log_ng = lse_neg
        if self.tau_plus:
            log_false = math.log(self.tau_plus) + log_n + lse_pos - num_pos.log()
            log_ng = _log_difference(lse_neg, log_false) - math.log1p(-self.tau_plus)
        log_ng = torch.maximum(log_ng, least)
        log_ratio = torch.where(some, log_ng - lse_pos, -torch.inf)
        return torch.logaddexp(log_ratio, torch.zeros_like(log_ratio)) + (lse_pos - sum_pos / num_pos), counted


def _log_difference(a: Tensor, b: Tensor) -> Tensor:
    """log(exp(a) - exp(b)), and -inf where b >= a."""
    no_less = b >= a  # False for NaN, which the result shows
    d = torch.where(no_less, -1, b - a)  # harmless, as the derivative of what is masked would be seen
    close = d > -math.log(2)
    nearly, hardly = torch.where(close, d, -0.5), torch.where(close, -1, d)
    log_rest = torch.where(close, (-nearly.expm1()).log(), (-hardly.exp()).log1p())
    return torch.where(no_less, -torch.inf, a + log_rest)


def _harmless(stats: ContrastiveStats, counted: Tensor) -> list[Tensor]:
    """lse_pos, lse_neg, sum_pos, harmless numbers in rows that do not count or are not wanted.

    Masking the result of a formula alone would let the NaN of its derivative through.
    """
    zero, ignored = stats.num_pos.new_zeros(()), ~counted
    fields = (stats.lse_pos, stats.lse_neg, stats.sum_pos)
    return [zero if field is None else field.masked_fill(ignored, 0) for field in fields]


# What all losses do with a formula.


class Options(NamedTuple):
    symmetric: bool
    normalize: bool
    reduction: str
    gather: bool | str = False


def check_options(symmetric: bool, normalize: bool, reduction: str, gather: bool | str) -> Options:
    check_flag("symmetric", symmetric)
    check_flag("normalize", normalize)
    check_option("reduction", reduction, REDUCTIONS)
    check_option("gather", gather, MODES)
    return Options(symmetric, normalize, reduction, gather)


def scalar(name: str, value: float | Tensor, posed: Posed) -> Tensor:
    """In the dtype of the logits."""
    dtype = accumulation_dtype(posed.anchors, posed.contrasts, posed.positives)
    return scalar_tensor(name, value, posed.anchors.device, dtype)


def inverse_temperature(temperature: float | Tensor, posed: Posed) -> Tensor:
    if isinstance(temperature, Tensor):
        return 1 / scalar("temperature", temperature, posed)
    return scalar("temperature", 1 / temperature, posed)


def reduced_loss(
    posed: Posed,
    scale: Tensor,
    formula: Formula,
    options: Options,
    contrast_bias: Tensor | None = None,
    weights: Tensor | None = None,
    return_stats: bool = False,
) -> LossResult:
    """The formula's terms out of one sweep, weighted and reduced over the rows that count.

    return_stats: also a summary for people to look at, out of the same sweep.
    """
    check_flag("return_stats", return_stats)
    if options.symmetric and posed.contrasts is None:
        raise ValueError("symmetric: expected False for self-contrast (contrasts=None), got True")
    rows = posed.anchors.shape[0]
    others = rows if posed.contrasts is None else posed.contrasts.shape[0]
    if options.symmetric and options.reduction == "none" and others != rows:
        raise ValueError(
            f"reduction: expected 'mean' or 'sum' for symmetric with {rows} anchors and {others} contrasts, got 'none'"
        )
    unit: float | Tensor | None = None
    if weights is not None:
        check_vector("weights", weights, posed.shape[0], posed.anchors.device)
        weights, unit = _at_unit(weights, posed.dtype, options.reduction)
        weights = per_row(weights, posed.views)
    sweep = Sweep(
        posed.anchors,
        posed.contrasts,
        posed.anchor_clusters,
        posed.contrast_clusters,
        formula.scales(scale),
        options.normalize,
        options.normalize and posed.contrasts is not None and not posed.as_stored,
        formula.wanted(),
        posed.positives,
        contrast_bias,
        posed.anchor_ids,
        posed.contrast_ids,
        both=options.symmetric,
        observe=return_stats,
        anchor_assignments=posed.anchor_assignments,
        contrast_assignments=posed.contrast_assignments,
        quotients=True,
    )
    world = World.of(options.gather)
    if world is not None:
        if return_stats:
            raise ValueError(f"return_stats: expected False with gather={options.gather!r} over processes, got True")
        share: Tensor = _of_all(world, sweep, posed, scale, formula, options, weights, unit)
        return share
    loss, observed = _loss(sweep, posed, scale, formula, options, weights)
    return loss if observed is None else (loss, _summary(sweep, observed, posed, scale, options))


def _loss(
    sweep: Sweep, posed: Posed, scale: Tensor, formula: Formula, options: Options, weights: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """And what was observed."""
    if formula.mean_of_differences() and options.reduction == "mean" and weights is None:
        found = sweep.mean_loss()  # the formula below in one node of autograd's graph
        if found is not None:
            return found[0].to(posed.dtype), found[1]
    stats, observed = sweep.statistics(formula.exact())
    loss = _reduce(*formula.terms(stats, scale), weights, options.reduction, posed)
    if stats.reverse is not None:
        reverse = _reduce(*formula.terms(stats.reverse, scale), None, options.reduction, posed)
        loss = (loss + reverse) / 2
    return loss, observed


@torch.no_grad()
def _summary(sweep: Sweep, observed: Tensor, posed: Posed, scale: Tensor, options: Options) -> LossStats:
    of_bias = None
    if sweep.contrast_bias is not None:  # its sums over the same sets: a sweep over rows of one number
        zeros = posed.anchors.new_zeros(len(posed.anchors), 1)
        others = None if posed.contrasts is None else posed.contrasts.new_zeros(len(posed.contrasts), 1)
        flat = sweep._replace(
            anchors=zeros, contrasts=others, positives=None, logit_scale=torch.ones_like(scale), want=(),
            normalize_anchors=False, normalize_contrasts=False,
        )  # fmt: skip
        _, of_bias = flat.statistics()
    n = len(posed.anchors)

    def of_rows(start: int, end: int | None, shape: tuple[int, ...]) -> LossStats:
        bias = None if of_bias is None else of_bias[..., start:end]
        return summary(observed[..., start:end], scale.detach(), bias, shape, options.reduction, posed.dtype)

    found = of_rows(0, n, posed.shape)
    return found._replace(reverse=of_rows(n, None, (observed.shape[-1] - n,))) if sweep.both else found


@uncompiled  # processes would have to agree upon their graphs
def _of_all(
    world: World,
    sweep: Sweep,
    posed: Posed,
    scale: Tensor,
    formula: Formula,
    options: Options,
    weights: Tensor | None,
    unit: float | Tensor | None,
) -> Tensor:
    """This process's share of the loss of all processes' rows, times their number, so that the mean is that loss.

    With reduction "none" the terms of its own rows, as they are. unit: what the weights were divided by.
    """
    alike: dict[str, Property] = {
        **{name: value if isinstance(value, str) else float(value) for name, value in formula._asdict().items()},
        "reduction": options.reduction,
        "weights given": weights is not None,
        "weights with a gradient": has_gradient(weights),
    }
    stats = statistics(world, options.gather, sweep, posed, formula.exact(), type(formula).__name__, alike)
    sides = [(*formula.terms(stats, scale), weights)]
    if stats.reverse is not None:
        sides.append((*formula.terms(stats.reverse, scale), None))
    totals: list[Any] = [None] * len(sides)
    if options.reduction == "mean":  # of both directions at once, and exact, also where they are numbers of rows
        masses = []
        for k, (terms, counted, of_rows) in enumerate(sides):
            mass = _mass(counted, of_rows).double()
            # A term that is NaN or infinite makes the mean NaN on all processes.
            masses.append((mass if unit is None or k else mass * unit) + _nan_of(terms, counted))
        totals = list(world.total(torch.stack(masses)).unbind())
        if unit is not None:
            totals[0] = totals[0] / unit
        totals = [total.to(posed.dtype) for total in totals]
    shares = [_reduce(*side, options.reduction, posed, total) for side, total in zip(sides, totals, strict=True)]
    share = shares[0] if len(shares) == 1 else (shares[0] + shares[1]) / 2
    return share if options.reduction == "none" else share * world.size


def _reduce(
    terms: Tensor, counted: Tensor, weights: Tensor | None, reduction: str, posed: Posed, total: Tensor | None = None
) -> Tensor:
    """total: what the mean divides by, where that is not the `_mass` of these rows alone."""
    terms = torch.where(counted, terms, 0).to(posed.dtype)
    if weights is not None:
        terms = terms * weights
    if reduction == "none":
        return terms.reshape(posed.shape)
    if reduction == "sum":
        return terms.sum()
    total = _mass(counted, weights) if total is None else total
    if weights is None:
        return terms.sum() / total.clamp(min=1)
    return terms.sum() / torch.where(total == 0, 1, total)


def _nan_of(terms: Tensor, counted: Tensor) -> Tensor:
    """0, or NaN if a term that counts is not finite; without a gradient."""
    return torch.where(counted, terms.detach() * 0, 0).sum()


ORDINARY_WEIGHTS = 1e-20, 1e20  # so large is the largest; neither their sum nor its inverse leaves float32's range


def _at_unit(weights: Tensor, dtype: torch.dtype, reduction: str) -> tuple[Tensor, float | Tensor | None]:
    """Checked weights [N] in `dtype`; for a mean, which has no unit, divided by a power of two that is returned.

    None: they are as they came.
    """
    values = weights.detach().double()
    if values_visible(weights) and len(weights):
        least, most = (float(value) for value in values.aminmax())
        if not (least >= 0 and most < math.inf):
            bad = values[~((values >= 0) & values.isfinite())][0].item()
            raise ValueError(f"weights: expected finite numbers of at least 0, got {bad}")
        if reduction != "mean" or most == 0 or ORDINARY_WEIGHTS[0] <= most <= ORDINARY_WEIGHTS[1]:
            return weights.to(dtype), None
        unit: float | Tensor = math.ldexp(1.0, math.frexp(most)[1] - 1)
    elif reduction != "mean" or len(weights) == 0:
        return weights.to(dtype), None
    else:
        _, exponent = torch.frexp(values.amax())
        unit = torch.ldexp(values.new_ones(()), exponent.clamp(-1000, 1000))
    return (weights.double() / unit).to(dtype), unit


def _mass(counted: Tensor, weights: Tensor | None) -> Tensor:
    """How many rows count, or their weights' sum."""
    return counted.sum() if weights is None else (counted * weights).sum()
