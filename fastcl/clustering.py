"""k-means on the exact nearest centroid."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .checks import check_count, check_flag, check_option, check_rows, finite_number, plain_number, shown
from .distributed import Property, World, check_group, dtype_name, tell_others
from .neighbors import topk_similarity
from .ops.backends.rows import accumulation_dtype, unit_rows
from .ops.library import without_autocast

INITIALISATIONS = ("k-means||", "random")
ROUNDS = 5  # of k-means||: "five rounds suffice" (Bahmani et al. 2012)
BLOCK = {"cpu": 1 << 20}  # numbers in a block of rows, by device
LARGE_BLOCK = 1 << 25  # on the other devices
KEPT = 1 << 23  # numbers: up to so many are prepared once


class KMeansResult(NamedTuple):
    """What `kmeans` returns."""

    centroids: Tensor
    """``[k, D]``; float32, float64 for float64 rows"""
    assignments: Tensor
    """int64 ``[N]``: the nearest centroid of each row, the lowest of equally near ones"""
    inertia: float
    """sum of the squared distances of all rows from their centroids"""
    n_iters: int
    """number of iterations"""


def kmeans(
    rows: Tensor,
    k: int,
    *,
    spherical: bool = False,
    init: str | Tensor = "k-means||",
    n_iters: int = 100,
    tol: float = 1e-4,
    generator: torch.Generator | None = None,
    group: Any = None,
) -> KMeansResult:
    r"""k-means clustering (Lloyd 1982): centroids that are the means of the rows nearest to them.

    .. math:: \min_{c_1, \dots, c_k} \sum_i \min_j |x_i - c_j|^2

    An iteration finds the nearest centroid of each row, the largest of :math:`\langle x_i, c_j \rangle - |c_j|^2 / 2`,
    by :func:`topk_similarity`, and moves each centroid to the mean of its rows. No N x k matrix is stored: beside the
    rows, memory is O(N + k D) and blocks of rows; up to 2^23 numbers are one block, which is prepared once. The rows'
    mean is subtracted before any product.

    Args:
        rows: ``[N, D]``; float64, float32, bfloat16 or float16. Computation is in float32, or float64.
        k: number of clusters, from 1 to N.
        spherical: rows and centroids are divided by their norms (Dhillon and Modha 2001): a row belongs to the
            centroid with the largest cosine, and its squared distance is 2 - 2 cosine. A row of zeros has cosine 0.
        init: ``"k-means||"`` (Bahmani et al. 2012): k-means++ on a sample of up to 5 k + 1 rows, drawn in five rounds
            in proportion to squared distances. ``"random"``: rows, each at most once. Or a tensor ``[k, D]``, the same
            on all processes.
        n_iters: maximum number of iterations. 0: the rows are assigned to ``init``, and k may exceed N.
        tol: >= 0. Iterations end when the squared movements of all centroids sum to at most ``tol`` times the mean
            variance of a feature; with 0, when no centroid moves.
        generator: random generator of the initialisation, on any device. None: torch's default.
        group: process group that shares the rows. Each process passes its own rows (any number of them) and gets their
            assignments; centroids and inertia are those of all rows. One all-reduce of k (D + 1) numbers per iteration.

    A centroid without rows moves to the row farthest from its own centroid, several such centroids to the farthest
    rows, and these rows leave their clusters. It stays where it is if no row has a distance. The result is the same
    from run to run for the same generator, threads and processes.

    Returns:
        :class:`KMeansResult`, a named tuple (centroids, assignments, inertia, n_iters), without gradient.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came; also for NaN or infinity in the
            rows, on every device.
    """
    check_group(group)
    sharing = group is not None
    try:
        check_rows("rows", rows)
        k, n_iters = check_count("k", k), check_count("n_iters", n_iters, least=0)
        check_flag("spherical", spherical)
        tol = _tolerance(tol)
        _check_init(init, k, rows)
        if generator is not None and not isinstance(generator, torch.Generator):
            raise TypeError(f"generator: expected a torch.Generator, got {type(generator).__name__}")
    except Exception as error:
        tell_others(sharing, error, rows, group=group)
        raise
    dtype = accumulation_dtype(rows, init if isinstance(init, Tensor) else None)
    world, sizes = World.of(sharing, group), [len(rows)]
    if world is not None:
        alike: dict[str, Property] = {"k": k, "dimension": rows.shape[1], "dtype": dtype_name(dtype)}
        alike |= {"spherical": spherical, "n_iters": n_iters, "tol": tol}
        alike |= {"init": init if isinstance(init, str) else "a tensor"}
        sizes = world.agree("kmeans", {"rows": len(rows)}, alike, rows.device)[0]
    if k > sum(sizes) and n_iters > 0:
        raise ValueError(f"k: expected at most the number of rows, {sum(sizes)}, got {k}")
    if n_iters == 0 and isinstance(init, str):
        raise ValueError(f"init: expected a tensor of centroids with n_iters=0, got {init!r}")
    with torch.no_grad(), without_autocast(rows.device):
        data = _Data(rows.detach(), k, spherical, dtype, world, sizes)
        if isinstance(init, Tensor):
            centres = data.shared(data.prepared(init.detach()))
        else:
            centres = _initial(data, k, init, _seed(generator))
        count = 0
        while count < n_iters:
            count += 1
            moved = data.means(centres)
            movement = float((moved - centres).square().sum(dtype=torch.float64))
            centres = moved
            if movement <= tol * data.variance:
                break
        assignments = data.nearest(centres)
        inertia = float(data.total(data.distances(assignments, centres).sum(dtype=torch.float64)))
        return KMeansResult(centres + data.mean, assignments, inertia, count)


def cluster_concentrations(
    rows: Tensor, clusters: KMeansResult, *, temperature: float = 0.2, alpha: float = 10.0, group: Any = None
) -> Tensor:
    r"""The concentration of each cluster, as prototypical contrastive learning estimates it (Li et al. 2021).

    With the :math:`n_k` rows of cluster k and its centroid c,

    .. math:: \phi_k = \frac{\sum_i |x_i - c_k|}{n_k \log (n_k + \alpha)}

    As in the authors' code a cluster of fewer than two rows gets the largest of these, all are cut off at their 10th
    and 90th percentile, and they are multiplied by a number that makes their mean the temperature. If no cluster has
    rows apart from its centroid, all are the temperature.

    Args:
        rows: ``[N, D]``, as they were clustered; divided by their norms for spherical clusters.
        clusters: what `kmeans` returned for them.
        temperature: > 0, the mean of the result.
        alpha: > 0; keeps small clusters from getting a large concentration.
        group: the process group that shared the rows.

    Returns:
        ``[k]``, > 0, the ``concentrations`` of :class:`ProtoNCELoss`; without gradient, dtype of the centroids.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    check_group(group)
    try:
        temperature, alpha = plain_number("temperature", temperature), plain_number("alpha", alpha)
        if not isinstance(clusters, KMeansResult):
            raise TypeError(f"clusters: expected a KMeansResult, got {type(clusters).__name__}")
        centroids, assignments = clusters.centroids, clusters.assignments
        check_rows("rows", rows, like=centroids)
        if len(rows) != len(assignments):
            raise ValueError(f"rows: expected the {len(assignments)} rows of the clusters, got {len(rows)}")
    except Exception as error:
        tell_others(group is not None, error, rows, group=group)
        raise
    world = World.of(group is not None, group)
    if world is not None:
        shape: dict[str, Property] = {"clusters": len(centroids), "dimension": centroids.shape[1]}
        world.agree("cluster_concentrations", {}, {**shape, "temperature": temperature, "alpha": alpha}, rows.device)
    block = max(BLOCK.get(rows.device.type, LARGE_BLOCK) // rows.shape[1], 1)
    parts = zip(rows.detach().split(block), assignments.split(block), strict=True)
    distances = torch.cat([torch.linalg.vector_norm(part - centroids[own], dim=1) for part, own in parts])
    of_rows = torch.stack([distances, torch.ones_like(distances)], 1).double()
    sums = _summed(of_rows, assignments, len(centroids))
    total, counts = (sums if world is None else world.total(sums)).unbind(1)
    found = total / (counts.clamp(min=1) * (counts + alpha).log())
    several = counts > 1
    found = torch.where(several, found, found.masked_fill(~several, 0).amax())
    found = found.clamp(*torch.quantile(found, torch.tensor([0.1, 0.9], dtype=found.dtype, device=found.device)))
    mean = found.mean()
    found = torch.where(mean > 0, found / mean, 1) * temperature
    return found.masked_fill(mean.isnan(), torch.nan).to(centroids.dtype)


class _Data:
    """The rows of all processes in the metric's coordinates: less their mean, or divided by their norms."""

    def __init__(
        self, rows: Tensor, k: int, spherical: bool, dtype: torch.dtype, world: World | None, sizes: list[int]
    ) -> None:
        self.rows, self.spherical, self.dtype, self.world, self.sizes = rows, spherical, dtype, world, sizes
        # The sums of a block are [k, D], so blocks of fewer rows than k would save no memory.
        self.block = max(BLOCK.get(rows.device.type, LARGE_BLOCK) // rows.shape[1], k)
        n = max(sum(sizes), 1)
        self._kept: Tensor | None = None  # all rows as `extended` makes them
        self.mean = rows.new_zeros(rows.shape[1], dtype=dtype)
        mean = self._sum(lambda block: block) / n
        if not spherical:
            self.mean = mean.to(dtype)
            self.variance = float(self._sum(torch.square).mean() / n)
        else:
            self.variance = float((self._sum(torch.square) / n - mean.square()).mean())
        if not self.variance < torch.inf:  # NaN too
            raise ValueError("rows: expected finite numbers whose squares are finite, got others")

    def _sum(self, function: Any) -> Tensor:
        """The sum [D] of a function of the rows, in float64."""
        own = [function(block).sum(0, dtype=torch.float64) for _, block in self.blocks()]
        return self.total(torch.stack(own).sum(0) if own else self.mean.double() * 0)

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

    def search(self, centres: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """For each block its rows with a column of ones [b, D + 1], valid until the next, and their nearest centres."""
        offsets = centres.new_zeros(len(centres)) if self.spherical else centres.square().sum(1) / -2
        keys = torch.cat([centres, offsets[:, None]], 1)
        for extended in self.extended():
            yield extended, topk_similarity(extended, keys, 1)[1][:, 0]

    def extended(self) -> Iterator[Tensor]:
        """For each block its rows with a column of ones [b, D + 1], valid until the next. Few rows are kept so."""
        if self._kept is not None:
            yield self._kept
            return
        n, d = self.rows.shape
        few = n * (d + 1) <= KEPT
        memory = self.rows.new_ones(n if few else min(self.block, n), d + 1, dtype=self.dtype)
        for rows in [self.rows] if few else self.rows.split(self.block):
            self.prepared(rows, out=memory[: len(rows), :-1])
            yield memory[: len(rows)]
        self._kept = memory if few else None

    def nearest(self, centres: Tensor) -> Tensor:
        """The nearest centre [N] of each row."""
        found = [nearest for _, nearest in self.search(centres)]
        return torch.cat(found) if found else self.rows.new_zeros(0, dtype=torch.int64)

    def distances(self, assignments: Tensor, centres: Tensor) -> Tensor:
        """The squared distance [N] of each row from its centre, of differences: 0 exactly where they are equal."""
        found = [(block - centres[assignments[place]]).square_().sum(1) for place, block in self.blocks()]
        return torch.cat(found) if found else self.rows.new_zeros(0, dtype=self.dtype)

    def means(self, centres: Tensor) -> Tensor:
        """The means [k, D] of the rows nearest to each centre."""
        sums = torch.zeros(len(centres), centres.shape[1] + 1, dtype=torch.float64, device=centres.device)
        found = []
        for extended, nearest in self.search(centres):
            # In parts, because a part's sums are in the dtype of the rows.
            for part, own in zip(extended.split(self.block), nearest.split(self.block), strict=True):
                sums += _summed(part, own, len(centres))
            found.append(nearest)
        sums = self.total(sums)
        empty = (sums[:, -1] == 0).nonzero()[:, 0]
        if len(empty):
            self._refill(sums, empty, torch.cat([*found, empty[:0]]), centres)
        counts = sums[:, -1:]
        means = sums[:, :-1] / counts.clamp(min=1)
        if self.spherical:
            means = unit_rows(means)
            counts = counts * means.any(1, keepdim=True)  # rows may cancel out
        return torch.where(counts > 0, means.to(self.dtype), centres)

    def _refill(self, sums: Tensor, empty: Tensor, assignments: Tensor, centres: Tensor) -> None:
        """Gives each empty cluster one of the rows that are farthest from their centres."""
        distances, rows, former = self.largest(self.distances(assignments, centres), len(empty), assignments)
        apart = distances > 0
        rows, former, empty = rows[apart], former[apart], empty[apart]
        extended = torch.cat([rows, rows.new_ones(len(rows), 1)], 1).double()
        sums -= _summed(extended, former, len(sums))
        sums[empty] = extended

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


def _summed(rows: Tensor, clusters: Tensor, k: int) -> Tensor:
    """The sums [k, D] of the rows of each cluster, by an embedding's backward: threaded, and deterministic on a GPU."""
    sums: Tensor = torch.ops.aten.embedding_dense_backward(rows, clusters, k, -1, False)
    return sums


def _seed(generator: torch.Generator | None) -> int:
    device = "cpu" if generator is None else generator.device
    return int(torch.randint(2**62, (), generator=generator, device=device))


def _initial(data: _Data, k: int, init: str, seed: int) -> Tensor:
    """The first centres [k, D], the same on all processes."""
    rank = 0 if data.world is None else data.world.rank
    own = torch.Generator(data.rows.device).manual_seed(seed + rank)
    n = len(data.rows)

    def gumbel() -> Tensor:
        """Noise [N]: the largest sums of logarithms and noise are a sample in proportion, without replacement."""
        return torch.empty(n, dtype=data.dtype, device=data.rows.device).exponential_(generator=own).log_().neg_()

    if init == "random":
        return data.largest(gumbel(), k)[1]
    candidates = data.largest(gumbel(), 1)[1]
    nearest = torch.zeros(n, dtype=torch.int64, device=data.rows.device)
    distances = data.distances(nearest, candidates)
    for _ in range(ROUNDS):
        keys, rows, _ = data.largest(distances.log() + gumbel(), k)
        rows = rows[keys > -torch.inf]
        if len(rows) == 0:  # every row is a candidate
            break
        closest = data.nearest(rows)
        closer = data.distances(closest, rows)
        nearest = torch.where(closer < distances, closest + len(candidates), nearest)
        distances = torch.minimum(closer, distances)
        candidates = torch.cat([candidates, rows])
    weights = data.total(nearest.bincount(minlength=len(candidates)).double())
    return data.shared(_plus_plus(candidates, weights, k, own))


def _plus_plus(rows: Tensor, weights: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """k of the weighted rows by greedy k-means++ (Arthur and Vassilvitskii 2007).

    Of 2 + log k rows, drawn in proportion to squared distances, the one that leaves the smallest sum of them is chosen.
    Rows repeat if fewer than k differ.
    """
    trials = min(2 + int(math.log(k)), len(rows))
    norms = rows.square().sum(1)
    distances, masses = torch.full_like(norms, torch.inf), weights
    chosen = []
    for _ in range(k):
        drawn = (masses / torch.empty_like(masses).exponential_(generator=generator)).topk(trials).indices
        apart = norms[drawn, None] + norms - 2 * rows[drawn] @ rows.T
        closer = torch.minimum(distances, apart.clamp_(min=0))
        best = (closer * weights).sum(1).argmin()
        distances = closer[best]
        masses = distances * weights
        chosen.append(drawn[best])
    return rows[torch.stack(chosen)]


def _check_init(init: Any, k: int, rows: Tensor) -> None:
    if isinstance(init, str):
        check_option("init", init, INITIALISATIONS)
        return
    if not isinstance(init, Tensor):
        raise TypeError(f"init: expected a string or a tensor, got {shown(init)}")
    check_rows("init", init, like=rows)
    if len(init) != k:
        raise ValueError(f"init: expected shape [{k}, {rows.shape[1]}], got {list(init.shape)}")
    if not bool(init.isfinite().all()):
        raise ValueError("init: expected finite numbers, got others")


def _tolerance(tol: Any) -> float:
    number = finite_number("tol", tol)
    if number < 0:
        raise ValueError(f"tol: expected a number of at least 0, got {number}")
    return number
