"""The rows that k-means clusters."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .distributed import World
from .neighbors import topk_similarity
from .ops.backends.rows import unit_rows

BLOCK = {"cpu": 1 << 20}  # numbers in a block of rows, by device
LARGE_BLOCK = 1 << 25  # on the other devices
KEPT = 1 << 23  # numbers: up to so many are prepared once
GATHERED = 0.7  # of a block's rows: if more are wanted, all are taken, as gathering rows takes time too


class ClusteredRows:
    """The rows of all processes in the metric's coordinates: less their mean, or divided by their norms."""

    def __init__(
        self, rows: Tensor, k: int, spherical: bool, dtype: torch.dtype, world: World | None, sizes: list[int]
    ) -> None:
        self.rows, self.spherical, self.dtype, self.world, self.sizes = rows, spherical, dtype, world, sizes
        # The sums of a block are [k, D], so blocks of fewer rows than k would save no memory.
        self.block = max(BLOCK.get(rows.device.type, LARGE_BLOCK) // rows.shape[1], k)
        n, (own, d) = max(sum(sizes), 1), rows.shape
        self.mean = rows.new_zeros(d, dtype=dtype)
        # Only the variance of unit rows requires the exact mean. Summing along columns in float64 takes long.
        sums = [part.sum(0, dtype=torch.float64 if spherical else dtype).double() for _, part in self.blocks()]
        mean = self.total(torch.stack(sums).sum(0) if sums else self.mean.double() * 0) / n
        if not spherical:
            self.mean = mean.to(dtype)
        self._memory: Tensor | None = None  # for a block of rows as `extended` makes them
        self._kept: Tensor | None = None  # all rows so
        if 0 < own * (d + 1) <= KEPT:
            self._kept = self._new(own)
            self.prepared(rows, out=self._kept[:, :-1])
        squares = [torch.linalg.vector_norm(part[:, :-1], dim=1).double().square() for part in self.extended()]
        self.squares = torch.cat(squares) if squares else rows.new_zeros(0, dtype=torch.float64)
        """float64 ``[N]``: the squared norm of each row"""
        variance = self.total(self.squares.sum()) / (n * d)
        if spherical:
            variance = variance - mean.square().mean()
        self.variance = float(variance)
        """mean over the features"""
        if not self.variance < torch.inf:  # NaN too
            raise ValueError("rows: expected finite numbers whose squares are finite, got others")

    def total(self, values: Tensor) -> Tensor:
        """The sum over all processes."""
        return values if self.world is None else self.world.total(values)

    def shared(self, values: Tensor) -> Tensor:
        """The first process's values."""
        return self.total(values if self.world is None or self.world.rank == 0 else torch.zeros_like(values))

    def prepared(self, rows: Tensor, out: Tensor | None = None) -> Tensor:
        if not self.spherical:
            return torch.sub(rows, self.mean, out=out)
        found = unit_rows(rows, self.dtype)
        return found if out is None else out.copy_(found)

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        for start in range(0, len(self.rows), self.block):
            place = slice(start, start + self.block)
            yield place, self.prepared(self.rows[place])

    def extended(self, places: Tensor | None = None) -> Iterator[Tensor]:
        """Blocks of rows with a column of ones [b, D + 1], each valid until the next. Few rows are one block, if all
        are asked for.

        places: indices of the rows; None: all.
        """
        if self._kept is not None and places is None:
            yield self._kept
            return
        count = len(self.rows) if places is None else len(places)
        if not count:
            return
        if self._memory is None:  # new memory for each call would take as long as the rows
            self._memory = self._new(min(self.block, len(self.rows)))
        for part in (self.rows if places is None else places).split(self.block):
            found = self._memory[: len(part)]
            if self._kept is not None:
                torch.index_select(self._kept, 0, part, out=found)
            else:
                self.prepared(part if places is None else self.rows[part], out=found[:, :-1])
            yield found

    def _new(self, count: int) -> Tensor:
        """Memory [count, D + 1] for extended rows."""
        memory = self.rows.new_empty(count, self.rows.shape[1] + 1, dtype=self.dtype)
        memory[:, -1] = 1
        return memory

    def search(self, centres: Tensor, k: int, places: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The k nearest centres of each row, or of those at `places`: (scores, indices), each [N, k].

        A score is <x, c> - |c|² / 2; of unit rows <x, c>.
        """
        offsets = centres.new_zeros(len(centres)) if self.spherical else centres.square().sum(1) / -2
        keys = torch.cat([centres, offsets[:, None]], 1)
        whole = places is not None and len(places) > GATHERED * len(self.rows)
        found = [topk_similarity(part, keys, k) for part in self.extended(None if whole else places)]
        if not found:
            none = centres.new_zeros(0, k)
            return none, none.long()
        scores, indices = (torch.cat(parts) if len(parts) > 1 else parts[0] for parts in zip(*found, strict=True))
        return (scores[places], indices[places]) if whole else (scores, indices)

    def nearest(self, centres: Tensor) -> Tensor:
        """The nearest centre [N] of each row."""
        return self.search(centres, 1)[1][:, 0]

    def distances(self, assignments: Tensor, centres: Tensor) -> Tensor:
        """The squared distance [N] of each row from its centre, of differences: 0 exactly where they are equal."""
        found = []
        for start in range(0, len(self.rows), self.block):
            place = slice(start, start + self.block)
            part = self.prepared(self.rows[place]) if self._kept is None else self._kept[place, :-1]
            found.append((part - centres[assignments[place]]).square_().sum(1))
        return torch.cat(found) if found else self.rows.new_zeros(0, dtype=self.dtype)

    def largest(self, keys: Tensor, count: int, values: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """The `count` largest keys of all processes, with their rows and their values [N] (zeros if None)."""
        values = torch.zeros_like(keys, dtype=torch.int64) if values is None else values
        chosen = keys.argsort(descending=True, stable=True)[:count]
        if self.world is None:
            return keys[chosen], self.prepared(self.rows[chosen]), values[chosen]
        offered = [min(size, count) for size in self.sizes]
        everyone = self.world.all_rows(keys[chosen], offered)
        order = everyone.argsort(descending=True, stable=True)[:count]
        limits = torch.tensor(offered, device=keys.device).cumsum(0)
        rank = torch.searchsorted(limits, order, right=True)
        taken = rank.bincount(minlength=len(offered)).tolist()
        chosen = chosen[: taken[self.world.rank]]  # of equal keys the first come first, here and in `order`
        place = order.argsort().argsort()  # from the order of ranks to the order of keys
        found = [self.world.all_rows(part, taken)[place] for part in (self.prepared(self.rows[chosen]), values[chosen])]
        return everyone[order], found[0], found[1]
