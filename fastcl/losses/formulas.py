"""Losses as formulas of the statistics of logits: the statistics that each needs, and the loss of a row."""

from __future__ import annotations

import math
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..swept import ContrastiveStats
from .options import LossOptions


class Formula(Protocol):
    """A NamedTuple of options. It has methods, not properties: torch 2.6 cannot compile properties of tuples."""

    def wanted(self) -> tuple[str, ...]:
        """The statistics that `terms` asks for."""

    def mean_of_differences(self) -> bool:
        """Whether the loss of a row is lse - sum_pos / num_pos, where lse is the first wanted field."""

    def exact(self) -> bool:
        """Whether `terms` needs log-sum-exps in float64, because it subtracts their exponentials."""

    def _asdict(self) -> dict[str, Any]:
        """The options by name (a method of every NamedTuple)."""

    def scales(self, scale: Tensor) -> Tensor:
        """The logit scales of the statistics: [], or [S]."""

    def terms(self, stats: ContrastiveStats, scale: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of each row and whether it counts, both [R]. Losses of other rows are undefined."""


class InfoNCE(NamedTuple):
    """The formulas of `ClusterInfoNCE`."""

    form: str
    denominator: str
    margin: float
    label_smoothing: float = 0.0

    def wanted(self) -> tuple[str, ...]:
        if self.form == "inside":
            return "lse_pos", "lse_neg"
        if self.denominator == "negatives":
            return "lse_neg", "sum_pos"
        if self.label_smoothing:
            return "lse_all", "lse_neg", "sum_pos", "sum_all"
        return "lse_all" if self.margin == 0 else "lse_pos", "lse_neg", "sum_pos"

    def mean_of_differences(self) -> bool:
        return self.form == "outside" and self.margin == 0 and self.label_smoothing == 0

    def exact(self) -> bool:
        return False

    def scales(self, scale: Tensor) -> Tensor:
        return scale

    def terms(self, stats: ContrastiveStats, scale: Tensor) -> tuple[Tensor, Tensor]:
        counted = stats.num_pos > 0
        num_pos = stats.num_pos.clamp(min=1)
        if self.denominator == "negatives":
            counted = counted & (stats.num_neg > 0)
        lse_all, lse_pos, lse_neg, sum_pos = _harmless(stats, counted)
        mean_pos = sum_pos / num_pos
        shift = scale * self.margin
        if self.form == "outside" and self.denominator == "negatives":
            return lse_neg - mean_pos + shift, counted
        if self.form == "inside":
            log_ratio = lse_neg - lse_pos + shift
            return (log1p_exp(log_ratio) if self.denominator == "all" else log_ratio) + num_pos.log(), counted
        single = stats.num_pos == 1
        if self.margin == 0:
            log_ratio = lse_neg.masked_fill(~single, 0) - sum_pos.masked_fill(~single, 0)
            loss = torch.where(single, log1p_exp(log_ratio) + _not_finite(sum_pos), lse_all - mean_pos)
            if self.label_smoothing:
                assert stats.sum_all is not None
                mean_all = stats.sum_all.masked_fill(~counted, 0) / (num_pos + stats.num_neg)
                loss = torch.lerp(loss, lse_all - mean_all, self.label_smoothing)
            return loss, counted
        log_ratio = lse_neg - torch.where(single, sum_pos, lse_pos) + shift
        return log1p_exp(log_ratio) + torch.where(single, _not_finite(sum_pos), lse_pos - mean_pos), counted


def infonce(options: LossOptions) -> InfoNCE:
    """The formula that a loss's options choose."""
    return InfoNCE(options.form, options.denominator, options.margin, options.label_smoothing)


LEAST_WEIGHT = {torch.float32: 1e-30, torch.float64: 1e-200}  # of an anchor that counts; its inverse is finite


class Weighted(NamedTuple):
    """`ClusterInfoNCE` with assignments: sum_pos and num_pos are sums of weights with a common factor."""

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
    """`DebiasedLoss` (beta = 0) and `HardNegativeLoss`, in the log domain."""

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
        _, lse_pos, _, sum_pos = _harmless(stats, counted)
        _, _, lse_neg, _ = _harmless(stats, some)
        if self.beta:
            lse_pos, sum_pos = lse_pos[0], sum_pos[0]
            lse_neg = lse_neg[2] - lse_neg[1] + log_n
        single = stats.num_pos == 1
        lse_pos = torch.where(
            single, sum_pos + (lse_pos - sum_pos).detach(), lse_pos
        )  # the value of lse_pos, the gradient of sum_pos
        least = log_n - scale  # of N negatives, when all are opposite to the anchor
        log_ng = lse_neg
        if self.tau_plus:
            log_false = math.log(self.tau_plus) + log_n + lse_pos - num_pos.log()
            log_ng = _log_difference(lse_neg, log_false) - math.log1p(-self.tau_plus)
        log_ng = torch.maximum(log_ng, least)
        log_ratio = torch.where(some, log_ng - lse_pos, -torch.inf)
        rest = torch.where(single, _not_finite(sum_pos), lse_pos - sum_pos / num_pos)
        return log1p_exp(log_ratio) + rest, counted


def _log_difference(a: Tensor, b: Tensor) -> Tensor:
    """log(exp(a) - exp(b)), and -inf where b >= a."""
    no_less = b >= a  # False for NaN, which the result shows
    d = torch.where(no_less, -1, b - a)  # finite, because masked values still reach the derivative
    close = d > -math.log(2)
    nearly, hardly = torch.where(close, d, -0.5), torch.where(close, -1, d)
    log_rest = torch.where(close, (-nearly.expm1()).log(), (-hardly.exp()).log1p())
    return torch.where(no_less, -torch.inf, a + log_rest)


def log1p_exp(log_ratio: Tensor) -> Tensor:
    """log(1 + neg / pos), which does not cancel as the positives dominate; log(neg + pos) - log(pos) would.

    The logit of a single positive is its log-sum-exp too. Formulas use the logit, so its gradient is the small quotient
    neg / (neg + pos) itself; as 1 - p it would cancel.
    """
    return torch.logaddexp(log_ratio, torch.zeros_like(log_ratio))


def _not_finite(sum_pos: Tensor) -> Tensor:
    """0, or NaN if the sum is not finite, so that an infinite logit does not give a loss of 0. No derivative."""
    return sum_pos.detach() * 0


def _harmless(stats: ContrastiveStats, counted: Tensor) -> list[Tensor]:
    """lse_all, lse_pos, lse_neg, sum_pos; 0 in rows that do not count, and 0 for fields that are not wanted.

    Masking only the result of a formula would still give NaN derivatives.
    """
    zero, ignored = stats.num_pos.new_zeros(()), ~counted
    fields = (stats.lse_all, stats.lse_pos, stats.lse_neg, stats.sum_pos)
    return [zero if field is None else field.masked_fill(ignored, 0) for field in fields]
