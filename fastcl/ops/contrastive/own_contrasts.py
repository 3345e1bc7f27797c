"""Contrasts of one anchor alone: one more positive (MoCo's key) and hard negatives, for any backend's statistics.

They cost O(N H D). They are part of the operator so that their gradients and the sweep's are added in the dtype of the
sums and rounded once to the dtype of the rows. Products are written as sums, so that no matmul precision applies.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..backends.rows import inverse_norms, through_normalization
from .fields import NEGATIVES, POSITIVES, TABLE
from .observed import merge, observe
from .records import Gradients, Needs, Problem, Side, Statistics


class _Own(NamedTuple):
    """The contrasts of one kind, and their logits without the scale."""

    name: str  # of `Problem` and `Gradients`
    apart: str  # fields over this set do not include them
    x: Tensor  # [N, D], the anchors, normalised if they are
    y: Tensor  # [N, H, D], likewise
    inverse_norms: Tensor  # [N, H], of the contrasts; [0] if they are not normalised
    similarity: Tensor  # [N, H]

    def joins(self, field: str) -> bool:
        return TABLE[field].over != self.apart


def _own(p: Problem, anchor_inverse_norms: Tensor) -> list[_Own]:
    kinds = []
    if p.positives is not None:
        kinds.append(("positives", NEGATIVES, p.positives[:, None]))
    if p.hard_negatives is not None and p.hard_negatives.shape[1]:
        kinds.append(("hard_negatives", POSITIVES, p.hard_negatives))
    found = []
    for name, apart, rows in kinds:
        x, y = p.anchors.values.to(p.dtype), rows.to(p.dtype)
        inverse = y.new_empty(0)
        if p.anchors.normalize:
            inverse = inverse_norms(y.flatten(0, 1)).view(y.shape[:2])
            x, y = x * anchor_inverse_norms[:, None], y * inverse[..., None]
        found.append(_Own(name, apart, x, y, inverse, (x[:, None] * y).sum(-1)))
    return found


def join(p: Problem, statistics: Statistics) -> Statistics:
    """The statistics with logit_scale * <x_i, y_ik> of the anchor's own contrasts."""
    for own in _own(p, statistics.anchor_inverse_norms):
        statistics = statistics._replace(anchors=_joined(p, statistics.anchors, own))
    return statistics


def _joined(p: Problem, side: Side, own: _Own) -> Side:
    logits = p.logit_scale[:, None, None] * own.similarity  # [S, N, H]
    fields, shifts, sums = [], [], []
    for k, field in enumerate(p.want):
        joins = own.joins(field)
        if not TABLE[field].log_sum:
            fields.append(side.fields[k] + logits.sum(-1) if joins else side.fields[k])
            continue
        shift, total = side.parts[:, p.log_sums.index(field)]
        if joins:
            nothing, most = total == 0, logits.amax(-1)  # the shift of an empty sum is undefined; NaN is not 0
            larger = torch.where(nothing, most, torch.maximum(shift, most))
            there = torch.where(nothing, 0, total * (shift - larger).exp())
            total = there + (logits - larger[..., None]).exp().sum(-1)
            shift = larger
        fields.append(shift + total.log())
        shifts.append(shift)
        sums.append(total)
    counts = side.counts.clone()
    counts[0 if own.apart == NEGATIVES else 1] += own.similarity.shape[1]
    observed = side.observed
    if observed is not None:
        positive = torch.full_like(own.similarity, own.apart == NEGATIVES, dtype=torch.bool)
        observed = merge(observed, observe(logits, positive, ~positive))
    return Side(
        torch.stack(fields) if fields else side.fields,
        counts,
        torch.stack([torch.stack(shifts), torch.stack(sums)]) if sums else side.parts,
        observed,
    )


def add_gradients(p: Problem, saved: Statistics, grad: Tensor, needs: Needs, sweep: Gradients) -> Gradients:
    """The sweep's gradients plus those through the own contrasts. grad: [W, S, N], of the joined fields."""
    if p.hard_negatives is not None and needs.hard_negatives:  # there may be none
        sweep = sweep._replace(hard_negatives=torch.zeros_like(p.hard_negatives))
    for own in _own(p, saved.anchor_inverse_norms):
        logits = p.logit_scale[:, None, None] * own.similarity
        g = torch.zeros_like(logits)
        for k, field in enumerate(p.want):
            if not own.joins(field):
                continue
            if not TABLE[field].log_sum:
                g = g + grad[k][..., None]
            else:
                shift, total = saved.anchors.parts[:, p.log_sums.index(field)]
                g = g + (grad[k] / total)[..., None] * (logits - shift[..., None]).exp()
        of_scale = (g * own.similarity).double().sum((1, 2))  # cancels against the sweep's as training converges
        dt = (p.logit_scale[:, None, None] * g).sum(0)[..., None]  # [N, H, 1]
        anchors = sweep.anchors
        if anchors is not None:
            towards = (dt * own.y).sum(1)
            if p.anchors.normalize:
                towards = through_normalization(towards, own.x, saved.anchor_inverse_norms)
            anchors = anchors + towards
        rows = None
        if getattr(needs, own.name):
            rows = dt * own.x[:, None]
            if p.anchors.normalize:
                flat = rows.flatten(0, 1), own.y.flatten(0, 1), own.inverse_norms.flatten()
                rows = through_normalization(*flat).view_as(own.y)
            rows = rows[:, 0] if own.name == "positives" else rows
        scale = None if sweep.logit_scale is None else sweep.logit_scale.double() + of_scale
        sweep = sweep._replace(anchors=anchors, logit_scale=scale, **{own.name: rows})
    return sweep
