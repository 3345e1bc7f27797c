"""A NaN in a row that takes part makes the loss and its statistics NaN; it is never taken for an empty set."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import fastcl
from fastcl import checks
from fastcl.functional import cluster_infonce
from fastcl.losses.formulas import _log_difference
from tests.support.backends import VARIANTS, running
from tests.support.emulated import emulating
from tests.support.pairs import pairs
from tests.support.strategies import generator

N, M, D = 7, 23, 9
NOT_NUMBERS = (torch.nan, torch.inf, -torch.inf)
FIELDS = ("lse_all", "lse_pos", "lse_neg", "sum_pos", "max_pos", "max_neg", "sum_neg", "entropy")


EVERYWHERE = (*VARIANTS, "cuda")


@pytest.fixture(params=EVERYWHERE)
def variant(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every backend, and the CUDA kernels on the emulator."""
    if request.param == "cuda":
        with emulating(), fastcl.use_backend("cuda"):
            yield "cuda"
    else:
        with running(request.param) as name:
            yield name


def rows(n: int, seed: int) -> Tensor:
    return torch.randn(n, D, generator=generator(seed))


def with_a(number: float, values: Tensor, row: int) -> Tensor:
    values = values.clone()
    values[row, 4] = number
    return values


@pytest.mark.parametrize("temperature", [0.5, 0.005])
def test_a_stored_row_reaches_every_anchor_of_moco(temperature: float, variant: str) -> None:
    x, key = rows(N, 0).requires_grad_(), rows(N, 1)
    for bad in NOT_NUMBERS:
        queue = fastcl.MemoryQueue(M, D)
        queue.enqueue(with_a(bad, rows(M, 2), 3))
        for options in ({}, {"margin": 0.1}):
            loss = fastcl.MoCoLoss(temperature, reduction="none", **options)
            each, stats = loss(x, key, queue, return_stats=True)
            assert each.isnan().all()
            assert not stats.positive_similarity.isnan().any()
            for value in (stats.top1, stats.negative_similarity, stats.entropy):
                assert value.isnan().all()
        (gradient,) = torch.autograd.grad(each.sum(), x)
        assert gradient.isnan().any()
        means = fastcl.MoCoLoss(temperature)(x, key, queue, return_stats=True)
        assert means[0].isnan()
        assert [value.isnan().item() for value in means[1][:4]] == [True, False, True, True]


def test_an_extra_positive_reaches_its_anchor(variant: str) -> None:
    x, key = rows(N, 0), with_a(torch.nan, rows(N, 1), 2)
    expected = torch.arange(N) == 2
    for queue in (rows(M, 2), rows(0, 2)):
        loss, stats = fastcl.MoCoLoss(0.3, reduction="none")(x, key, queue, return_stats=True)
        assert torch.equal(loss.isnan(), expected)
        for value in (stats.top1, stats.positive_similarity, stats.entropy):
            assert torch.equal(value.isnan(), expected)


def test_a_key_is_all_there_is_where_every_other_logit_is_minus_infinity() -> None:
    """Finite rows whose product overflows float32: their sum is 0, and its base is undefined."""
    x, queue = torch.tensor([[1e20, 1.0]]), torch.tensor([[-1e20, 0.0]])
    for backend in ("reference", "chunked"):
        with fastcl.use_backend(backend):
            loss = fastcl.MoCoLoss(1.0, normalize=False)(x, torch.tensor([[0.0, -500.0]]), queue)
        assert loss == 0


@pairs("variant", variant=EVERYWHERE, tau_plus=[0.0, 0.1], beta=[0.0, 1.0])
def test_a_negative_reaches_debiased_and_hard_losses(beta: float, tau_plus: float, variant: str) -> None:
    x = rows(N, 0).requires_grad_()
    for bad in NOT_NUMBERS:
        y = with_a(bad, rows(M, 1), M - 1)  # positive of no anchor
        loss = fastcl.HardNegativeLoss(0.5, tau_plus, beta)(x, contrasts=y)
        assert loss.isnan()
        assert torch.autograd.grad(loss, x)[0].isnan().any()


def test_difference_of_exponentials() -> None:
    a = torch.tensor([1.0, 3.0, 2.0, torch.nan, 1.0, torch.inf, 5.0, -torch.inf], dtype=torch.float64)
    b = torch.tensor([0.0, 3.0, 4.0, 1.0, torch.nan, 1.0, -torch.inf, -torch.inf], dtype=torch.float64)
    got = _log_difference(a, b)
    expected = torch.where(b >= a, -torch.inf, (a.exp() - b.exp()).log())
    torch.testing.assert_close(got, expected, equal_nan=True)


@pairs("variant", variant=EVERYWHERE, temperature=[0.5, 0.005], normalize=[True, False])
def test_statistics_of_both_sides(normalize: bool, temperature: float, variant: str) -> None:
    """A contrast's NaN is in all statistics of its own row, and in those of the anchors that have it in their set."""
    n, m = (40, 31) if variant in ("triton", "cuda") else (210, 260)
    x, y = rows(n, 0), with_a(torch.nan, rows(m, 1), m - 1)
    clusters, others = torch.arange(n) % 3, torch.arange(m) % 3
    stats = fastcl.contrastive_stats(
        x, y, clusters, others, logit_scale=1 / temperature, normalize_anchors=normalize, normalize_contrasts=normalize,
        both=True, want=FIELDS,
    )  # fmt: skip
    assert stats.reverse is not None
    positive = clusters == others[-1]
    for name in FIELDS:
        own = ~positive if "neg" in name else positive if "pos" in name else torch.ones(n, dtype=torch.bool)
        assert torch.equal(getattr(stats, name).isnan(), own), name
        assert torch.equal(getattr(stats.reverse, name).isnan(), torch.arange(m) == m - 1), name
    assert not stats.num_pos.isnan().any()


@pytest.mark.parametrize("backend", ["cpu", "chunked"])
def test_in_compiled_functions(backend: str) -> None:
    """Values cannot be read there; a NaN in a prior must show too."""
    if backend not in fastcl.ops.backends.choose.AVAILABLE:
        pytest.skip(f"no backend {backend}")
    x, y = rows(N, 0), rows(N, 1)
    queue = with_a(torch.nan, rows(M, 2), 3)
    prior = torch.tensor([torch.nan, 1.0, 2.0])
    msn = fastcl.MSNLoss(prior=prior, n_iters=0, kl="prior_mean")
    calls: dict[str, Any] = {
        "queue": lambda: fastcl.MoCoLoss(0.3)(x, y, queue),
        "prior": lambda: fastcl.sinkhorn(x[:, :3], prior=prior).assignments.sum(),
        "prior of the regulariser": lambda: msn(x, y, x[:3]),
    }
    with fastcl.use_backend(backend):
        for name, call in calls.items():
            torch.compiler.reset()
            assert torch.compile(call, fullgraph=True, backend="aot_eager")().isnan(), name


def test_assignments(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights of positives; values are not checked, as on a device."""
    if variant == "cuda":
        pytest.skip("cuda has no soft assignments: an error, see test_cuda_emulator.py")
    monkeypatch.setattr(checks, "values_visible", lambda tensor: False)
    x, weights = rows(N, 0).requires_grad_(), with_a(torch.nan, rows(N, 2).abs(), 3)
    for options in ({}, {"contrasts": rows(N, 1)}):
        loss = cluster_infonce(x, assignments=weights, **options)
        assert loss.isnan()
        assert torch.autograd.grad(loss, x)[0].isnan().any()


@pytest.mark.parametrize("alpha", [1.0, 2.0])
def test_alignment(alpha: float) -> None:
    assert fastcl.alignment(with_a(torch.nan, rows(N, 0), 1), rows(N, 1), alpha).isnan()
