"""The pair sums in plain PyTorch in blocks of rows, on any device. Memory O((N + M) (D + block))."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..backends.rows import CPU_BLOCK, FEWEST_ROWS, GPU_BLOCK, inverse_norms, through_normalization
from ..pair_maps import mapped
from .records import Gradients, Needs, Pairs, Sums

NEAR = 1 / 64  # squared distances below this share of the squared norms are found again, from differences of rows


class _Side(NamedTuple):
    rows: Tensor  # [N, D] in `Pairs.dtype`, as they enter the product
    inverse_norms: Tensor  # [N], or [0] if the rows are not normalised
    squares: Tensor  # [N], of distances the squared norms of `rows`, else [0]
    exact: Tensor  # the rows as given
    normalize: bool

    def precise(self, places: Tensor) -> Tensor:
        """The rows at `places` as they enter the product, in float64."""
        rows = self.exact[places].double()
        return rows * inverse_norms(rows)[:, None] if self.normalize else rows


class _Tile(NamedTuple):
    rows: slice
    similarity: Tensor  # [B, M]
    arguments: Tensor  # logits or distances [B, M]
    positive: Tensor | None  # bool [B, M]; None: no pair
    negative: Tensor | None
    near: tuple[Tensor, Tensor] | None  # the places of pairs at a small distance, rows and columns


def sweep(p: Pairs, weights: Tensor | None, needs: Needs) -> tuple[Sums, Gradients]:
    """The sums and, with weights [2, N], the needed gradients of ``sum(weights * values)``."""
    left = _side(p.anchors.values, p.anchors.normalize, p, None)
    right = left if p.contrasts is None else _side(p.contrasts.values, p.others.normalize, p, p.bias)
    n, _ = p.sizes
    sums = Sums(*(left.rows.new_zeros(2, n) for _ in Sums._fields))
    wanted = None if weights is None else _Accumulator(p, left, right, needs)
    for tile in _tiles(p, left, right):
        slope = None
        for k, members in enumerate((tile.positive, tile.negative)):
            if members is None:
                continue
            value, derivative = mapped(p.kind, tile.arguments, k == 0, p.margins[k])
            value = torch.where(members, value, 0)
            for total, found in zip(sums, (value, value != 0, members), strict=True):
                total[k, tile.rows] = found.sum(1).to(total.dtype)
            if weights is not None:
                part = torch.where(members, derivative, 0).mul_(weights[k, tile.rows, None])
                slope = part if slope is None else slope.add_(part)
        if wanted is not None and slope is not None:
            wanted.add(tile, slope)
    return sums, Gradients() if wanted is None else wanted.result()


class _Accumulator:
    """Accumulates the gradients over tiles."""

    def __init__(self, p: Pairs, left: _Side, right: _Side, needs: Needs) -> None:
        self.p, self.left, self.right = p, left, right
        n, m = p.sizes
        own = p.contrasts is None
        new = left.rows.new_zeros
        self.dx = new(left.rows.shape) if needs.anchors else None
        self.dy = self.dx if own else new(right.rows.shape) if needs.contrasts else None
        self.scale = new((), dtype=torch.float64) if needs.logit_scale else None
        self.offset = new(p.offset.shape, dtype=torch.float64) if needs.offset and p.offset is not None else None
        self.bias = new(m) if needs.bias and p.bias is not None else None
        # Part of a distance's derivative (x - y) / d is along x. Its factors are summed here.
        self.row_sums = new(n) if p.of_distance and self.dx is not None else None
        self.column_sums = self.row_sums if own else new(m) if p.of_distance and self.dy is not None else None

    def add(self, tile: _Tile, slope: Tensor) -> None:
        """slope: the derivative by logits or distances [B, M]."""
        if self.scale is not None:
            self.scale += (slope * tile.similarity).sum(dtype=torch.float64)
        if self.offset is not None:
            if self.offset.dim():
                self.offset[tile.rows] = slope.sum(1, dtype=torch.float64)
            else:
                self.offset += slope.sum(dtype=torch.float64)
        if self.bias is not None:
            self.bias += slope.sum(0)
        if self.p.of_distance:
            slope = torch.where(tile.arguments == 0, 0, slope / -tile.arguments)  # the derivative by <x, y>
            if tile.near is not None:
                self._add_near(tile, slope)
        else:
            slope = slope * self.p.logit_scale
        if self.dx is not None:
            self.dx[tile.rows].addmm_(slope, self.right.rows)
        if self.dy is not None:
            self.dy.addmm_(slope.T, self.left.rows[tile.rows])
        if self.row_sums is not None:
            self.row_sums[tile.rows] += slope.sum(1)
        if self.column_sums is not None:
            self.column_sums += slope.sum(0)

    def _add_near(self, tile: _Tile, slope: Tensor) -> None:
        """Adds the gradients of near pairs from differences of rows, and takes them out of `slope`."""
        assert tile.near is not None
        weights = slope[tile.near].double()
        slope[tile.near] = 0
        for i, j, apart, part in _differences(tile.rows.start, tile.near, self.left, self.right):
            of_pair = (apart * weights[part, None]).to(slope.dtype)  # towards y
            if self.dx is not None:
                self.dx.index_add_(0, i, of_pair, alpha=-1)
            if self.dy is not None:
                self.dy.index_add_(0, j, of_pair)

    def result(self) -> Gradients:
        dx, dy = self.dx, self.dy
        if dx is not None and self.row_sums is not None:
            dx.addcmul_(self.left.rows, self.row_sums[:, None], value=-1)
        if dy is not None and dy is not dx and self.column_sums is not None:
            dy.addcmul_(self.right.rows, self.column_sums[:, None], value=-1)
        if dx is not None and self.left.normalize:
            dx = through_normalization(dx, self.left.rows, self.left.inverse_norms)
        if self.p.contrasts is None:
            dy = None
        elif dy is not None and self.right.normalize:
            dy = through_normalization(dy, self.right.rows, self.right.inverse_norms)
        return Gradients(dx, dy, self.scale, self.offset, self.bias)


def _side(values: Tensor, normalize: bool, p: Pairs, bias: Tensor | None) -> _Side:
    if bias is not None:
        values = values.masked_fill((bias == -torch.inf)[:, None], 0)  # no value of these rows enters a product
    rows = values.to(p.dtype)
    inverse = inverse_norms(rows) if normalize else rows.new_empty(0)
    rows = rows * inverse[:, None] if normalize else rows
    squares = rows.double().square().sum(1).to(rows.dtype) if p.of_distance else rows.new_empty(0)
    return _Side(rows, inverse, squares, values, normalize)


def _tiles(p: Pairs, left: _Side, right: _Side) -> Iterator[_Tile]:
    n, m = p.sizes
    step = max((CPU_BLOCK if p.device.type == "cpu" else GPU_BLOCK) // max(m, 1), FEWEST_ROWS)
    absent = None if p.bias is None else p.bias == -torch.inf
    for start in range(0, n, step):
        rows = slice(start, min(start + step, n))
        similarity = left.rows[rows] @ right.rows.T
        inadmissible = _equal(p.anchors.ids, p.others.ids, rows) if p.contrasts is not None else None
        if p.contrasts is None:
            inadmissible = torch.zeros_like(similarity, dtype=torch.bool)
            inadmissible.diagonal(offset=start).fill_(True)
        if absent is not None:
            inadmissible = absent.expand_as(similarity) if inadmissible is None else inadmissible | absent
        positive = _equal(p.anchors.clusters, p.others.clusters, rows)
        if positive is not None and inadmissible is not None:
            positive &= ~inadmissible
        negative = None
        if not p.only_positives:
            taken = inadmissible if positive is None else positive if inadmissible is None else positive | inadmissible
            negative = torch.ones_like(similarity, dtype=torch.bool) if taken is None else ~taken
        near = None
        if p.of_distance:
            arguments, near = _distances(similarity, rows, left, right)
        else:
            arguments = similarity * p.logit_scale
            if p.offset is not None:
                arguments += p.offset[rows, None] if p.offset.dim() else p.offset
            if p.bias is not None:
                arguments += p.bias.masked_fill(p.bias == -torch.inf, 0)
        yield _Tile(rows, similarity, arguments, positive, negative, near)


def _distances(
    similarity: Tensor, rows: slice, left: _Side, right: _Side
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """The distances [B, M], and the places of those that the product would round too coarsely."""
    largest = left.squares[rows, None] + right.squares
    squared = largest - 2 * similarity
    i, j = (squared < NEAR * largest).nonzero(as_tuple=True)
    found = i, j
    distances = squared.clamp(min=0).sqrt_()
    if not len(found[0]):
        return distances, None
    for _, _, apart, part in _differences(rows.start, found, left, right):
        distances[found[0][part], found[1][part]] = apart.norm(dim=1).to(distances.dtype)
    return distances, found


def _differences(
    start: int, near: tuple[Tensor, Tensor], left: _Side, right: _Side
) -> Iterator[tuple[Tensor, Tensor, Tensor, slice]]:
    """For slices of the near pairs: rows i, contrasts j, x_i - y_j in float64, and the slice."""
    step = max(CPU_BLOCK // max(left.rows.shape[1], 1), 1)
    for first in range(0, len(near[0]), step):
        part = slice(first, first + step)
        i, j = near[0][part] + start, near[1][part]
        yield i, j, left.precise(i) - right.precise(j), part


def _equal(left: Tensor | None, right: Tensor | None, rows: slice) -> Tensor | None:
    if left is None or right is None:
        return None
    ids = left[rows, None]
    return (ids == right) & (ids != -1)
