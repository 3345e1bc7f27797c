"""Infinite numbers in rows that are not normalised: never a finite loss, and no harm where they take no part."""

import pytest
import torch

import fastcl
from fastcl.functional import cluster_infonce
from tests.support.backends import VARIANTS, running
from tests.support.strategies import generator


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest):
    with running(request.param):
        yield request.param


def positive_rows(n: int, seed: int) -> torch.Tensor:
    """Rows whose products with a row of -inf are -inf."""
    return torch.rand(n, 5, generator=generator(seed)) + 0.1


@pytest.mark.parametrize("value", [torch.inf, -torch.inf])
@pytest.mark.parametrize("options", [{}, {"margin": 0.1}, {"form": "inside"}, {"label_smoothing": 0.1}])
def test_an_infinite_negative_makes_the_losses_that_meet_it_not_a_number(variant, value, options) -> None:
    x, y = positive_rows(6, 0), positive_rows(8, 1)
    clean = cluster_infonce(x, contrasts=y, normalize=False, reduction="none", **options)
    y[7, 2] = value
    loss = cluster_infonce(x, contrasts=y, normalize=False, reduction="none", **options)
    assert loss.isnan().all()
    assert cluster_infonce(x, contrasts=y, normalize=False, **options).isnan()
    ids = {"ids": torch.arange(6) % 2, "contrast_ids": torch.tensor([-1] * 7 + [0])}
    some = cluster_infonce(x, contrasts=y, normalize=False, reduction="none", **options, **ids)
    assert some[1::2].isnan().all()
    assert some[::2].isfinite().all()
    bias = torch.zeros(8)
    bias[7] = -torch.inf
    left_out = cluster_infonce(x, contrasts=y, normalize=False, contrast_bias=bias, reduction="none", **options)
    assert left_out.isfinite().all()
    assert (left_out <= clean + 1e-6).all() or options.get("label_smoothing")


def test_statistics(variant) -> None:
    x, y = positive_rows(4, 2), positive_rows(5, 3)
    y[4] = -torch.inf
    clusters = torch.arange(4), torch.tensor([0, 1, 2, 3, -1])
    want = ("lse_all", "lse_pos", "lse_neg", "sum_pos", "sum_all")
    stats = fastcl.contrastive_stats(x, y, *clusters, want=want, both=True)
    for name in ("lse_all", "lse_neg", "sum_all"):
        assert getattr(stats, name).isnan().all(), name
        assert getattr(stats.reverse, name)[4].isnan(), name
        assert getattr(stats.reverse, name)[:4].isfinite().all(), name
    for name in ("lse_pos", "sum_pos"):
        assert getattr(stats, name).isfinite().all(), name
    x[0] = torch.inf
    empty = fastcl.contrastive_stats(x, y[:0], want=("lse_all", "sum_all"))
    assert torch.equal(empty.lse_all, torch.full((4,), -torch.inf))
    assert torch.equal(empty.sum_all, torch.zeros(4))


def test_a_summary_shows_it(variant) -> None:
    x, y = positive_rows(4, 4), positive_rows(5, 5)
    y[4] = -torch.inf
    loss, stats = cluster_infonce(x, contrasts=y, normalize=False, return_stats=True)
    assert loss.isnan()
    assert stats.negative_similarity.isnan()
    assert stats.entropy.isnan()


def test_soft_assignments(variant) -> None:
    x, y = positive_rows(4, 6), positive_rows(5, 7)
    y[4] = -torch.inf
    r, q = torch.rand(4, 3, generator=generator(8)), torch.rand(5, 3, generator=generator(9))
    assert cluster_infonce(x, contrasts=y, assignments=r, contrast_assignments=q, normalize=False).isnan()
