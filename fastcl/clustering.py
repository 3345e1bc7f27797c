"""k-means on the exact nearest centroid."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .checks import check_count, check_flag, check_option, check_rows, finite_number, plain_number, shown
from .clustered_rows import BLOCK, LARGE_BLOCK, ClusteredRows
from .distributed import Property, World, check_group, dtype_name, tell_others
from .lloyd import Lloyd, summed
from .ops.backends.rows import accumulation_dtype
from .ops.library import without_autocast

INITIALISATIONS = ("k-means||", "random")
ROUNDS = 5  # of k-means||: "five rounds suffice" (Bahmani et al. 2012)


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
    by :func:`topk_similarity`, and moves each centroid to the mean of its rows. Rows whose nearest centroid cannot have
    changed, by bounds on their distances (Hamerly 2010), are left out if k D is more than 2^14; the assignments are
    those of a search for all rows. No N x k matrix is stored: beside the rows, memory is O(N + k D) and blocks of rows;
    up to 2^23 numbers are one block, which is prepared once. The rows' mean is subtracted before any product.

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
        data = ClusteredRows(rows.detach(), k, spherical, dtype, world, sizes)
        if isinstance(init, Tensor):
            centres = data.shared(data.prepared(init.detach()))
        else:
            centres = _initial(data, k, init, _seed(generator))
        clusters, count = Lloyd(data, k), 0
        while count < n_iters:
            count += 1
            moved = clusters.means(centres)
            movement = float((moved - centres).square().sum(dtype=torch.float64))
            centres = moved
            if movement <= tol * data.variance:
                break
        clusters.move(centres)
        assignments = clusters.assignments
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
    sums = summed(of_rows, assignments, len(centroids))
    total, counts = (sums if world is None else world.total(sums)).unbind(1)
    found = total / (counts.clamp(min=1) * (counts + alpha).log())
    several = counts > 1
    found = torch.where(several, found, found.masked_fill(~several, 0).amax())
    found = found.clamp(*torch.quantile(found, torch.tensor([0.1, 0.9], dtype=found.dtype, device=found.device)))
    mean = found.mean()
    found = torch.where(mean > 0, found / mean, 1) * temperature
    return found.masked_fill(mean.isnan(), torch.nan).to(centroids.dtype)


def _seed(generator: torch.Generator | None) -> int:
    device = "cpu" if generator is None else generator.device
    return int(torch.randint(2**62, (), generator=generator, device=device))


def _initial(data: ClusteredRows, k: int, init: str, seed: int) -> Tensor:
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
