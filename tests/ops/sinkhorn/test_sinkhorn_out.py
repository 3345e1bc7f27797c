"""Assignments in memory that the caller gives: the same numbers, that memory, and what is refused."""

import pytest
import torch
from torch import Tensor

import fastcl
from tests.support.backends import BACKENDS, VARIANTS, running
from tests.support.strategies import DTYPES, generator


def scores(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed)).to(dtype)


def room(like: Tensor, strides: str = "contiguous") -> Tensor:
    """Memory for the assignments, full of NaN."""
    *outer, n, k = like.shape
    if strides == "columns first":
        return torch.full((*outer, k, n), torch.nan, dtype=like.dtype).mT
    if strides == "part of more":
        return torch.full((*outer, n + 2, k + 3), torch.nan, dtype=like.dtype)[..., 1:-1, 2:-1]
    return torch.full_like(like, torch.nan)


@pytest.mark.parametrize("strides", ["contiguous", "columns first", "part of more"])
@pytest.mark.parametrize("shape", [(13, 7), (2, 13, 7)], ids=["one", "batch"])
@pytest.mark.parametrize("tol", [None, 1e-3])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_same_numbers_in_that_memory(variant, dtype, tol, shape, strides) -> None:
    values = scores(*shape, dtype=dtype)
    out = room(values, strides)
    with running(variant):
        expected = fastcl.sinkhorn(values, epsilon=0.3, n_iters=4, tol=tol)
        result = fastcl.sinkhorn(values, epsilon=0.3, n_iters=4, tol=tol, out=out)
    assert result.assignments is out
    assert torch.equal(out, expected.assignments)
    for name in ("row_potential", "col_potential"):
        assert torch.equal(getattr(result, name), getattr(expected, name)), name
    assert torch.equal(torch.as_tensor(result.n_iters), torch.as_tensor(expected.n_iters))


@pytest.mark.skipif("cpu" not in BACKENDS, reason="no native module")
def test_the_engine_allocates_no_other_matrix() -> None:
    values = scores(301, 257)
    out = torch.empty_like(values)
    with fastcl.use_backend("cpu"), torch.profiler.profile(profile_memory=True) as profile:
        fastcl.sinkhorn(values, out=out)
    taken = [event.self_cpu_memory_usage for event in profile.events()]
    assert taken
    assert max(taken) < values.nbytes / 4


def test_nothing_of_a_former_call_is_left() -> None:
    out = torch.empty(40, 9)
    for seed in range(3):
        values = scores(40, 9, seed=seed)
        fastcl.sinkhorn(values, out=out)
        assert torch.equal(out, fastcl.sinkhorn(values).assignments)


def test_a_loss_whose_targets_are_overwritten_raises() -> None:
    out, logits = torch.empty(6, 4), scores(6, 4).requires_grad_()
    targets = fastcl.sinkhorn(scores(6, 4), out=out).assignments
    loss = -(targets * logits.log_softmax(1)).sum()
    fastcl.sinkhorn(scores(6, 4, seed=1), out=out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_cost_is_that_of_the_call(dtype: torch.dtype) -> None:
    values = scores(6, 4, dtype=dtype)
    out = torch.empty_like(values)
    first = fastcl.sinkhorn(values, out=out)
    fastcl.sinkhorn(scores(6, 4, dtype=dtype, seed=1), out=out)
    torch.testing.assert_close(first.transport_cost, fastcl.sinkhorn(values).transport_cost)


def test_the_cost_does_not_follow_later_changes() -> None:
    values, start, epsilon = scores(6, 4), scores(4, seed=2), torch.tensor(0.3)
    expected = fastcl.sinkhorn(values, epsilon=0.3, init=start).transport_cost
    result = fastcl.sinkhorn(values, epsilon=epsilon, init=start, out=torch.empty(6, 4))
    start.zero_()
    epsilon.fill_(2.0)
    torch.testing.assert_close(result.transport_cost, expected)


def test_without_rows_and_under_inference_mode() -> None:
    empty = scores(0, 6, 4)
    assert fastcl.sinkhorn(empty, out=room(empty)).assignments.shape == (0, 6, 4)
    with torch.inference_mode():
        values = scores(6, 4)
        assert torch.equal(fastcl.sinkhorn(values, out=room(values)).assignments, fastcl.sinkhorn(values).assignments)


def test_without_a_gradient_but_with_parameters() -> None:
    values = torch.nn.Parameter(scores(6, 4))
    with torch.no_grad():
        result = fastcl.sinkhorn(values, epsilon=torch.tensor(0.3, requires_grad=True), out=room(values.detach()))
    assert not result.assignments.requires_grad


def test_in_one_graph_of_the_compiler() -> None:
    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(values: Tensor, out: Tensor) -> Tensor:
        return fastcl.sinkhorn(values, out=out).assignments * 2

    values = scores(6, 4)
    out = room(values)
    expected = fastcl.sinkhorn(values).assignments
    torch.testing.assert_close(step(values, out), expected * 2)
    torch.testing.assert_close(out, expected)


VALUES = scores(6, 4)
PART = scores(8, 4)
REFUSED = {
    "a number": (0.5, TypeError, "out: expected a tensor, got float"),
    "another dtype": (VALUES.double(), TypeError, "out: expected the scores' dtype torch.float32, got torch.float64"),
    "another shape": (VALUES.T.clone(), ValueError, r"out: expected the scores' shape \[6, 4\], got \[4, 6\]"),
    "a batch": (VALUES[None].clone(), ValueError, r"out: expected the scores' shape \[6, 4\], got \[1, 6, 4\]"),
    "another device": (VALUES.to("meta"), ValueError, "out: expected a tensor on cpu, got one on meta"),
    "one row for all": (torch.empty(1, 4).expand(6, 4), ValueError, r"out: .*got strides \[0, 1\]"),
    "rows that overlap": (torch.empty(30).as_strided((6, 4), (2, 1)), ValueError, r"out: .*got strides \[2, 1\]"),
    "itself": (VALUES, ValueError, "out: expected memory apart from that of the scores"),
    "sparse": (VALUES.to_sparse(), TypeError, "out: expected a dense tensor"),
    "a leaf": (VALUES.clone().requires_grad_(), ValueError, "out: expected None where a gradient is asked for"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    out, error, message = REFUSED[case]
    before = VALUES.clone()
    with pytest.raises(error, match=message):
        fastcl.sinkhorn(VALUES, out=out)
    assert torch.equal(VALUES, before)


def test_rows_that_overlap_the_scores_are_refused() -> None:
    with pytest.raises(ValueError, match="out: expected memory apart from that of the scores"):
        fastcl.sinkhorn(PART[:6], out=PART[2:])
    apart = torch.cat((PART, PART))
    assert torch.equal(fastcl.sinkhorn(apart[:8], out=apart[8:]).assignments, fastcl.sinkhorn(PART).assignments)


@pytest.mark.parametrize("learned", ["scores", "epsilon", "prior", "row_marginal"])
def test_where_a_gradient_is_asked_for(learned: str) -> None:
    arguments = {"epsilon": torch.tensor(0.3), "prior": torch.rand(4) + 0.1, "row_marginal": torch.rand(6) + 0.1}
    arguments = {"scores": VALUES.clone(), **arguments}
    arguments[learned].requires_grad_()
    with pytest.raises(ValueError, match="out: expected None where a gradient is asked for"):
        fastcl.sinkhorn(**arguments, out=torch.empty(6, 4))
