"""k-means against loops written out and scikit-learn."""

import math
import pickle

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from torch import Tensor
from torch.nn import functional as F

import fastcl
from fastcl import clustered_rows, clustering, kmeans, lloyd
from fastcl.lloyd import Lloyd
from tests.support.strategies import generator


@pytest.fixture(autouse=True)
def bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """So few products have them too."""
    monkeypatch.setattr(lloyd, "FEW_PRODUCTS", 0)


def blobs(n: int = 300, d: int = 6, k: int = 7, noise: float = 0.6, dtype: torch.dtype = torch.float64) -> Tensor:
    g = generator(1)
    centres = torch.randn(k, d, generator=g, dtype=torch.float64) + 3
    noisy = noise * torch.randn(n, d, generator=g, dtype=torch.float64)
    return (centres[torch.randint(0, k, (n,), generator=g)] + noisy).to(dtype)


def plain(rows: Tensor, centres: Tensor, n_iters: int, spherical: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Lloyd's loop in float64, for clusters that keep rows."""
    rows, centres = rows.double(), centres.double()
    if spherical:
        rows, centres = F.normalize(rows, dim=1), F.normalize(centres, dim=1)
    for step in range(n_iters + 1):
        distances = torch.cdist(rows, centres, compute_mode="donot_use_mm_for_euclid_dist")
        nearest = distances.argmin(1)
        if step < n_iters:
            centres = torch.stack([rows[nearest == j].mean(0) for j in range(len(centres))])
            centres = F.normalize(centres, dim=1) if spherical else centres
    return centres, nearest, distances.amin(1).square().sum()


@pytest.mark.parametrize("spherical", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_is_lloyds_loop(spherical: bool, dtype: torch.dtype, backend: str) -> None:
    rows = blobs(90, dtype=dtype).requires_grad_()
    with fastcl.use_backend(backend), torch.autocast("cpu", torch.bfloat16):
        found = kmeans(rows, 7, init=rows[:7], n_iters=3, tol=0, spherical=spherical)
    centres, nearest, inertia = plain(rows.detach(), rows.detach()[:7], 3, spherical)
    assert found.centroids.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert not found.centroids.requires_grad
    assert found.n_iters == 3
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(found.centroids.double(), centres, rtol=tolerance, atol=tolerance)
    assert torch.equal(found.assignments, nearest)
    assert found.inertia == pytest.approx(float(inertia), rel=tolerance)


@pytest.mark.parametrize("spherical", [False, True])
def test_blocks_change_nothing(spherical: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = blobs(100)
    whole = kmeans(rows, 5, init=rows[:5], spherical=spherical)
    monkeypatch.setitem(clustering.BLOCK, "cpu", 17 * 6)
    parts = kmeans(rows, 5, init=rows[:5], spherical=spherical)
    torch.testing.assert_close(parts.centroids, whole.centroids)
    assert torch.equal(parts.assignments, whole.assignments)
    assert parts.n_iters == whole.n_iters


@pytest.mark.parametrize("tol", [0.0, 1e-4, 1e-2])
def test_ends_like_scikit_learn(tol: float) -> None:
    rows = blobs(500, noise=1.0)
    theirs = KMeans(7, init=rows[:7].numpy(), n_init=1, tol=tol, max_iter=100).fit(rows.numpy())
    found = kmeans(rows, 7, init=rows[:7], tol=tol)
    # With tol=0 theirs compares assignments, and ends in the iteration that changes none, as ours does.
    assert found.n_iters == theirs.n_iter_ < 100
    assert found.inertia == pytest.approx(theirs.inertia_, rel=1e-9)
    assert (found.assignments.numpy() == theirs.labels_).all()


@pytest.mark.parametrize("spherical", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kept", [True, False])
def test_rows_that_keep_their_centroid_are_left_out(
    spherical: bool, dtype: torch.dtype, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which leaves every iteration as it is, with separate clusters, with one cloud, with equal rows, far from 0."""
    if not kept:
        monkeypatch.setattr(clustered_rows, "KEPT", 0)
        monkeypatch.setitem(clustering.BLOCK, "cpu", 7 * 211)
    searched: list[int] = []
    search, bounded = clustered_rows.ClusteredRows.search, Lloyd._doubtful

    def of_all(self, *args: Tensor) -> Tensor:
        return bounded(self, *args).fill_(True)

    def counting(self, centres: Tensor, k: int, places: Tensor | None = None) -> tuple[Tensor, Tensor]:
        searched.append((len(self.rows) if places is None else len(places)) * len(centres))
        return search(self, centres, k, places)

    monkeypatch.setattr(clustered_rows.ClusteredRows, "search", counting)
    separate = blobs(1500, 7, 12, 0.2, dtype)
    cases = {
        "separate": (separate, separate[:12]),
        "a cloud": (torch.randn(900, 7, generator=generator(0)).to(dtype), None),
        "equal rows": (blobs(40, 7, dtype=dtype).repeat(9, 1), None),
        "far": (separate + 100, separate[:40] + 100),
        "one cluster": (separate, separate[:1]),
        "far movers": (separate, torch.cat([separate[:60], separate[:4] + 50])),
    }
    for name, (rows, init) in cases.items():
        init = rows[::45] if init is None else init
        searched.clear()
        found = kmeans(rows, len(init), init=init, n_iters=25, tol=0, spherical=spherical)
        least = sum(searched)
        for changed in ((Lloyd, "_doubtful", of_all), (lloyd, "FEW_PRODUCTS", 1 << 40)):
            with monkeypatch.context() as all_of_them:
                all_of_them.setattr(*changed)
                searched.clear()
                every = kmeans(rows, len(init), init=init, n_iters=25, tol=0, spherical=spherical)
            if changed[0] is lloyd:
                assert sum(searched) == (every.n_iters + 1) * len(rows) * len(init)
            assert torch.equal(found.assignments, every.assignments), name
            assert torch.equal(found.centroids, every.centroids), name
            assert (found.n_iters, found.inertia) == (every.n_iters, every.inertia)
        if name in ("separate", "far movers"):
            assert least < 0.6 * (found.n_iters + 1) * len(rows) * len(init), name


def test_bounds_hold_in_every_iteration() -> None:
    """Also where centroids move anywhere, and where many move far."""
    g = generator(5)
    rows = torch.randn(400, 5, generator=g)
    data = clustered_rows.ClusteredRows(rows, 50, False, torch.float32, None, [400])
    clusters = Lloyd(data, 50)
    assert clusters.bounded
    centres = torch.randn(50, 5, generator=g)
    for step in range(12):
        clusters.move(centres)
        distances = torch.cdist(rows.double() - data.mean.double(), centres.double())
        own = distances.gather(1, clusters.assignments[:, None])[:, 0]
        others = distances.scatter(1, clusters.assignments[:, None], torch.inf).amin(1)
        assert (own <= clusters._upper).all()
        assert (others >= clusters._lower).all()
        assert torch.equal(clusters.assignments, distances.argmin(1))
        torch.testing.assert_close(
            clusters._sums[:, :-1],
            torch.zeros(50, 5).double().index_add_(0, clusters.assignments, data._kept[:, :-1].double()),
        )
        assert torch.equal(clusters._sums[:, -1], clusters.assignments.bincount(minlength=50).double())
        movement = torch.randn(50, 5, generator=g) * (0.01 + (torch.arange(50) % 9 == step)[:, None])
        centres = centres + movement


def test_the_initialisation_finds_separate_clusters() -> None:
    """Where clusters lie apart, almost every good initialisation has a row of each, and random rows have not."""
    rows = blobs(600, 8, 30, noise=0.05)
    best = KMeans(30, n_init=3, random_state=0).fit(rows.numpy()).inertia_
    found = [kmeans(rows, 30, generator=generator(seed)).inertia for seed in range(5)]
    assert sorted(found)[2] <= 1.01 * best
    assert kmeans(rows, 30, init="random", generator=generator(0)).inertia > 2 * best


@pytest.mark.parametrize("init", ["k-means||", "random"])
@pytest.mark.parametrize("spherical", [False, True])
def test_the_generator_decides(init: str, spherical: bool) -> None:
    rows = blobs(noise=2.0)
    one, same, other = (
        kmeans(rows, 9, init=init, spherical=spherical, generator=generator(seed)) for seed in (3, 3, 4)
    )
    assert torch.equal(one.centroids, same.centroids)
    assert torch.equal(one.assignments, same.assignments)
    assert not torch.equal(one.centroids, other.centroids)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        assert torch.equal(kmeans(rows, 9, init=init, spherical=spherical).centroids, one.centroids)


def test_an_empty_cluster_takes_the_farthest_row() -> None:
    rows = torch.tensor([[0.0], [1.0], [2.0], [50.0], [40.0]])
    init = torch.tensor([[1.0], [900.0], [-900.0]])
    found = kmeans(rows, 3, init=init, n_iters=1)
    assert found.centroids.tolist() == [[1.0], [50.0], [40.0]]
    assert found.assignments.tolist() == [0, 0, 0, 1, 2]
    assert found.inertia == 2


@pytest.mark.parametrize("init", ["k-means||", "random", "tensor"])
@pytest.mark.parametrize("spherical", [False, True])
def test_fewer_different_rows_than_clusters(init: str, spherical: bool) -> None:
    rows = torch.tensor([[3.0, 1.0], [1.0, 2.0]]).repeat(10, 1)
    given = rows[:6] if init == "tensor" else init
    found = kmeans(rows, 6, init=given, spherical=spherical, generator=generator(0))
    assert found.inertia == pytest.approx(0, abs=1e-10)
    assert found.centroids.isfinite().all()
    assert len(found.assignments.unique()) == 2


def test_every_row_a_cluster() -> None:
    rows = blobs(20)
    for init in ("k-means||", "random"):
        found = kmeans(rows, 20, init=init)
        assert found.inertia == pytest.approx(0, abs=1e-20)
        assert sorted(found.assignments.tolist()) == list(range(20))


def test_rows_that_cancel_out_leave_the_centroid() -> None:
    rows = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 0.0]])
    found = kmeans(rows, 1, init=torch.tensor([[0.0, 2.0]]), spherical=True)
    assert found.centroids.tolist() == [[0.0, 1.0]]
    assert found.inertia == 5  # 2 - 2 * 0 twice, and a row of zeros lies at distance 1


def test_no_iterations_assign_rows() -> None:
    rows, others = blobs(), blobs(40, noise=2.0)
    for spherical in (False, True):
        found = kmeans(rows, 7, spherical=spherical, generator=generator(0))
        again = kmeans(rows, 7, init=found.centroids, n_iters=0, spherical=spherical)
        assert torch.equal(again.assignments, found.assignments)
        torch.testing.assert_close(again.centroids, found.centroids)
        assert again.n_iters == 0
        few = kmeans(others[:3], 7, init=found.centroids, n_iters=0, spherical=spherical)
        assert torch.equal(few.assignments, plain(others[:3], found.centroids, 0, spherical)[1])
        none = kmeans(others[:0], 7, init=found.centroids, n_iters=0, spherical=spherical)
        assert none.assignments.shape == (0,)
        assert none.inertia == 0


def test_rows_far_from_the_origin_keep_their_digits() -> None:
    rows = blobs(200, noise=0.1)
    there = kmeans((rows + 1e4).float(), 7, init=(rows[:7] + 1e4).float())
    assert torch.equal(there.assignments, kmeans(rows, 7, init=rows[:7]).assignments)


def plain_concentrations(rows: Tensor, found: fastcl.KMeansResult, temperature: float, alpha: float) -> Tensor:
    """As the authors' code has it, with NumPy's percentiles."""
    density = np.zeros(len(found.centroids))
    for k, centre in enumerate(found.centroids):
        own = rows[found.assignments == k]
        if len(own) > 1:
            density[k] = ((own - centre).square().sum(1) ** 0.5).mean() / math.log(len(own) + alpha)
    sizes = found.assignments.bincount(minlength=len(density))
    density[sizes.numpy() < 2] = density.max()
    density = density.clip(np.percentile(density, 10), np.percentile(density, 90))
    return torch.from_numpy(temperature * density / density.mean())


@pytest.mark.parametrize("options", [(0.2, 10.0), (0.5, 1.0)])
def test_concentrations_are_the_authors(options: tuple[float, float], monkeypatch: pytest.MonkeyPatch) -> None:
    rows = F.normalize(torch.cat([blobs(200), torch.full((1, 6), -9.0, dtype=torch.float64)]), dim=1)
    found = kmeans(rows, 12, spherical=True, init=rows[-12:])
    assert 1 in found.assignments.bincount()
    temperature, alpha = options
    expected = plain_concentrations(rows, found, temperature, alpha)
    for block in (1 << 22, 50):
        monkeypatch.setitem(clustering.BLOCK, "cpu", block)
        got = fastcl.cluster_concentrations(rows.requires_grad_(), found, temperature=temperature, alpha=alpha)
        torch.testing.assert_close(got, expected)
        assert not got.requires_grad
    halves = fastcl.cluster_concentrations(rows.bfloat16(), found, temperature=temperature, alpha=alpha)
    torch.testing.assert_close(halves, expected, rtol=0.05, atol=0)


def test_concentrations_of_clusters_without_extent() -> None:
    rows = torch.eye(4)
    assert fastcl.cluster_concentrations(rows, kmeans(rows, 4, init=rows)).tolist() == pytest.approx([0.2] * 4)
    nothing = kmeans(rows[:0], 4, init=rows, n_iters=0)
    assert fastcl.cluster_concentrations(rows[:0], nothing).tolist() == pytest.approx([0.2] * 4)
    assert fastcl.cluster_concentrations(rows * torch.nan, kmeans(rows, 2, init=rows[:2])).isnan().all()


def test_strides_and_pickles() -> None:
    rows = blobs(60)
    expected = kmeans(rows, 4, init=rows[:4])
    found = kmeans(rows.T.contiguous().T, 4, init=rows.T.contiguous().T[:4])
    assert torch.equal(found.assignments, expected.assignments)
    copy = pickle.loads(pickle.dumps(found))
    assert isinstance(copy, fastcl.KMeansResult)
    assert torch.equal(copy.centroids, found.centroids)


x = torch.randn(5, 3, generator=generator(0))
WRONG = {
    "rows": (lambda: kmeans(x[0], 2), r"rows: expected shape \[N, D\], got \[3\]"),
    "no rows": (lambda: kmeans(x[:0], 1), "k: expected at most the number of rows, 0, got 1"),
    "k": (lambda: kmeans(x, 6), "k: expected at most the number of rows, 5, got 6"),
    "k 0": (lambda: kmeans(x, 0), "k: expected at least 1, got 0"),
    "spherical": (lambda: kmeans(x, 2, spherical=1), "spherical: expected True or False, got 1"),
    "init": (lambda: kmeans(x, 2, init="kmeans"), "init: expected one of 'k-means||', 'random', got 'kmeans'"),
    "init kind": (lambda: kmeans(x, 2, init=None), "init: expected a string or a tensor, got None"),
    "init shape": (lambda: kmeans(x, 2, init=x), r"init: expected shape \[2, 3\], got \[5, 3\]"),
    "init NaN": (lambda: kmeans(x, 2, init=x[:2] * torch.nan), "init: expected finite numbers, got others"),
    "init absent": (lambda: kmeans(x, 2, n_iters=0), "init: expected a tensor of centroids with n_iters=0, got"),
    "n_iters": (lambda: kmeans(x, 2, n_iters=-1), "n_iters: expected at least 0, got -1"),
    "tol": (lambda: kmeans(x, 2, tol=-1.0), "tol: expected a number of at least 0, got -1.0"),
    "generator": (lambda: kmeans(x, 2, generator=3), "generator: expected a torch.Generator, got int"),
    "clusters": (
        lambda: fastcl.cluster_concentrations(x, (x, x)), "clusters: expected a KMeansResult, got tuple"
    ),
    "rows of clusters": (
        lambda: fastcl.cluster_concentrations(x[:3], kmeans(x, 2)), "rows: expected the 5 rows of the clusters, got 3"
    ),
    "alpha": (lambda: fastcl.cluster_concentrations(x, kmeans(x, 2), alpha=0), "alpha: expected a positive number"),
    "group": (lambda: kmeans(x, 2, group=3), "group: expected a torch.distributed process group or None, got int"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_bad_input(case: str) -> None:
    call, message = WRONG[case]
    with pytest.raises((TypeError, ValueError), match=f"^{message}".replace("||", r"\|\|")):
        call()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("spherical", [False, True])
def test_rows_that_are_no_numbers(bad: float, spherical: bool) -> None:
    rows = x.clone()
    rows[3, 1] = bad
    for init, n_iters in ((x[:2], 5), (x[:2], 0), ("random", 5)):
        with pytest.raises(ValueError, match=r"^rows: expected finite numbers"):
            kmeans(rows, 2, init=init, n_iters=n_iters, spherical=spherical)
