"""The sum of the logits over all admissible contrasts. It is linear in the contrasts, so it needs no tile.

The sum of s_ij over A_i is scale * <x_i, T_i> + B_i, where T_i and B_i are the sums of the rows y_j and of their biases
over A_i. These are the sums over all contrasts, minus the anchor itself in self-contrast, or minus the contrasts with
the anchor's sample id. That adds O((N + M) D) to the sweep on any backend. Backends never see the field: `without`
removes it from the wanted fields, `add` and `add_gradients` put it back.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..backends.rows import accumulation_dtype, inverse_norms, through_normalization
from .fields import TABLE
from .records import Gradients, Needs, Problem, Rows, Side, Statistics

FIELD = "sum_all"


def without(p: Problem) -> Problem:
    """The problem without the field, as backends see it."""
    if FIELD not in p.want:
        return p
    return replace(p, want=[name for name in p.want if TABLE[name].swept], partial=True)


def in_float32(p: Problem) -> Problem:
    """The problem with half-precision rows in float32."""

    def wide(rows: Rows) -> Rows:
        return rows._replace(values=rows.values.to(accumulation_dtype(rows.values)))

    return replace(p, anchors=wide(p.anchors), contrasts=None if p.contrasts is None else wide(p.contrasts))


def add(p: Problem, found: Statistics) -> Statistics:
    """Adds the field to the statistics of `without(p)`."""
    if FIELD not in p.want:
        return found
    sums = _Sums(p)
    bias = None if sums.bias is None else sums.over_contrasts(sums.bias[:, None])[:, 0]
    anchors = _with(p, found.anchors, sums.logits(sums.x, sums.over_contrasts(sums.y), bias))
    if not p.both:
        nothing = found.contrasts.fields.new_empty(p.sizes[0], 0)
        return found._replace(anchors=anchors, contrasts=_with(p, found.contrasts, nothing))
    bias = None if sums.bias is None else sums.bias * sums.number_of_anchors()
    contrasts = _with(p, found.contrasts, sums.logits(sums.y, sums.over_anchors(sums.x), bias))
    return found._replace(anchors=anchors, contrasts=contrasts)


def _with(p: Problem, side: Side, values: Tensor) -> Side:
    """The side with the field's values [S, N] in its place, 0 for rows without an admissible pair."""
    fields = list(side.fields.unbind(0))
    fields.insert(list(p.want).index(FIELD), _of_present(values, side))
    return side._replace(fields=torch.stack(fields))


def swept_gradient(p: Problem, grad: Tensor) -> Tensor:
    """Selects the gradients of the fields of `without(p)` from those of all fields, [W, S, N]."""
    if FIELD not in p.want:
        return grad
    return grad[[k for k, name in enumerate(p.want) if TABLE[name].swept]]


def add_gradients(
    p: Problem, saved: Statistics, grad: Tensor, grad_contrasts: Tensor, needs: Needs, swept: Gradients
) -> Gradients:
    """Adds the gradients through the field to those of `without(p)`."""
    if FIELD not in p.want:
        return swept
    place, sums = list(p.want).index(FIELD), _Sums(p)
    x, y = sums.x, sums.y
    totals = sums.over_contrasts(y)
    g = _of_present(grad[place], saved.anchors)  # [S, N]
    u = _of_similarity(p, g)
    of_x, of_y, scale = u * totals, sums.over_anchors(u * x), _of_scale(g, x, totals)
    bias = None if swept.bias is None else sums.over_anchors(g.sum(0)[:, None])[:, 0]
    if p.both:
        totals, g = sums.over_anchors(x), _of_present(grad_contrasts[place], saved.contrasts)  # [S, M]
        u = _of_similarity(p, g)
        of_x, of_y = of_x + sums.over_contrasts(u * y), of_y + u * totals
        scale = scale + _of_scale(g, y, totals)
        bias = None if bias is None else bias + g.sum(0) * sums.number_of_anchors()
    of_x, of_y = of_x.expand_as(x), of_y.expand_as(y)
    if sums.left_out is not None:
        of_y = of_y.masked_fill(sums.left_out[:, None], 0)
        bias = None if bias is None else bias.masked_fill(sums.left_out, 0)
    if p.contrasts is None:
        of_x = of_x + of_y

    def added(gradient: Tensor | None, rows: Tensor, unit: Tensor, inverse: Tensor | None) -> Tensor | None:
        if gradient is None:
            return None
        return gradient + (rows if inverse is None else through_normalization(rows, unit, inverse))

    return swept._replace(
        anchors=added(swept.anchors, of_x, x, sums.inverse_norms[0]),
        contrasts=added(swept.contrasts, of_y, y, sums.inverse_norms[1]),
        logit_scale=None if swept.logit_scale is None else swept.logit_scale.double() + scale,
        bias=None if swept.bias is None or bias is None else swept.bias + bias,
    )


def _of_present(values: Tensor, side: Side) -> Tensor:
    """The field or its gradient [S, N], 0 for rows without admissible pairs, where the field is a constant."""
    return torch.where(side.counts.sum(0) > 0, values, 0)


def _of_similarity(p: Problem, grad: Tensor) -> Tensor:
    """Gradient [N, 1] of <x_i, T_i>, from that of the field [S, N]."""
    return (p.logit_scale[:, None] * grad).sum(0)[:, None]


def _of_scale(grad: Tensor, rows: Tensor, totals: Tensor) -> Tensor:
    """Gradient [S] of the scales, float64."""
    return (grad.double() * (rows * totals).sum(1).double()).sum(1)


class _Sums:
    """The rows of a problem as they enter the logits, and sums over the rows with which each is admissible."""

    def __init__(self, p: Problem) -> None:
        self.p, self.left_out = p, p.left_out
        self.x, own = _entering(p, p.anchors, None)
        self.y, other = self.x, own
        if p.contrasts is not None or self.left_out is not None:
            self.y, other = _entering(p, p.others, self.left_out)
        self.inverse_norms = own, other
        bias = p.others.bias
        self.bias = bias if bias is None or self.left_out is None else bias.masked_fill(self.left_out, 0)

    def logits(self, rows: Tensor, totals: Tensor, bias: Tensor | None) -> Tensor:
        """The field [S, N]. rows: [N, D]. totals, bias: T [N or 1, D] and B [N or 1]."""
        found = self.p.logit_scale[:, None] * (rows * totals).sum(1)
        return found if bias is None else found + bias

    def over_contrasts(self, values: Tensor) -> Tensor:
        """For each anchor the sum of values [M, K] over its contrasts: [N, K], or [1, K] if it is the same for all."""
        return self._over(values, self.p.anchors.ids, self.p.others.ids)

    def over_anchors(self, values: Tensor) -> Tensor:
        """For each contrast the sum of values [N, K] over its anchors: [M, K] or [1, K]."""
        return self._over(values, self.p.others.ids, self.p.anchors.ids)

    def number_of_anchors(self) -> Tensor:
        """The number of anchors of each contrast, [M] or [1]."""
        return self.over_anchors(self.x.new_ones(len(self.x), 1))[:, 0]

    def _over(self, values: Tensor, own: Tensor | None, other: Tensor | None) -> Tensor:
        if own is None or other is None:
            total = values.sum(0, keepdim=True, dtype=torch.float64)
            return (total - values if self.p.contrasts is None else total).to(values.dtype)
        # A row of NaN reaches the sums of the rows that meet it, but not of those with its id: NaN - NaN is not 0.
        bad = values.isnan().any(1, keepdim=True)
        columns = torch.cat((values.masked_fill(bad, 0), bad.to(values.dtype)), 1)
        sums = columns.sum(0, keepdim=True, dtype=torch.float64) - _of_equal_ids(columns, own, other)
        return sums[:, :-1].masked_fill(sums[:, -1:] > 0.5, torch.nan).to(values.dtype)


def _entering(p: Problem, rows: Rows, left_out: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Rows as they enter the logits, and their inverse norms, or None if they are not normalised."""
    values = rows.values.to(p.dtype)
    if left_out is not None:  # these rows may hold NaN
        values = values.masked_fill(left_out[:, None], 0)
    if not rows.normalize:
        return values, None
    inverse = inverse_norms(values)
    return values * inverse[:, None], inverse


def _of_equal_ids(values: Tensor, own: Tensor, other: Tensor) -> Tensor:
    """For each of the own ids [N] the sum of the values [M, K] with the same id, float64 [N, K]. -1 equals nothing.

    It uses no atomic additions, so that results are reproducible, and never waits for the device.
    """
    if len(other) == 0:
        return values.new_zeros(len(own), values.shape[1], dtype=torch.float64)
    order = other.argsort(stable=True)
    known = other[order]
    first, end = torch.searchsorted(known, known), torch.searchsorted(known, known, right=True)
    lengths = torch.where(first == torch.arange(len(known), device=known.device), end - first, 0)
    sums = torch.segment_reduce(values[order].double(), "sum", lengths=lengths, axis=0, unsafe=True, initial=0)
    place = torch.searchsorted(known, own.contiguous()).clamp(max=len(known) - 1)
    return torch.where(((known[place] == own) & (own != -1))[:, None], sums[place], 0)
