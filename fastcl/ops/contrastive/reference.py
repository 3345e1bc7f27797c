"""The specification in code: it stores every logit, makes every set a mask and writes the gradient out.

Memory is O(S N M). The other backends are tested against it in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends.rows import inverse_norms, through_normalization
from .backend import merge_planes as merge_planes
from .backend import plane_count as plane_count
from .backend import planes as planes
from .backend import saved_size as saved_size
from .fields import TABLE
from .observed import observe
from .records import Gradients, Needs, Problem, Side, Statistics, empty_side, over_sets, pair_weights


def forward(p: Problem) -> Statistics:
    x, y, a, c = _rows(p)
    plain = p.logit_scale[:, None, None] * (x @ y.T)
    logits = _biased(p, plain)
    sets = _sets(p)
    anchors = _reduce(p, logits, plain, sets)
    transposed = {field: members.T for field, members in sets.items()}
    contrasts = _reduce(p, logits.mT, plain.mT, transposed) if p.both else empty_side(p)
    return Statistics(anchors, contrasts, a, c, p.logit_scale.new_empty(0))


def backward(p: Problem, saved: Statistics, grad: Tensor, grad_contrasts: Tensor, needs: Needs) -> Gradients:
    """The gradients, from those of the anchors' fields [W, S, N] and, with `both`, of the contrasts' [W, S, M]."""
    grad = over_sets(p, grad, saved.anchors.counts)
    if p.both:
        grad_contrasts = over_sets(p, grad_contrasts, saved.contrasts.counts)
    x, y, a, c = _rows(p)
    similarity = x @ y.T  # [N, M]
    logits = _biased(p, p.logit_scale[:, None, None] * similarity)
    sets = _sets(p)
    g = _logit_gradient(p, logits, sets, saved.anchors.parts, grad)  # [S, N, M]
    if p.both:
        transposed = {field: members.T for field, members in sets.items()}
        g = g + _logit_gradient(p, logits.mT, transposed, saved.contrasts.parts, grad_contrasts).mT
    dt = (p.logit_scale[:, None, None] * g).sum(0)
    dx, dy = dt @ y, dt.T @ x
    if p.contrasts is None:
        dx = dx + dy
    elif p.others.normalize:
        dy = through_normalization(dy, y, c)
    return Gradients(
        through_normalization(dx, x, a) if p.anchors.normalize else dx,
        None if p.contrasts is None else dy,
        (g * similarity).sum((1, 2), dtype=torch.float64),  # terms cancel as training converges
        g.sum((0, 1)) if needs.bias else None,
    )


def _rows(p: Problem) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Anchors and contrasts as they enter the product, and their inverse norms; [0] for rows that keep their norms."""
    x = p.anchors.values.to(p.dtype)
    a = inverse_norms(x) if p.anchors.normalize else x.new_empty(0)
    x = x * a[:, None] if p.anchors.normalize else x
    if p.contrasts is None:
        return x, x, a, x.new_empty(0)
    y = p.contrasts.values.to(p.dtype)
    if (left_out := p.left_out) is not None:
        y = y.masked_fill(left_out[:, None], 0)  # these rows may hold NaN
    c = inverse_norms(y) if p.others.normalize else y.new_empty(0)
    return x, y * c[:, None] if p.others.normalize else y, a, c


def _biased(p: Problem, logits: Tensor) -> Tensor:
    """The logits [S, N, M] plus the bias."""
    return logits if p.others.bias is None else logits + p.others.bias


def _sets(p: Problem) -> dict[str, Tensor]:
    """The mask [N, M] of each field's set: A, P or N = A without P. With assignments sum_pos has weights instead."""
    own, other = p.anchors, p.others
    _, n, m = p.sizes

    def equal(left: Tensor | None, right: Tensor | None) -> Tensor:
        if left is None or right is None:
            return torch.zeros(n, m, dtype=torch.bool, device=p.device)
        return (left[:, None] == right[None, :]) & (left != -1)[:, None]

    admissible = ~(equal(own.ids, other.ids) & ~equal(own.samples, other.samples))
    if p.contrasts is None:
        admissible = admissible & ~torch.eye(n, dtype=torch.bool, device=p.device)
    if own.groups is not None:
        admissible = admissible & equal(own.groups, other.groups)
    if (left_out := p.left_out) is not None:
        admissible = admissible & ~left_out
    if own.assignments is not None and other.assignments is not None:
        r, q = own.assignments.to(p.dtype), other.assignments.to(p.dtype)
        return {"lse_all": admissible, "sum_pos": torch.where(admissible, pair_weights(r, q), 0)}
    positive = equal(own.clusters, other.clusters)
    if own.tags is not None and other.tags is not None:
        positive = positive | ((own.tags[:, None] & other.tags[None, :]) != 0).any(-1)
    if own.guide is not None and other.guide is not None and own.thresholds is not None:
        guide, others = (
            rows.to(p.dtype) * inverse_norms(rows.to(p.dtype))[:, None] for rows in (own.guide, other.guide)
        )
        admissible = admissible & (positive | ~(guide @ others.T > own.thresholds[:, None]))
    positive = positive & admissible
    return {"lse_all": admissible, "lse_pos": positive, "lse_neg": admissible & ~positive, "sum_pos": positive}


def _reduce(p: Problem, logits: Tensor, plain: Tensor, sets: dict[str, Tensor]) -> Side:
    """plain: the logits without their bias."""
    fields, shifts, sums = [], [], []
    for field in p.want:
        if not TABLE[field].log_sum:
            fields.append(torch.where(sets[field] != 0, sets[field] * logits, 0).sum(-1))
            continue
        members = logits.masked_fill(~sets[field], -torch.inf)
        shift = _largest(members)
        total = (members - shift[..., None]).exp().sum(-1)
        fields.append(shift + total.log())
        shifts.append(shift)
        sums.append(total)
    positives, admissible = sets["sum_pos"].sum(-1), sets["lse_all"].sum(-1)
    others = admissible - positives if p.anchors.assignments is None else admissible
    counts = torch.stack([positives.to(p.dtype), others.to(p.dtype)])
    empty = logits.new_empty((0, *logits.shape[:2]))
    return Side(
        torch.stack(fields) if fields else empty,
        counts,
        torch.stack([torch.stack(shifts), torch.stack(sums)]) if sums else torch.stack([empty, empty]),
        observe(logits, sets["lse_pos"], sets["lse_neg"], plain) if p.observe else None,
    )


def _largest(members: Tensor) -> Tensor:
    """The maximum over the last dimension; 0 if that is -inf, so that exp(-inf - shift) is 0."""
    if members.shape[-1] == 0:
        return members.new_zeros(members.shape[:-1])
    largest = members.amax(-1)
    return largest.masked_fill(largest == -torch.inf, 0)


def _logit_gradient(p: Problem, logits: Tensor, sets: dict[str, Tensor], parts: Tensor, grad: Tensor) -> Tensor:
    """dL/ds [S, N, M]. Terms of softmax and of positives are added here, before any rounding to the rows' dtype."""
    g = torch.zeros_like(logits)
    for k, field in enumerate(p.want):
        if not TABLE[field].log_sum:
            g = g + grad[k][..., None] * sets[field]
            continue
        shift, total = parts[:, p.log_sums.index(field)]
        weight = torch.where(total == 0, 0, grad[k] / total)
        members = logits.masked_fill(~sets[field], -torch.inf)
        g = g + weight[..., None] * (members - shift[..., None]).exp()
    return g
