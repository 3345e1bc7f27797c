"""Adds one more positive of each anchor, a contrast of that anchor only (MoCo's key), to any backend's statistics.

It costs O(N D). It is part of the operator so that its gradient and the sweep's are added in the dtype of the sums and
rounded once to the dtype of the rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..backends.rows import inverse_norms, through_normalization
from .fields import NEGATIVES, TABLE
from .observed import merge, one_positive
from .records import Gradients, Needs, Problem, Side, Statistics


def join(p: Problem, statistics: Statistics) -> Statistics:
    """The statistics with logit_scale * <x_i, p_i> among the positives of anchor i."""
    if p.positives is None:
        return statistics
    similarity = _pairs(p, p.positives, statistics.anchor_inverse_norms).similarity
    logits = p.logit_scale[:, None] * similarity  # [S, N]
    side = statistics.anchors
    fields, shifts, sums = [], [], []
    for k, field in enumerate(p.want):
        joins = TABLE[field].over != NEGATIVES
        if not TABLE[field].log_sum:
            fields.append(side.fields[k] + logits if joins else side.fields[k])
            continue
        shift, total = side.parts[:, p.log_sums.index(field)]
        if joins:
            nothing = total == 0  # the shift of an empty sum is undefined; a NaN sum is not 0 and stays NaN
            larger = torch.where(nothing, logits, torch.maximum(shift, logits))
            total = torch.where(nothing, 0, total * (shift - larger).exp()) + (logits - larger).exp()
            shift = larger
        fields.append(shift + total.log())
        shifts.append(shift)
        sums.append(total)
    positives, negatives = side.counts
    joined = Side(
        torch.stack(fields) if fields else side.fields,
        torch.stack([positives + 1, negatives]),
        torch.stack([torch.stack(shifts), torch.stack(sums)]) if sums else side.parts,
        None if side.observed is None else merge(side.observed, one_positive(logits)),
    )
    return statistics._replace(anchors=joined)


def add_gradients(p: Problem, saved: Statistics, grad: Tensor, needs: Needs, sweep: Gradients) -> Gradients:
    """The sweep's gradients plus those through the extra positive. grad: [W, S, N], of the joined fields."""
    if p.positives is None:
        return sweep
    x, y, b, similarity = _pairs(p, p.positives, saved.anchor_inverse_norms)
    logits = p.logit_scale[:, None] * similarity
    g = torch.zeros_like(logits)
    for k, field in enumerate(p.want):
        if TABLE[field].over == NEGATIVES:
            continue
        if not TABLE[field].log_sum:
            g = g + grad[k]
        else:
            shift, total = saved.anchors.parts[:, p.log_sums.index(field)]
            g = g + grad[k] / total * (logits - shift).exp()
    of_scale = (g * similarity).double().sum(1)  # cancels against the sweep's as training converges
    dt = (p.logit_scale[:, None] * g).sum(0)[:, None]  # [N, 1]

    def rows(towards: Tensor, unit: Tensor, inverse: Tensor) -> Tensor:
        return through_normalization(dt * towards, unit, inverse) if p.anchors.normalize else dt * towards

    return sweep._replace(
        anchors=None if sweep.anchors is None else sweep.anchors + rows(y, x, saved.anchor_inverse_norms),
        positives=rows(x, y, b) if needs.positives else None,
        logit_scale=None if sweep.logit_scale is None else sweep.logit_scale.double() + of_scale,
    )


class _Pairs(NamedTuple):
    """Each anchor and its extra positive."""

    x: Tensor  # [N, D], normalised if the anchors are
    y: Tensor  # [N, D], likewise
    inverse_norms: Tensor  # [N], of the positives; [0] if they are not normalised
    similarity: Tensor  # [N]


def _pairs(p: Problem, positives: Tensor, anchor_inverse_norms: Tensor) -> _Pairs:
    x, y = p.anchors.values.to(p.dtype), positives.to(p.dtype)
    inverse = y.new_empty(0)
    if p.anchors.normalize:
        inverse = inverse_norms(y)
        x, y = x * anchor_inverse_norms[:, None], y * inverse[:, None]
    return _Pairs(x, y, inverse, (x * y).sum(1))
