"""The gradient of soft assignments, the same for every backend. The gradient of the weights of pairs has low rank.

The gradient of w_ij = <r_i, q_j> is H_ij = (g_i + g'_j) s_ij + h_i + h'_j. Here g is the gradient of sum_pos and h that
of num_pos; a prime marks those of the reverse direction. The logits are s_ij = <u_i, v_j>: u and v are the rows as they
enter the logits, with one more column for the bias. So H = L K^T with L = [g u, h, u, 1] and K = [v, 1, g' v, h'].
The assignments' gradients are L (K^T Q) and K (L^T R), minus the terms of inadmissible pairs: O((N + M) C D). As
training converges, s_ij and the mean in h_i cancel. All of it is float64, so only the digits that h_i has lost before
are lost.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..backends.rows import inverse_norms
from ..contrastive.records import Problem

BLOCK = 1 << 20  # numbers in a block of a factor
FEW = 16  # a sample id with more contrasts is subtracted as a product of factors, not pair by pair
Index = slice | Tensor


class _Factor(NamedTuple):
    """The factor L or K, whose rows are computed when they are needed."""

    rows: Tensor  # [N, D]
    normalize: bool
    scale: Tensor | None  # [], the logit scale, which u includes; None for v
    end: Tensor | None  # [N], the last column of u or v; None: ones
    sums: Tensor | None  # [N], g or g'; None: zeros, and their columns are omitted
    weights: Tensor | None  # [N], h or h'; None likewise
    own_first: bool  # True for L = [g u, h, u, 1], False for K = [v, 1, g' v, h']
    other: bool  # whether the other side has gradients; if not, the columns that they multiply are omitted

    def at(self, index: Index) -> Tensor:
        rows = self.rows[index].double()
        if self.normalize:
            rows = rows * inverse_norms(rows)[:, None]
        if self.scale is not None:
            rows = rows * self.scale
        ones = rows.new_ones(len(rows), 1)
        rows = torch.cat((rows, ones if self.end is None else self.end[index, None].double()), 1)
        parts = [rows, ones] if self.other else []
        if self.sums is not None and self.weights is not None:
            own = [rows * self.sums[index, None], self.weights[index, None]]
            parts = own + parts if self.own_first else parts + own
        return torch.cat(parts, 1)

    def blocks(self) -> Iterator[slice]:
        step = max(BLOCK // self.rows.shape[1], 1)
        return (slice(i, i + step) for i in range(0, len(self.rows), step))


def assignment_gradients(
    p: Problem, grad: Tensor, grad_contrasts: Tensor, needs: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the anchors' assignments [N, C] and of the contrasts' assignments [M, C], float64.

    grad: [2, N], of the anchors' sum_pos and num_pos. grad_contrasts: with `both` of the contrasts', [2, M].
    """
    assert p.anchors.assignments is not None
    self_contrast = p.contrasts is None
    if not (needs[0] or needs[1]):
        return None, None
    sums, weights = grad.double()
    other_sums, other_weights = grad_contrasts.double() if p.both else (None, None)
    y, _, _, bias, q, *_, normalize = p.others
    assert q is not None
    scale = p.logit_scale.double()[0]
    bias = y.new_zeros(len(y)) if bias is None else bias
    left_out = p.left_out
    if left_out is not None:  # their pairs have weight 0, and their rows may hold NaN
        bias, q = bias.masked_fill(left_out, 0), q.masked_fill(left_out[:, None], 0)
        y = y if self_contrast else y.masked_fill(left_out[:, None], 0)
    left = _Factor(p.anchors.values, p.anchors.normalize, scale, None, sums, weights, True, p.both)
    right = _Factor(y, normalize, None, bias, other_sums, other_weights, False, True)
    ids = (p.anchors.ids, p.others.ids)
    dr = dq = None
    if needs[0] or self_contrast:
        dr = _product(left, right, q)
        _take_off_equal(dr, left, right, q, ids)
    if needs[1] or self_contrast:
        dq = _product(right, left, p.anchors.assignments)
        _take_off_equal(dq, right, left, p.anchors.assignments, ids[::-1])
        if left_out is not None:
            dq.masked_fill_(left_out[:, None], 0)
    if not self_contrast:
        return dr, dq
    assert dr is not None
    assert dq is not None
    dr += dq
    for block in left.blocks():
        own = (left.at(block) * right.at(block)).sum(1, keepdim=True)
        dr[block] -= 2 * own * q[block]
    return dr, None


def _product(left: _Factor, right: _Factor, assignments: Tensor) -> Tensor:
    """L (K^T Q) [N, C], or K (L^T R) with the factors exchanged."""
    result = assignments.new_zeros(len(left.rows), assignments.shape[1], dtype=torch.float64)
    if len(right.rows):
        total = _total(right, right.blocks(), assignments)
        for block in left.blocks():
            result[block] = left.at(block) @ total
    return result


def _total(right: _Factor, blocks: Iterable[Index], assignments: Tensor) -> Tensor:
    """K^T Q [K's columns, C], summed over the rows of the blocks; there must be a block."""
    total = assignments.new_zeros((), dtype=torch.float64)
    for block in blocks:
        total = total + right.at(block).T @ assignments[block].double()
    return total


def _take_off_equal(
    gradient: Tensor, left: _Factor, right: _Factor, assignments: Tensor, ids: tuple[Tensor | None, Tensor | None]
) -> None:
    """Subtracts from gradient_i the sum of <L_i, K_j> q_j over all j with the sample id of i.

    Ids with at most `FEW` contrasts are subtracted pair by pair, the k-th contrast of all of them at once. The others,
    of which there cannot be many, are subtracted id by id, each as a product of factors.
    """
    own, other = ids
    if own is None or other is None or len(own) == 0 or len(other) == 0:
        return
    order = other.argsort(stable=True)
    known = other[order]
    first = torch.searchsorted(known, own)
    count = (torch.searchsorted(known, own, right=True) - first).masked_fill(own == -1, 0)
    step = max(BLOCK // left.rows.shape[1], 1)
    frequent = count > FEW
    few = count.masked_fill(frequent, 0)
    for k in range(int(few.max())):
        for i in (few > k).nonzero()[:, 0].split(step):
            j = order[first[i] + k]
            pairs = (left.at(i) * right.at(j)).sum(1, keepdim=True)
            gradient[i] -= pairs * assignments[j]
    rows = frequent.nonzero()[:, 0]
    rows = rows[first[rows].argsort(stable=True)]
    starts, sizes = first[rows].unique_consecutive(return_counts=True)
    lengths = count[rows][sizes.cumsum(0) - 1]
    of_ids = rows.split(sizes.tolist())
    for members, start, length in zip(of_ids, starts.tolist(), lengths.tolist(), strict=True):
        total = _total(right, order[start : start + length].split(step), assignments)
        for i in members.split(step):
            gradient[i] -= left.at(i) @ total
