"""Sinkhorn's CUDA kernels on the emulator: passes against dense ones in float64, and all iterations in one launch."""

from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

import fastcl
from fastcl.ops.backends import choose, cuda_runtime
from fastcl.ops.sinkhorn import cuda as sinkhorn_cuda
from tests.ops.sinkhorn import test_sinkhorn
from tests.support.emulated import emulating
from tests.support.sinkhorn_passes import (
    PASSES,
    assignment_gradient,
    check,
    check_no_rows,
    column_sums,
    plain,
    problem,
    products,
    row_pass,
    spread,
)
from tests.support.strategies import generator


@pytest.fixture(autouse=True, scope="module")
def emulated() -> Iterator[None]:
    with emulating():
        yield


# One column; a row for one warp, the longest of these and one more; for all warps of a block; and longer ones.
@pytest.mark.parametrize(("n", "k"), [(5, 1), (131, 33), (37, 512), (7, 513), (3, 8192), (3, 8193)])
@pytest.mark.parametrize("which", PASSES, ids=lambda which: which.__name__)
def test_a_pass_is_the_dense_one(which, n, k) -> None:
    check(which, problem(2 if k < 1000 else 1, n, k, torch.float32, plain), sinkhorn_cuda)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("k", [20, 700])
@pytest.mark.parametrize("which", PASSES, ids=lambda which: which.__name__)
def test_half_precision_and_strides(which, k, dtype) -> None:
    check(which, problem(2, 9, k, dtype, spread), sinkhorn_cuda)


@pytest.mark.parametrize("which", PASSES, ids=lambda which: which.__name__)
def test_no_rows(which) -> None:
    check_no_rows(which, sinkhorn_cuda, 20)


@pytest.mark.parametrize("which", [column_sums, row_pass, products, assignment_gradient])
def test_chunks_add_up(which, monkeypatch) -> None:
    a = problem(1, 150, 70, torch.float32, plain)
    monkeypatch.setattr(sinkhorn_cuda, "LEAST_CHUNK", 1)
    for size in (17, 64, 512):
        monkeypatch.setattr(sinkhorn_cuda, "CHUNK", size)
        check(which, a, sinkhorn_cuda)


def test_whom_it_serves() -> None:
    with fastcl.use_backend("cuda"):
        assert choose.choose_backend(torch.device("cpu"), torch.float32, "sinkhorn") == "cuda"
        assert choose.choose_backend(torch.device("cpu"), torch.float64, "sinkhorn") == "chunked"


# All iterations in one launch


@settings(max_examples=40)
@given(case=test_sinkhorn.problems())
def test_values_and_gradients_follow_the_formula(case: test_sinkhorn.Case) -> None:
    with fastcl.use_backend("cuda"):
        test_sinkhorn.compare(case)


@pytest.mark.parametrize(
    "test",
    [
        test_sinkhorn.test_a_batch_is_its_problems_one_by_one,
        test_sinkhorn.test_rows_without_mass_have_no_influence,
        test_sinkhorn.test_a_tolerance_is_met_and_reported,
        test_sinkhorn.test_a_tolerance_that_was_missed_differentiates_the_iterations,
        test_sinkhorn.test_a_problem_of_nan_leaves_the_gradient_of_its_batch_alone,
    ],
    ids=lambda test: test.__name__,
)
def test_what_holds_on_every_backend(test) -> None:
    with fastcl.use_backend("cuda"):
        test("cuda")


@pytest.mark.parametrize("kind", ["uniform", "zeros"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_small_epsilon_and_large_scores(kind: str, dtype: torch.dtype) -> None:
    test_sinkhorn.test_small_epsilon_and_large_scores("cuda", kind, dtype)


def outputs(scores: Tensor, **options: Any) -> tuple[Tensor, ...]:
    """The results for a problem whose priors and row masses are far from uniform, some of them zero."""
    n, k = scores.shape[-2:]
    prior, rows = (torch.rand(size, generator=generator(size)) for size in (k, n))
    prior[k // 3] = 0
    rows[n // 2] += -rows[n // 2] if n > 1 else 0
    with fastcl.use_backend("cuda"):
        result = fastcl.sinkhorn(scores, epsilon=0.1, prior=prior, row_marginal=rows, **options)
    extra = () if result.marginal_error is None else (result.marginal_error, result.n_iters)
    return (result.assignments, result.row_potential, result.col_potential, *extra)


@pytest.fixture
def launches(monkeypatch) -> list[tuple[int, ...]]:
    """The arguments of every launch of all iterations: chunks, and whether the scores stay on the chip."""
    seen = []
    inner = cuda_runtime.kernels().sinkhorn_iterations
    kernels = mock.Mock(wraps=cuda_runtime.kernels())

    def counted(where, call, tolerance) -> None:
        seen.append(call[10:12])
        inner(where, call, tolerance)

    kernels.sinkhorn_iterations = counted
    kernels.sinkhorn_whole, kernels.emulated = cuda_runtime.kernels().sinkhorn_whole, True
    monkeypatch.setattr(cuda_runtime, "kernels", lambda: kernels)
    return seen


# A row for one warp and for several; scores that stay on the chip and scores that do not; one chunk and several.
@pytest.mark.parametrize(("shape", "stays"), [((1, 3), 1), ((50, 37), 1), ((2, 90, 520), 1), ((60, 2100), 0)])
@pytest.mark.parametrize("options", [{"n_iters": 1}, {"n_iters": 4}, {"n_iters": 12, "tol": 1e-2}], ids=str)
def test_one_launch_is_the_passes_one_after_another(shape, stays, options, launches, monkeypatch) -> None:
    scores = torch.randn(*shape, generator=generator(0))
    if len(shape) == 3:
        scores[0, 5, 7] = torch.nan  # in one problem; the others continue
    at_once = outputs(scores, **options)
    assert [stayed for _, stayed in launches] == [stays]
    monkeypatch.setattr(sinkhorn_cuda, "iterate", lambda *_: None)
    one_by_one = outputs(scores, **options)
    assert len(launches) == 1
    for got, expected in zip(at_once, one_by_one, strict=True):
        torch.testing.assert_close(got, expected, rtol=2e-5, atol=2e-6, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bits_wherever_the_scores_are_and_in_whatever_order_threads_run(dtype, launches, monkeypatch) -> None:
    """If a barrier were missing, a thread would read too early in one of the orders."""
    scores = torch.randn(2, 40, 600, generator=generator(0)).to(dtype)
    strided = torch.empty(40, 2, 1200, dtype=dtype).transpose(0, 1)[:, :, ::2].copy_(scores)
    for options in ({"n_iters": 3}, {"n_iters": 9, "tol": 1e-2}):
        first = outputs(scores, **options)
        for order in ("backward", "1"):
            monkeypatch.setenv("FASTCL_EMULATOR_ORDER", order)
            assert all(map(torch.equal, first, outputs(scores, **options)))
        plan = cuda_runtime.kernels().sinkhorn_plan(0, 2, 40, 600, scores.element_size())
        monkeypatch.setattr(cuda_runtime.kernels(), "sinkhorn_plan", lambda *_, plan=plan: (*plan[:2], False))
        assert all(map(torch.equal, first, outputs(strided, **options)))
        assert {stayed for _, stayed in launches} == {True, False}


def test_who_goes_through_the_passes(launches) -> None:
    """Rows that do not fit in a block; more problems than multiprocessors."""
    outputs(torch.randn(3, 8193, generator=generator(0)), n_iters=2)
    outputs(torch.randn(5, 4, 3, generator=generator(0)), n_iters=2)
    assert not launches


def test_the_plan_deals_out_every_row_once() -> None:
    """For all sizes: chunks hold all rows, none is empty, there is a block for each, and scores that stay fit."""
    plan = cuda_runtime.kernels().sinkhorn_plan
    for batch in (1, 2, 3, 4, 5):
        for n in (1, 2, 3, 4, 5, 7, 100, 1001):
            for k in (1, 31, 512, 513, 8192, 8193):
                chunk, chunks, stays = plan(0, batch, n, k, 4)
                if batch > cuda_runtime.kernels().processors(0) or k > 8192:
                    assert chunks == 0
                    continue
                assert (chunks - 1) * chunk < n <= chunks * chunk
                assert batch * chunks <= cuda_runtime.kernels().processors(0)
                assert not stays or chunk * k * 4 < 99 << 10
