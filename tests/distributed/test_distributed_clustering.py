"""k-means with rows shared out over three gloo processes, one of them without rows."""

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch import distributed as dist

from fastcl import KMeansResult, cluster_concentrations, kmeans
from tests.support.distributed_cases import spread
from tests.support.strategies import generator

SIZES = (17, 0, 23)


def rows() -> Tensor:
    g = generator(2)
    return (
        torch.randn(sum(SIZES), 4, generator=g, dtype=torch.float64)
        + 3 * torch.randn(5, 4, generator=g)[torch.randint(0, 5, (sum(SIZES),), generator=g)]
    )


def calls(own: Tensor, group: Any) -> dict[str, Any]:
    far = torch.cat([rows()[:3], torch.full((3, 4), 1e3, dtype=torch.float64)])
    return {
        "plain": kmeans(own, 5, init=rows()[:5], group=group),
        "spherical": kmeans(own, 5, init=rows()[:5], spherical=True, group=group),
        "empty clusters": kmeans(own, 6, init=far, n_iters=3, group=group),
        "k-means||": kmeans(own, 5, generator=generator(0), group=group),
        "random": kmeans(own, 5, init="random", generator=generator(0), group=group),
    }


def refused(own: Tensor, **options: Any) -> str:
    try:
        kmeans(own, 5, **options)
    except ValueError as error:
        return str(error)
    return "nothing"


def concentrations_refused(own: Tensor, clusters: KMeansResult) -> str:
    try:
        cluster_concentrations(own, clusters, group=dist.group.WORLD)
    except ValueError as error:
        return str(error)
    return "nothing"


def work(rank: int, world: int) -> dict[str, Any]:
    group = dist.group.WORLD
    own = rows().split(SIZES)[rank]
    damaged = own.clone()
    damaged[:1] = torch.nan if rank == 2 else 0
    shared = kmeans(own, 5, init=rows()[:5], group=group)
    return calls(own, group) | {
        "concentrations": cluster_concentrations(own, shared, group=group),
        "NaN": refused(damaged, group=group),
        "k": refused(own[:1], group=group),
        "rank": refused(own if rank else own[0], group=group),
        "options": refused(own, tol=float(rank), group=group),
        "rows of another call": concentrations_refused(own if rank else own[:1], shared),
    }


@cache
def found() -> list[dict[str, Any]]:
    results, errors = spread(work, len(SIZES))
    assert not errors, errors
    return results


@pytest.mark.parametrize("name", ["plain", "spherical", "empty clusters"])
def test_is_one_process_with_all_rows(name: str) -> None:
    expected = calls(rows(), None)[name]
    each = [result[name] for result in found()]
    assert torch.equal(torch.cat([one.assignments for one in each]), expected.assignments)
    for one in each:
        torch.testing.assert_close(one.centroids, expected.centroids)
        assert one.inertia == pytest.approx(expected.inertia)
        assert one.n_iters == expected.n_iters


@pytest.mark.parametrize("name", ["plain", "empty clusters", "k-means||", "random"])
def test_the_same_centroids_everywhere(name: str) -> None:
    first, *others = (result[name] for result in found())
    for other in others:
        assert torch.equal(other.centroids, first.centroids)
        assert other.inertia == first.inertia
    differences = rows() - first.centroids[torch.cat([result[name].assignments for result in found()])]
    assert first.inertia == pytest.approx(float(differences.square().sum()))


def test_concentrations_of_all_rows() -> None:
    expected = cluster_concentrations(rows(), kmeans(rows(), 5, init=rows()[:5]))
    for result in found():
        torch.testing.assert_close(result["concentrations"], expected)


def test_errors_reach_every_process() -> None:
    assert all(result["NaN"].startswith("rows: expected finite numbers") for result in found())
    assert all(result["k"] == "k: expected at most the number of rows, 2, got 5" for result in found())
    assert found()[0]["rank"].startswith("rows: expected shape [N, D]")
    assert all("error on rank 0: ValueError: rows" in result["rank"] for result in found()[1:])
    assert found()[0]["rows of another call"].startswith("rows: expected the")
    assert all("error on rank 0: ValueError: rows" in result["rows of another call"] for result in found()[1:])
    assert all("tol = [0.0, 1.0, 2.0]" in result["options"] for result in found())
