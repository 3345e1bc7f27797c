"""``ClusterInfoNCE(form="pairs")``: a mean over pairs of an anchor and a positive, each against the anchor's negatives.

The first sweep gives the log-sum-exp over the negatives of each row. The second visits only tiles with positives: it
adds up log(1 + exp(lse_neg_i - s_ip)), a map of the pair once lse_neg_i is an offset of its row.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..distributed import Property, World
from ..ops.contrastive.records import Rows
from ..ops.library import uncompiled
from ..ops.pair_maps import FAR
from ..swept import ContrastiveStats, statistics
from .batch import Batch
from .gathered import gathered_statistics, has_gradient
from .gathered_pairs import Maps
from .options import LossOptions
from .pair_sums import Swept, average, reversed_rows, share_of_all, swept
from .reduce import LossResult, opened, posed, summary_of

POSITIVES = Maps("softplus", only_positives=True)
WANTED = ("lse_neg",)


class _Side(NamedTuple):
    """One direction: anchors over contrasts, or contrasts over anchors."""

    rows: Swept
    stats: ContrastiveStats
    scale: Tensor
    margin: float
    bias: Tensor | None  # [R], of the rows of this side
    weights: Tensor | None  # [R]

    def offset(self) -> Tensor:
        """[R]: added to the logits s_ip, it gives s_ip - margin - lse_neg_i."""
        assert self.stats.lse_neg is not None
        # Rows without negatives have terms of 0.
        offset = -self.stats.lse_neg.masked_fill(self.stats.num_neg == 0, -FAR) - self.scale * self.margin
        return offset if self.bias is None else offset + self.bias.masked_fill(self.bias == -torch.inf, 0)

    def terms(self) -> Tensor:
        """[R]: each anchor's mean over its positives, 0 where it has none."""
        sums = self.rows.sums(self.scale, self.offset(), POSITIVES).values[0] * (self.stats.num_neg > 0)
        terms = sums.masked_fill(self.stats.num_pos == 0, 0) / self.stats.num_pos.clamp(min=1)
        terms = terms.to(self.rows.rows.dtype())
        return terms if self.weights is None else terms * self.weights

    def total(self) -> Tensor:
        """[]: the weighted sum over all pairs."""
        counted = ((self.stats.num_pos > 0) & (self.stats.num_neg > 0)).to(self.scale.dtype)
        of_rows = counted if self.weights is None else counted * self.weights.to(self.scale.dtype)
        total, _ = self.rows.total(
            self.scale, self.offset(), POSITIVES, torch.stack((of_rows, of_rows.new_zeros(1).expand_as(of_rows)))
        )
        return total

    def mass(self) -> Tensor:
        """[], float64: the weighted number of pairs."""
        count = self.stats.num_pos.double()
        return (count if self.weights is None else count * self.weights.double()).sum()


def pair_form_loss(
    rows: Batch, scale: Tensor, options: LossOptions, weights: Tensor | None, return_stats: bool
) -> LossResult:
    """The loss of `ClusterInfoNCE` in the form "pairs"."""
    world, rows, weights, unit = opened(rows, options, weights, return_stats)
    rows = _wide(rows)
    if world is not None:
        share: LossResult = _of_all(world, rows, scale, options, weights, unit, return_stats)
        return share
    problem = posed(rows, scale, WANTED, options, return_stats)
    stats, observed = statistics(problem)
    sides = [_Side(Swept(rows), stats, scale, options.margin, None, weights)]
    if stats.reverse is not None:
        other, bias = reversed_rows(rows)
        sides.append(_Side(Swept(other), stats.reverse, scale, options.margin, bias, None))
    loss = average([_reduced(side, options.reduction, rows) for side in sides])
    return loss if observed is None else (loss, summary_of(problem, observed, rows, scale, options))


def _wide(rows: Batch) -> Batch:
    """Half-precision rows as float32: gradients of two sweeps cancel, and must be added before they are rounded."""

    def wide(values: Tensor) -> Tensor:
        return values.float() if values.dtype.itemsize == 2 else values

    def side(given: Rows) -> Rows:
        values, clusters, ids, bias, assignments, *_, normalize = given
        return Rows(wide(values), clusters, ids, bias, assignments, normalize=normalize)

    contrasts = None if rows.contrasts is None else side(rows.contrasts)
    positives = None if rows.positives is None else wide(rows.positives)
    # torch 2.6 cannot compile _replace.
    return Batch(
        side(rows.anchors), contrasts, positives, rows.shape, rows.views, rows.by_sample, rows.aligned, rows.parts,
        shared=rows.shared,
    )  # fmt: skip


def _reduced(side: _Side, reduction: str, rows: Batch) -> Tensor:
    if reduction == "none":
        return side.terms().reshape(rows.shape)
    if reduction == "sum":
        return side.total().to(rows.dtype())
    mass = side.mass()
    return (side.total() / torch.where(mass == 0, 1, mass)).to(rows.dtype())


@uncompiled  # processes could compile different graphs, with collectives that do not match
def _of_all(
    world: World,
    rows: Batch,
    scale: Tensor,
    options: LossOptions,
    weights: Tensor | None,
    unit: float | Tensor | None,
    return_stats: bool,
) -> LossResult:
    """This process's share of the loss over all processes' rows, times the number of processes.

    With reduction "none", the unscaled terms of the process's own rows. unit: what the weights were divided by.
    """
    alike: dict[str, Property] = {
        "margin": float(options.margin),
        "reduction": options.reduction,
        "weights given": weights is not None,
        "weights with a gradient": has_gradient(weights),
    }
    problem = posed(rows, scale, WANTED, options, return_stats)
    stats, observed = gathered_statistics(world, options.gather, problem, rows, False, "InfoNCE of pairs", alike)
    found = swept(world, options.gather, rows, scale, stats.lse_neg, "pairs", alike)
    sides = [_Side(found, stats, scale, options.margin, None, weights)]
    if stats.reverse is not None:
        other, bias = reversed_rows(rows)
        found = swept(world, options.gather, other, scale, stats.reverse.lse_neg, "pairs, reversed", alike)
        sides.append(_Side(found, stats.reverse, scale, options.margin, bias, None))
    if options.reduction == "none":
        share = average([_reduced(side, "none", rows) for side in sides])
    else:
        totals, masses = [side.total() for side in sides], [side.mass() for side in sides]
        share = share_of_all(world, totals, masses, unit, options.reduction, rows.dtype())
    return share if observed is None else (share, summary_of(problem, observed, rows, scale, options, world))
