"""Sums of maps of pairs over all that a loss contrasts with: tensors, queues, the extra positive, other processes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ..distributed import Property, World
from ..ops.backends.rows import unit
from ..ops.contrastive.records import Problem, Rows
from ..ops.pair_maps import mapped
from ..ops.pairs.op import pair_sums, pair_total
from ..ops.pairs.records import Pairs, Sums, two_sets
from .batch import Batch
from .gathered import Travelling, agreed
from .gathered_pairs import Maps, gathered_sums, gathered_total


class Swept(NamedTuple):
    """The rows of a call, on which all processes have agreed."""

    rows: Batch
    world: World | None = None
    travelling: Travelling | None = None

    def sums(self, scale: Tensor, offset: Tensor | None, maps: Maps) -> Sums:
        """The sums of each anchor; the values are differentiable. It sweeps again for their gradient."""
        found = []
        if self.travelling is not None and self.world is not None:
            found.append(gathered_sums(self.world, self.travelling, scale, offset, maps))
        if (p := self._alone(scale, offset, maps)) is not None:
            found.append(pair_sums(p))
        if self.rows.positives is not None:
            found.append(self._extra(scale, offset, maps))
        return _added(found)

    def total(self, scale: Tensor, offset: Tensor | None, maps: Maps, weights: Tensor) -> tuple[Tensor, Sums]:
        """``sum(weights * values)`` for weights [2, R], differentiable, and the detached sums, from one sweep."""
        totals, found = [], []
        if self.travelling is not None and self.world is not None:
            total, sums = gathered_total(self.world, self.travelling, scale, offset, maps, weights)
            totals.append(total)
            found.append(sums)
        if (p := self._alone(scale, offset, maps)) is not None:
            total, *parts = pair_total(p, weights)
            totals.append(total)
            found.append(Sums(*parts))
        if self.rows.positives is not None:
            extra = self._extra(scale, offset, maps)
            totals.append((weights * extra.values).sum())
            found.append(Sums(extra.values.detach(), extra.active, extra.counts))
        return sum(totals[1:], totals[0]), _added(found)

    def _alone(self, scale: Tensor, offset: Tensor | None, maps: Maps) -> Pairs | None:
        """The problem over contrasts that do not travel; None if all do."""
        if self.travelling is None:
            anchors, contrasts = self.rows.anchors, self.rows.contrasts
            anchors, contrasts = two_sets(anchors, contrasts, _asymmetric(anchors, offset))
        elif self.travelling.stored is None:
            return None
        else:
            anchors, contrasts = self.travelling.anchors, self.travelling.stored
        return Pairs(anchors, contrasts, scale, offset, *maps)

    def _extra(self, scale: Tensor, offset: Tensor | None, maps: Maps) -> Sums:
        """The sums over the extra positive of each anchor."""
        anchors, positives = self.rows.anchors, self.rows.positives
        assert positives is not None
        x, y = (unit(v) if anchors.normalize else v.to(scale.dtype) for v in (anchors.values, positives))
        logits = scale * (x.to(scale.dtype) * y.to(scale.dtype)).sum(1)
        logits = logits if offset is None else logits + offset
        value, _ = mapped(maps.kind, logits, True, maps.pos_margin)
        ones, zeros = torch.ones_like(logits), torch.zeros_like(logits)
        return Sums(*(torch.stack((part, zeros)) for part in (value, (value != 0).to(ones.dtype), ones)))


def swept(
    world: World,
    gather: bool | str,
    rows: Batch,
    scale: Tensor,
    offset: Tensor | None,
    call: str,
    alike: Mapping[str, Property],
) -> Swept:
    """The rows of a call with `gather`, on which all processes agree here.

    call, alike: the name of the call, and further values that must be equal in all processes.
    """
    problem = Problem(rows.anchors, rows.contrasts, rows.positives, scale, ())
    found = agreed(world, gather, problem, rows, call, alike, "pair_sums")
    if found is not None:
        first = sum(found.sizes[: world.rank])
        anchors, contrasts = two_sets(found.anchors, found.contrasts, _asymmetric(found.anchors, offset), first)
        found = found._replace(anchors=anchors, contrasts=contrasts)
    return Swept(rows, world, found)


def share_of_all(
    world: World,
    totals: list[Tensor],
    masses: list[Tensor],
    unit: float | Tensor | None,
    reduction: str,
    dtype: torch.dtype,
) -> Tensor:
    """This process's share of the loss over all processes' rows, times the number of processes.

    totals: for each direction this process's weighted sum. masses: float64, what the sum over processes divides a mean
    by. unit: what the weights of the first direction were divided by.
    """
    if reduction == "mean":  # one collective for both directions
        sent = [
            mass * (1 if unit is None or k else unit)
            + (total.detach() * 0).double()  # not finite: NaN in all processes
            for k, (total, mass) in enumerate(zip(totals, masses, strict=True))
        ]
        of_all = list(world.total(torch.stack(sent)).unbind())
        if unit is not None:
            of_all[0] = of_all[0] / unit
        totals = [total / torch.where(mass == 0, 1, mass) for total, mass in zip(totals, of_all, strict=True)]
    return (average(totals) * world.size).to(dtype)


def average(sides: list[Tensor]) -> Tensor:
    """The mean of one direction or of both."""
    return sides[0] if len(sides) == 1 else (sides[0] + sides[1]) / 2


def _asymmetric(anchors: Rows, offset: Tensor | None) -> bool:
    return anchors.bias is not None or (offset is not None and offset.dim() == 1)


def _added(found: list[Sums]) -> Sums:
    return found[0] if len(found) == 1 else Sums(*(sum(parts[1:], parts[0]) for parts in zip(*found, strict=True)))


def reversed_rows(rows: Batch) -> tuple[Batch, Tensor | None]:
    """The contrasts of two sets as anchors and the anchors as contrasts; and the bias, which becomes an offset."""
    contrasts = rows.others()
    left = _without_bias(contrasts)
    parts = ((rows.anchors.values.shape[0], False),)
    # torch 2.6 cannot compile _replace.
    return Batch(left, rows.anchors, None, rows.shape, rows.views, rows.by_sample, rows.aligned, parts), contrasts.bias


def _without_bias(rows: Rows) -> Rows:
    """The rows without their bias; the values of those that it leaves out become 0."""
    values, clusters, ids, bias, assignments, *_, normalize = rows
    if bias is not None:
        values = values.masked_fill((bias == -torch.inf)[:, None], 0)
    return Rows(values, clusters, ids, None, assignments, normalize=normalize)
