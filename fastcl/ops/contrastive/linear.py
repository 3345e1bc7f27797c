"""Sums of logits over all admissible contrasts: linear in the contrasts, so they need no sweep.

The sum of s_ij over A_i is scale * <x_i, T_i> + B_i, where T_i and B_i are the sums of the rows y_j and of their biases
over A_i: the sums over all contrasts, less the anchor itself in self-contrast, or less the contrasts of the anchor's
sample id. That is O((N + M) D) on any backend. Backends never see these fields: `without` takes them out of what is
wanted, `add` and `add_gradients` put them back.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..backends.rows import inverse_norms, through_normalization
from .fields import TABLE
from .records import Gradients, Needs, Problem, Rows, Side, Statistics

FIELD = "sum_all"


def without(p: Problem) -> Problem:
    """The problem as a backend sees it."""
    if FIELD not in p.want:
        return p
    return replace(p, want=[name for name in p.want if TABLE[name].swept], partial=True)


def add(p: Problem, found: Statistics) -> Statistics:
    """The statistics of `without(p)` with the field."""
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
    """The side with the field's values [S, N] in its place."""
    fields = list(side.fields.unbind(0))
    fields.insert(list(p.want).index(FIELD), values)
    return side._replace(fields=torch.stack(fields))


def swept_gradient(p: Problem, grad: Tensor) -> Tensor:
    """Of the gradients [W, S, N] of the fields, those of `without(p)`."""
    if FIELD not in p.want:
        return grad
    return grad[[k for k, name in enumerate(p.want) if TABLE[name].swept]]


def add_gradients(
    p: Problem, saved: Statistics, grad: Tensor, grad_contrasts: Tensor, needs: Needs, swept: Gradients
) -> Gradients:
    """The gradients of `without(p)` with those of the field."""
    if FIELD not in p.want:
        return swept
    place, sums = list(p.want).index(FIELD), _Sums(p)
    x, y = sums.x, sums.y
    totals = sums.over_contrasts(y)
    g = _of_present(grad[place], saved.anchors)  # [S, N]
    u = _of_similarity(p, g)
    of_x, of_y, scale = u * totals, sums.over_anchors(u * x), _of_scale(g, x, totals)
    bias = sums.over_anchors(g.sum(0)[:, None])[:, 0]
    if p.both:
        totals, g = sums.over_anchors(x), _of_present(grad_contrasts[place], saved.contrasts)  # [S, M]
        u = _of_similarity(p, g)
        of_x, of_y = of_x + sums.over_contrasts(u * y), of_y + u * totals
        scale, bias = scale + _of_scale(g, y, totals), bias + g.sum(0) * sums.number_of_anchors()
    of_x, of_y = of_x.expand_as(x), of_y.expand_as(y)
    if sums.left_out is not None:
        of_y, bias = of_y.masked_fill(sums.left_out[:, None], 0), bias.masked_fill(sums.left_out, 0)
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
        bias=None if swept.bias is None else swept.bias + bias,
    )


def _of_present(grad: Tensor, side: Side) -> Tensor:
    """0 where no pair is admissible: the field is a constant there."""
    return torch.where(side.counts.sum(0) > 0, grad, 0)


def _of_similarity(p: Problem, grad: Tensor) -> Tensor:
    """Gradient [N, 1] of the similarity of each row with the sum of rows that it meets, from that of the field."""
    return (p.logit_scale[:, None] * grad).sum(0)[:, None]


def _of_scale(grad: Tensor, rows: Tensor, totals: Tensor) -> Tensor:
    return (grad.double() * (rows * totals).sum(1).double()).sum(1)


class _Sums:
    """The rows of a problem as they enter the logits, and sums over the rows that each may meet."""

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
        """[S, N] of rows [N, D], of the sums [N or 1, D] of the rows that they meet, and of those rows' biases."""
        found = self.p.logit_scale[:, None] * (rows * totals).sum(1)
        return found if bias is None else found + bias

    def over_contrasts(self, values: Tensor) -> Tensor:
        """Of each anchor the sum of values [M, K] over its contrasts: [N, K], or [1, K] if all have the same."""
        return self._over(values, self.p.anchors.ids, self.p.others.ids)

    def over_anchors(self, values: Tensor) -> Tensor:
        """Of each contrast the sum of values [N, K] over the anchors that meet it."""
        return self._over(values, self.p.others.ids, self.p.anchors.ids)

    def number_of_anchors(self) -> Tensor:
        """Of each contrast, [M] or [1]."""
        return self.over_anchors(self.x.new_ones(len(self.x), 1))[:, 0]

    def _over(self, values: Tensor, own: Tensor | None, other: Tensor | None) -> Tensor:
        total = values.sum(0, keepdim=True, dtype=torch.float64)
        if self.p.contrasts is None:
            return (total - values).to(values.dtype)
        if own is None or other is None:
            return total.to(values.dtype)
        return (total - _of_equal_ids(values, own, other)).to(values.dtype)


def _entering(p: Problem, rows: Rows, left_out: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Rows as they enter the logits, and their inverse norms, None where they are taken as they are."""
    values = rows.values.to(p.dtype)
    if left_out is not None:  # whatever these rows hold, NaN too, reaches no sum
        values = values.masked_fill(left_out[:, None], 0)
    if not rows.normalize:
        return values, None
    inverse = inverse_norms(values)
    return values * inverse[:, None], inverse


def _of_equal_ids(values: Tensor, own: Tensor, other: Tensor) -> Tensor:
    """For each of the own ids [N] the sum, in float64, of values [M, K] whose id [M] is the same; -1 equals nothing.

    Without atomic additions, so that results are reproducible, and without asking the device how many ids there are.
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
