"""Adds H more negatives of each anchor, contrasts of that anchor only, to any backend's statistics.

It costs O(N H D). It is part of the operator so that its gradient and the sweep's are added in the dtype of the sums
and rounded once to the dtype of the rows, as in `extra_positive`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..backends.rows import inverse_norms, through_normalization
from .fields import POSITIVES, TABLE
from .observed import merge, observe
from .records import Gradients, Needs, Problem, Side, Statistics


def join(p: Problem, statistics: Statistics) -> Statistics:
    """The statistics with logit_scale * <x_i, h_ik> among the negatives of anchor i."""
    if p.hard_negatives is None or p.hard_negatives.shape[1] == 0:
        return statistics
    similarity = _pairs(p, p.hard_negatives, statistics.anchor_inverse_norms).similarity
    logits = p.logit_scale[:, None, None] * similarity  # [S, N, H]
    side = statistics.anchors
    fields, shifts, sums = [], [], []
    for k, field in enumerate(p.want):
        joins = TABLE[field].over != POSITIVES
        if not TABLE[field].log_sum:
            fields.append(side.fields[k] + logits.sum(-1) if joins else side.fields[k])
            continue
        shift, total = side.parts[:, p.log_sums.index(field)]
        if joins:
            nothing = total == 0  # the shift of an empty sum is undefined; a NaN sum is not 0 and stays NaN
            most = logits.amax(-1)
            larger = torch.where(nothing, most, torch.maximum(shift, most))
            own = (logits - larger[..., None]).exp().sum(-1)
            total = torch.where(nothing, 0, total * (shift - larger).exp()) + own
            shift = larger
        fields.append(shift + total.log())
        shifts.append(shift)
        sums.append(total)
    positives, negatives = side.counts
    observed = side.observed
    if observed is not None:
        negative = torch.ones_like(similarity, dtype=torch.bool)
        observed = merge(observed, observe(logits, ~negative, negative))
    joined = Side(
        torch.stack(fields) if fields else side.fields,
        torch.stack([positives, negatives + similarity.shape[1]]),
        torch.stack([torch.stack(shifts), torch.stack(sums)]) if sums else side.parts,
        observed,
    )
    return statistics._replace(anchors=joined)


def add_gradients(p: Problem, saved: Statistics, grad: Tensor, needs: Needs, sweep: Gradients) -> Gradients:
    """The sweep's gradients plus those through the hard negatives. grad: [W, S, N], of the joined fields."""
    if p.hard_negatives is None:
        return sweep
    if p.hard_negatives.shape[1] == 0:
        return sweep._replace(hard_negatives=torch.zeros_like(p.hard_negatives) if needs.hard_negatives else None)
    x, y, b, similarity = _pairs(p, p.hard_negatives, saved.anchor_inverse_norms)
    logits = p.logit_scale[:, None, None] * similarity
    g = torch.zeros_like(logits)
    for k, field in enumerate(p.want):
        if TABLE[field].over == POSITIVES:
            continue
        if not TABLE[field].log_sum:
            g = g + grad[k][..., None]
        else:
            shift, total = saved.anchors.parts[:, p.log_sums.index(field)]
            g = g + (grad[k] / total)[..., None] * (logits - shift[..., None]).exp()
    of_scale = (g * similarity).double().sum((1, 2))
    dt = (p.logit_scale[:, None, None] * g).sum(0)  # [N, H]
    anchors, negatives = torch.einsum("nh,nhd->nd", dt, y), None
    if needs.hard_negatives:
        negatives = dt[..., None] * x[:, None]
    if p.anchors.normalize:
        anchors = through_normalization(anchors, x, saved.anchor_inverse_norms)
        if negatives is not None:
            flat = through_normalization(negatives.flatten(0, 1), y.flatten(0, 1), b.flatten())
            negatives = flat.view_as(y)
    return sweep._replace(
        anchors=None if sweep.anchors is None else sweep.anchors + anchors,
        hard_negatives=negatives,
        logit_scale=None if sweep.logit_scale is None else sweep.logit_scale.double() + of_scale,
    )


class _Pairs(NamedTuple):
    """Each anchor and its hard negatives."""

    x: Tensor  # [N, D], normalised if the anchors are
    y: Tensor  # [N, H, D], likewise
    inverse_norms: Tensor  # [N, H], of the negatives; [0] if they are not normalised
    similarity: Tensor  # [N, H]


def _pairs(p: Problem, negatives: Tensor, anchor_inverse_norms: Tensor) -> _Pairs:
    x, y = p.anchors.values.to(p.dtype), negatives.to(p.dtype)
    inverse = y.new_empty(0)
    if p.anchors.normalize:
        inverse = inverse_norms(y.flatten(0, 1)).view(y.shape[:2])
        x, y = x * anchor_inverse_norms[:, None], y * inverse[..., None]
    return _Pairs(x, y, inverse, torch.einsum("nd,nhd->nh", x, y))
