"""Lloyd's iterations, without searching for the nearest centroid of rows that keep theirs."""

from __future__ import annotations

import torch
from torch import Tensor

from .clustered_rows import ClusteredRows
from .ops.backends.rows import tf32_allowed, unit_rows

MOVERS = (1 / 32, 1 / 16, 1 / 8)  # of the centroids: how many may be searched for apart
FEW_PRODUCTS = 1 << 14  # a row: with fewer the bounds would take longer than a search for all rows
OVERHEAD = 0.05  # of a search for all rows: what a search for some centroids costs besides its products


class Lloyd:
    r"""The assignment of each row, and the sums of the clusters, while centroids move.

    Bounds say which rows have to be searched for (Hamerly 2010): `upper` on the distance from the own centroid, which
    grows by that centroid's movement, and `lower` on the distance from all others, which shrinks by the largest
    movement of another. Where a few centroids move far, as after a poor initialisation, the bound would be lost for all
    rows. So the centroids that move most are searched for apart, and `lower` shrinks by the movement of the rest.

    With few centroids of few dimensions there are no bounds, and all rows are searched for.

    Bounds include rounding errors: with `error` e of a score <x, c> - |c|² / 2, a search for all rows would find the
    same centroid wherever lower² - upper² > 4 e.
    """

    def __init__(self, data: ClusteredRows, k: int) -> None:
        self.data = data
        self.bounded = k * data.rows.shape[1] > FEW_PRODUCTS
        self.assignments = data.rows.new_zeros(0, dtype=torch.int64)  # [N]
        self._centres: Tensor | None = None  # of the assignments
        self._upper = self._lower = data.squares  # float64 [N]
        self._sums = data.squares  # float64 [k, D + 1]: of this process's rows, and how many there are

    def means(self, centres: Tensor) -> Tensor:
        """The means [k, D] of the rows nearest to each centre."""
        self.move(centres)
        sums = self.data.total(self._sums.clone())
        empty = (sums[:, -1] == 0).nonzero()[:, 0]
        if len(empty):
            self._refill(sums, empty, centres)
        counts = sums[:, -1:]
        means = sums[:, :-1] / counts.clamp(min=1)
        if self.data.spherical:
            means = unit_rows(means)
            counts = counts * means.any(1, keepdim=True)  # rows may cancel out
        return torch.where(counts > 0, means.to(self.data.dtype), centres)

    def _refill(self, sums: Tensor, empty: Tensor, centres: Tensor) -> None:
        """Gives each empty cluster one of the rows that are farthest from their centres."""
        far = self.data.distances(self.assignments, centres)
        distances, rows, former = self.data.largest(far, len(empty), self.assignments)
        apart = distances > 0
        rows, former, empty = rows[apart], former[apart], empty[apart]
        extended = torch.cat([rows, rows.new_ones(len(rows), 1)], 1).double()
        sums -= summed(extended, former, len(sums))
        sums[empty] = extended

    def move(self, centres: Tensor) -> None:
        """Assigns the rows to the centres [k, D], which are where `means` said or anywhere else."""
        first, places = self._centres is None, None
        if self.bounded:
            error = self._error(centres)
            places = None if first else self._doubtful(centres, error).nonzero()[:, 0]
            found = self._search(centres, error, places)
        else:
            found = self.data.nearest(centres).contiguous()
        self._centres = centres
        if first:
            self.assignments, self._sums = found, self._summed(None, found, len(centres))
            return
        former = self.assignments if places is None else self.assignments[places]
        changed = (found != former).nonzero()[:, 0]
        former, found = former[changed], found[changed]
        places = changed if places is None else places[changed]
        self.assignments[places] = found
        if 2 * len(changed) > len(self.assignments):
            self._sums = self._summed(None, self.assignments, len(centres))
        elif len(changed):
            self._sums += self._summed(places, found, len(centres)) - self._summed(places, former, len(centres))

    def _error(self, centres: Tensor) -> Tensor:
        """A bound on the error of each row's scores [N], whatever the order of their additions."""
        squares = centres.double().square().sum(1)
        exact = not centres.is_cuda or centres.dtype == torch.float64 or not tf32_allowed()
        eps = torch.finfo(centres.dtype).eps if exact else 2.0**-10
        of_products = eps * (centres.shape[1] + 2) * (self.data.squares.sqrt() + squares.amax().sqrt()).square()
        # Scores of unit rows leave out |c|² / 2, which is the same for all centres up to this.
        return of_products + (squares - 1).abs().amax() / 2 if self.data.spherical else of_products

    def _search(self, centres: Tensor, error: Tensor, places: Tensor | None) -> Tensor:
        """The nearest centre of the rows at `places`, or of all, whose bounds it sets."""
        scores, nearest = self.data.search(centres, min(2, len(centres)), places)
        squares, error = (each if places is None else each[places] for each in (self.data.squares, error))
        squares = self._squared_distances(squares, scores.double())
        upper = (squares[:, 0] + 2 * error).clamp_(min=0).sqrt_()
        lower = (squares[:, -1] - 2 * error).clamp_(min=0).sqrt_()
        if len(centres) == 1:
            lower.fill_(torch.inf)
        if places is None:
            self._upper, self._lower = upper, lower
        else:
            self._upper[places], self._lower[places] = upper, lower
        return nearest[:, 0].contiguous()

    def _squared_distances(self, squares: Tensor, scores: Tensor) -> Tensor:
        return (squares + 1 if self.data.spherical else squares)[:, None] - 2 * scores

    def _doubtful(self, centres: Tensor, error: Tensor) -> Tensor:
        """Moves the bounds. Whether each row [N] may have another nearest centre than its own."""
        assert self._centres is not None
        # Rounded up, and the bounds' own roundings with it.
        movements = (centres.double() - self._centres.double()).square().sum(1).sqrt() * (1 + 1e-6)
        self._upper += movements[self.assignments]
        order = movements.argsort(descending=True)
        counts = sorted({0, *(int(share * len(centres)) for share in MOVERS)})
        limits = movements[order[counts]]
        # How far `lower` may shrink until another centre may win.
        needed = (self._upper.square() + 4 * error).sqrt_()
        slack = self._lower - needed
        kept = torch.stack([(slack > limit).sum() for limit in limits]).tolist()
        searches = [OVERHEAD + count / len(centres) if count else 0 for count in counts]
        costs = [extra - rows / max(len(slack), 1) for extra, rows in zip(searches, kept, strict=True)]
        best = costs.index(min(costs))
        movers, keeps = order[: counts[best]], slack > limits[best]
        self._lower -= limits[best]
        if len(movers):
            places = keeps.nonzero()[:, 0]
            nearest = self._nearest_other(centres, movers, places, error[places])
            self._lower[places] = torch.minimum(self._lower[places], nearest)
            keeps = self._lower > needed
        return keeps.logical_not_()

    def _nearest_other(self, centres: Tensor, movers: Tensor, places: Tensor, error: Tensor) -> Tensor:
        """A lower bound on the distances of the rows at `places` from the centres `movers` that are not their own."""
        scores, found = self.data.search(centres[movers], min(2, len(movers)), places)
        own = movers[found] == self.assignments[places][:, None]
        squares = self._squared_distances(self.data.squares[places], scores.double()).masked_fill_(own, torch.inf)
        return (squares.amin(1) - 2 * error).clamp_(min=0).sqrt_()

    def _summed(self, places: Tensor | None, clusters: Tensor, k: int) -> Tensor:
        """The sums [k, D + 1] of the extended rows at `places`, or of all, in float64."""
        sums = torch.zeros(k, self.data.rows.shape[1] + 1, dtype=torch.float64, device=clusters.device)
        done = 0
        for block in self.data.extended(places):
            for part in block.split(self.data.block):
                sums += summed(part.double(), clusters[done : done + len(part)], k)
                done += len(part)
        return sums


def summed(rows: Tensor, clusters: Tensor, k: int) -> Tensor:
    """The sums [k, D] of the rows of each cluster, by an embedding's backward: threaded, and deterministic on a GPU."""
    sums: Tensor = torch.ops.aten.embedding_dense_backward(rows, clusters, k, -1, False)
    return sums
