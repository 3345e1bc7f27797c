"""Plain PyTorch in blocks of rows, on any device. Memory O((N + M) (D + block)); the logits are never stored whole.

Forward and backward use the same blocks and multiply the same rows, so their logits are bitwise equal, and softmax
weights sum to one for logits of any size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..backends.rows import CPU_BLOCK, FEWEST_ROWS, GPU_BLOCK, inverse_norms, through_normalization
from . import rules
from .backend import merge_planes as merge_planes
from .backend import plane_count as plane_count
from .backend import planes as planes
from .backend import saved_size as saved_size
from .observed import merge, nothing, observe
from .records import Gradients, Needs, Problem, Side, Statistics, empty_side, over_sets, pair_weights

# So many times the least exponential, a sum has lost nothing that matters to terms below it.
FAR_ABOVE = 1e12


class _Tile(NamedTuple):
    rows: slice
    similarity: Tensor  # [B, M]
    logits: Tensor  # [S, B, M], -inf where inadmissible
    inadmissible: Tensor | None  # [B, M], but for the diagonal; None: nothing, or the diagonal alone
    positive: Tensor | None  # [B, M], bool, or the weights of assignments; None: there are no positives


def forward(p: Problem) -> Statistics:
    x, y, a, c = _rows(p)
    _, n, m = p.sizes
    anchors = _Accumulator(p, n, dim=-1)
    contrasts = _Accumulator(p, m, dim=-2) if p.both else None
    for tile in _tiles(p, x, y):
        anchors.add(tile, tile.rows)
        if contrasts is not None:
            contrasts.add(tile, slice(0, m))
    return Statistics(
        anchors.result(), empty_side(p) if contrasts is None else contrasts.result(), a, c, p.logit_scale.new_empty(0)
    )


def backward(p: Problem, saved: Statistics, grad: Tensor, grad_contrasts: Tensor, needs: Needs) -> Gradients:
    """Gradients from those of the anchors' fields [W, S, N] and, with `both`, of the contrasts' fields [W, S, M]."""
    grad = over_sets(p, grad, saved.anchors.counts)
    if p.both:
        grad_contrasts = over_sets(p, grad_contrasts, saved.contrasts.counts)
    x, y, _, _ = _rows(p, saved)
    self_contrast = p.contrasts is None
    dx = torch.zeros_like(x) if needs.anchors else None
    dy = torch.zeros_like(y) if needs.contrasts and not self_contrast else dx if self_contrast else None
    # float64: the extra positive's part is added later, and the two cancel as training converges.
    d_scale = torch.zeros_like(p.logit_scale, dtype=torch.float64) if needs.logit_scale else None
    d_bias = y.new_zeros(y.shape[0]) if needs.bias else None
    rows = _side_gradient(p, saved.anchors, grad)
    columns = _side_gradient(p, saved.contrasts, grad_contrasts) if p.both else None
    for tile in _tiles(p, x, y):
        g = _add_logit_gradient(None, p, tile, rows, tile.rows, -1)
        if columns is not None:
            g = _add_logit_gradient(g, p, tile, columns, slice(None), -2)
        if d_scale is not None:
            d_scale += (g * tile.similarity).sum((1, 2), dtype=torch.float64)
        if d_bias is not None:
            d_bias += g.sum((0, 1))
        dt = g.mul_(p.logit_scale[:, None, None]).sum(0) if g.shape[0] > 1 else g[0].mul_(p.logit_scale)
        if dx is not None:
            dx[tile.rows].addmm_(dt, y)
        if dy is not None:
            dy.addmm_(dt.T, x[tile.rows])
    if dx is not None and p.anchors.normalize:
        dx = through_normalization(dx, x, saved.anchor_inverse_norms)
    if dy is not None and not self_contrast and p.others.normalize:
        dy = through_normalization(dy, y, saved.contrast_inverse_norms)
    return Gradients(dx, None if self_contrast else dy, d_scale, d_bias)


def block_rows(p: Problem) -> int:
    """The number of rows in a block of logits, at least FEWEST_ROWS."""
    s, _, m = p.sizes
    block = CPU_BLOCK if p.device.type == "cpu" else GPU_BLOCK
    return max(block // max(s * m, 1), FEWEST_ROWS)


def _rows(p: Problem, saved: Statistics | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Anchors and contrasts in the accumulation dtype, normalised if wanted, and their inverse norms."""

    def prepare(rows: Tensor, normalize: bool, known: Tensor | None) -> tuple[Tensor, Tensor]:
        rows = rows.to(p.dtype)
        if not normalize:
            return rows, rows.new_empty(0)
        inverse = inverse_norms(rows) if known is None else known
        return rows * inverse[:, None], inverse

    x, a = prepare(p.anchors.values, p.anchors.normalize, saved and saved.anchor_inverse_norms)
    if p.contrasts is None:
        return x, x, a, x.new_empty(0)
    contrasts = p.contrasts.values
    if (left_out := p.left_out) is not None:
        contrasts = contrasts.masked_fill(
            left_out[:, None], 0
        )  # no value of these rows, NaN included, enters a product
    y, c = prepare(contrasts, p.others.normalize, saved and saved.contrast_inverse_norms)
    return x, y, a, c


def _tiles(p: Problem, x: Tensor, y: Tensor) -> Iterator[_Tile]:
    _, n, _ = p.sizes
    step, left_out, guides = block_rows(p), p.left_out, rules.guide_rows(p)
    own = None if p.anchors.assignments is None else p.anchors.assignments.to(p.dtype)
    others = None if p.others.assignments is None else p.others.assignments.to(p.dtype)
    for start in range(0, n, step):
        rows = slice(start, min(start + step, n))
        similarity = x[rows] @ y.T
        logits = similarity * p.logit_scale[:, None, None]
        if p.others.bias is not None:
            logits += p.others.bias
        if own is not None and others is not None:
            positive: Tensor | None = pair_weights(own[rows], others)
        else:
            positive = rules.positives(p, rows)
        inadmissible = rules.inadmissible(p, rows, positive, guides)
        if left_out is not None:
            everywhere = left_out.repeat(len(similarity), 1)
            inadmissible = everywhere if inadmissible is None else inadmissible | everywhere
        if p.contrasts is None:
            for matrix, value in ((logits, -torch.inf), (positive, False), (inadmissible, False)):
                if matrix is not None:
                    matrix.diagonal(offset=start, dim1=-2, dim2=-1).fill_(value)
        if inadmissible is not None:
            logits.masked_fill_(inadmissible, -torch.inf)
            if positive is not None:
                positive.masked_fill_(inadmissible, 0)
        yield _Tile(rows, similarity, logits, inadmissible, positive)


def _members(field: str, tile: _Tile) -> Tensor:
    """The logits of the field's set, -inf elsewhere: [S, B, M]."""
    if field == "lse_all" or (field == "lse_neg" and tile.positive is None):
        return tile.logits
    if tile.positive is None:
        return torch.full_like(tile.logits, -torch.inf)
    if field == "lse_neg":
        return torch.where(tile.positive, -torch.inf, tile.logits)
    return torch.where(tile.positive, tile.logits, -torch.inf)


class _Accumulator:
    """Accumulates statistics of `size` rows (reducing dim -1) or columns (reducing dim -2) over tiles."""

    def __init__(self, p: Problem, size: int, dim: int) -> None:
        s, n, m = p.sizes
        self.p = p
        self.dim = dim
        self.pairs = (m if dim == -1 else n) - (p.contrasts is None)  # pairs of a row, inadmissible ids included
        new = p.logit_scale.new_zeros
        self.sum_pos = new(s, size)
        self.positives, self.inadmissible = new(size), new(size)
        self.shifts = new(len(p.log_sums), s, size).fill_(-torch.inf)
        self.sums = new(len(p.log_sums), s, size)
        self.observed = nothing(p.logit_scale, s, size) if p.observe else None

    def add(self, tile: _Tile, where: slice) -> None:
        if tile.logits.shape[self.dim] == 0:
            return
        single = self._add_positives(tile, where)
        found = self._log_sums(tile, single)
        for k, field in enumerate(self.p.log_sums):
            shift, total = _joined(_LogSum(self.shifts[k, :, where], self.sums[k, :, where]), found[field])
            self.shifts[k, :, where], self.sums[k, :, where] = shift, total
        if self.observed is not None:
            self.observed[..., where] = merge(self.observed[..., where], _observed(self.p, tile, self.dim))
        if tile.inadmissible is not None:
            self.inadmissible[where] += tile.inadmissible.sum(self.dim)

    def _add_positives(self, tile: _Tile, where: slice) -> _LogSum | None:
        """Adds their logits; their log-sum-exp comes back where it is known to be of no more than one in each row."""
        if tile.positive is None:
            return _LogSum(tile.logits.new_tensor(-torch.inf), tile.logits.new_tensor(0))
        count = tile.positive.sum(self.dim)
        self.positives[where] += count
        if "sum_pos" not in self.p.want:
            return None
        weighted = tile.logits if tile.positive.dtype == torch.bool else tile.positive * tile.logits
        sum_pos = torch.where(tile.positive != 0, weighted, 0).sum(self.dim)
        self.sum_pos[:, where] += sum_pos
        if tile.positive.dtype != torch.bool or self.p.device.type != "cpu" or bool((count > 1).any()):
            return None  # does not synchronise
        return _LogSum(sum_pos.masked_fill(count == 0, -torch.inf), count.to(sum_pos.dtype).expand_as(sum_pos))

    def _log_sums(self, tile: _Tile, single: _LogSum | None) -> dict[str, _LogSum]:
        """Those of the tile, by field; over all and over the negatives by the same exponentials, where that serves."""
        fields = self.p.log_sums
        if "lse_all" not in fields or "lse_neg" not in fields:
            return {field: _log_sum(field, tile, self.dim) for field in fields}
        found = {"lse_pos": _log_sum("lse_pos", tile, self.dim)} if "lse_pos" in fields else {}
        if single is not None:
            negative = _log_sum("lse_neg", tile, self.dim)
            return found | {"lse_all": _joined(negative, single), "lse_neg": negative}
        shift, powers = _shift_and_powers("lse_all", tile, self.dim)
        found["lse_all"] = _LogSum(shift, powers.sum(self.dim))
        if tile.positive is not None and self.p.device.type == "cpu":
            total = powers.masked_fill_(tile.positive, 0).sum(self.dim)
            if bool((total >= torch.finfo(total.dtype).tiny * FAR_ABOVE).all()):
                return found | {"lse_neg": _LogSum(shift, total)}
        return found | {"lse_neg": _log_sum("lse_neg", tile, self.dim)}

    def result(self) -> Side:
        shifts = self.shifts.masked_fill_(self.shifts == -torch.inf, 0)
        log_sums = dict(zip(self.p.log_sums, shifts + self.sums.log(), strict=True))
        fields = [log_sums.get(field, self.sum_pos) for field in self.p.want]
        others = self.pairs - self.inadmissible - (self.positives if self.p.anchors.assignments is None else 0)
        return Side(
            torch.stack(fields) if fields else self.sum_pos.new_empty((0, *self.sum_pos.shape)),
            torch.stack([self.positives, others]),
            torch.stack([shifts, self.sums]),
            self.observed,
        )


def _observed(p: Problem, tile: _Tile, dim: int) -> Tensor:
    """[10, S, B or M]: what a tile adds to its rows (dim -1) or columns."""
    out = tile.inadmissible
    admissible = torch.ones_like(tile.similarity, dtype=torch.bool) if out is None else ~out
    if p.contrasts is None:
        admissible.diagonal(offset=tile.rows.start).fill_(False)
    positive = torch.zeros_like(admissible) if tile.positive is None else tile.positive
    negative = admissible & ~positive
    plain = None if p.others.bias is None else tile.similarity * p.logit_scale[:, None, None]
    if dim == -1:
        return observe(tile.logits, positive, negative, plain)
    return observe(tile.logits.mT, positive.T, negative.T, None if plain is None else plain.mT)


class _LogSum(NamedTuple):
    """shift + log(total), [S, B or M]."""

    shift: Tensor  # -inf where there is nothing
    total: Tensor


def _powers(members: Tensor, shift: Tensor, tile: _Tile) -> Tensor:
    """exp(members - shift), in the place of members unless these are the tile's own."""
    return (members - shift if members is tile.logits else members.sub_(shift)).exp_()


def _shift_and_powers(field: str, tile: _Tile, dim: int) -> tuple[Tensor, Tensor]:
    """The largest logit of each row's set, and exponentials of all less that."""
    members = _members(field, tile)
    shift = members.amax(dim)
    finite = shift.masked_fill(shift == -torch.inf, 0)
    return shift, _powers(members, finite.unsqueeze(dim), tile)


def _log_sum(field: str, tile: _Tile, dim: int) -> _LogSum:
    shift, powers = _shift_and_powers(field, tile, dim)
    return _LogSum(shift, powers.sum(dim))


def _joined(one: _LogSum, other: _LogSum) -> _LogSum:
    shift = torch.maximum(one.shift, other.shift)
    finite = shift.masked_fill(shift == -torch.inf, 0)
    return _LogSum(shift, one.total * (one.shift - finite).exp() + other.total * (other.shift - finite).exp())


class _SideGradient(NamedTuple):
    """Shifts, softmax weights and gradients that give the gradient of the logits on one side."""

    shifts: Tensor  # [L, S, N]
    weights: Tensor  # [L, S, N]
    idle: Sequence[bool]  # [L]: whether all weights are known to be 0
    grad: Tensor  # [W, S, N]


def _side_gradient(p: Problem, side: Side, grad: Tensor) -> _SideGradient:
    """Weights are grad / sum for each log-sum-exp, 0 where the sum is empty."""
    grads = [grad[p.want.index(field)] for field in p.log_sums]
    shifts, sums = side.parts
    weights = torch.where(sums == 0, 0, torch.stack(grads) / sums) if grads else sums
    visible = p.device.type == "cpu"  # on other devices this would synchronise
    return _SideGradient(shifts, weights, [visible and not bool(of_field.any()) for of_field in weights], grad)


def _add_logit_gradient(
    g: Tensor | None, p: Problem, tile: _Tile, side: _SideGradient, where: slice, dim: int
) -> Tensor:
    """g [S, B, M], or nothing, plus dL/ds of one side: the softmax part, then the positive part, in the tile."""
    active = [k for k, idle in enumerate(side.idle) if not idle]
    extra = side.grad[p.want.index("sum_pos")][:, where].unsqueeze(dim) if "sum_pos" in p.want else None
    if g is None and extra is not None and tile.positive is not None and [p.log_sums[k] for k in active] == ["lse_neg"]:
        # As of single positives: what is written over need not be masked before.
        shift, weights = side.shifts[active[0], :, where], side.weights[active[0], :, where]
        negatives = _powers(tile.logits, shift.unsqueeze(dim), tile).mul_(weights.unsqueeze(dim))
        return torch.where(tile.positive, extra, negatives)
    for k in active:
        field = p.log_sums[k]
        powers = _powers(_members(field, tile), side.shifts[k, :, where].unsqueeze(dim), tile)
        weights = side.weights[k, :, where].unsqueeze(dim)
        g = powers.mul_(weights) if g is None else g.addcmul_(powers, weights)
    if g is None:
        g = torch.zeros_like(tile.logits)
    if extra is not None and tile.positive is not None:
        g.addcmul_(tile.positive.to(g.dtype), extra)
    return g
