"""The specification of the pair sums in plain PyTorch. It stores every logit or distance."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends.rows import inverse_norms, through_normalization
from ..pair_maps import mapped
from .records import Gradients, Needs, Pairs, Sums


def sweep(p: Pairs, weights: Tensor | None, needs: Needs) -> tuple[Sums, Gradients]:
    """The sums and, with weights [2, N], the needed gradients of ``sum(weights * values)``."""
    x, y, a, c = _rows(p)
    similarity = x @ y.T
    if p.of_distance:
        t = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")  # the product would lose digits near 0
    else:
        t = p.logit_scale * similarity
        t = t if p.offset is None else t + p.offset.reshape(-1, 1)
        t = t if p.bias is None else t + p.bias.masked_fill(p.bias == -torch.inf, 0)
    values, active, counts, slope = [], [], [], torch.zeros_like(t)
    for k, members in enumerate(_sets(p)):
        value, derivative = mapped(p.kind, t, k == 0, p.margins[k])
        value = torch.where(members, value, 0)
        values.append(value.sum(1))
        active.append((value != 0).sum(1))
        counts.append(members.sum(1))
        if weights is not None:
            slope = slope + torch.where(members, derivative, 0) * weights[k, :, None]
    sums = Sums(*(torch.stack(found).to(p.dtype) for found in (values, active, counts)))
    return sums, Gradients() if weights is None else _gradients(p, needs, x, y, a, c, similarity, t, slope)


def _gradients(
    p: Pairs, needs: Needs, x: Tensor, y: Tensor, a: Tensor, c: Tensor, similarity: Tensor, t: Tensor, slope: Tensor
) -> Gradients:
    """slope: dL/dt [N, M]."""
    if p.of_distance:  # the derivative of |x - y| in x is (x - y) / |x - y|, and 0 for equal rows
        by_distance = torch.where(t == 0, 0, slope / t)
        apart = x[:, None] - y
        dx, dy = (by_distance[..., None] * apart).sum(1), (by_distance[..., None] * -apart).sum(0)
    else:
        dx, dy = p.logit_scale * slope @ y, p.logit_scale * slope.T @ x
    if p.contrasts is None:
        dx = dx + dy
    elif p.others.normalize:
        dy = through_normalization(dy, y, c)
    of_offset = slope.sum(1, dtype=torch.float64)
    dx = through_normalization(dx, x, a) if p.anchors.normalize else dx
    return Gradients(
        dx.to(p.dtype),
        None if p.contrasts is None else dy.to(p.dtype),
        (slope * similarity).sum(dtype=torch.float64),
        None if p.offset is None else of_offset if p.offset.dim() else of_offset.sum(),
        None if p.bias is None else slope.sum(0).to(p.dtype),
    )


def _rows(p: Pairs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Anchors and contrasts as they enter the product, and their inverse norms; [0] for rows that keep their norms."""

    def entering(rows: Tensor, normalize: bool) -> tuple[Tensor, Tensor]:
        inverse = inverse_norms(rows) if normalize else rows.new_empty(0)
        return rows * inverse[:, None] if normalize else rows, inverse

    dtype = torch.float64 if p.of_distance else p.dtype  # rounded unit rows would lose digits of small distances
    x, a = entering(p.anchors.values.to(dtype), p.anchors.normalize)
    if p.contrasts is None:
        return x, x, a, x.new_empty(0)
    y = p.contrasts.values.to(dtype)
    if p.bias is not None:
        y = y.masked_fill((p.bias == -torch.inf)[:, None], 0)  # these rows may hold NaN
    y, c = entering(y, p.others.normalize)
    return x, y, a, c


def _sets(p: Pairs) -> tuple[Tensor, Tensor]:
    """The masks [N, M] of positives and of negatives."""
    n, m = p.sizes
    if p.contrasts is None:
        admissible = ~torch.eye(n, dtype=torch.bool, device=p.device)
    else:
        admissible = ~_equal(p.anchors.ids, p.others.ids, n, m, p.device)
    if p.bias is not None:
        admissible = admissible & (p.bias != -torch.inf)
    positive = admissible & _equal(p.anchors.clusters, p.others.clusters, n, m, p.device)
    return positive, torch.zeros_like(positive) if p.only_positives else admissible & ~positive


def _equal(left: Tensor | None, right: Tensor | None, n: int, m: int, device: torch.device) -> Tensor:
    if left is None or right is None:
        return torch.zeros(n, m, dtype=torch.bool, device=device)
    return (left[:, None] == right[None, :]) & (left != -1)[:, None]
