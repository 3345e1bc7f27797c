"""The direct path of `sinkhorn` on a CPU: which calls take it, and that their results are those of the usual way."""

import pytest
import torch
from torch import Tensor

import fastcl
from fastcl.ops.backends.choose import AVAILABLE
from fastcl.ops.sinkhorn import small
from fastcl.sinkhorn import column_potential
from tests.support.sinkhorn_oracle import log_domain
from tests.support.strategies import DTYPES, generator

pytestmark = pytest.mark.skipif("cpu" not in AVAILABLE, reason="no native engine")
N, K = 13, 7


def scores(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*(shape or (N, K)), generator=generator(seed)).to(dtype)


@pytest.fixture
def taken(monkeypatch) -> list[bool]:
    """Whether each call took the direct path."""
    calls: list[bool] = []
    solve = small.solve

    def watched(*arguments):
        found = solve(*arguments)
        calls.append(found is not None)
        return found

    monkeypatch.setattr(small, "solve", watched)
    return calls


def compare(got: fastcl.SinkhornResult, expected: fastcl.SinkhornResult) -> None:
    for name in ("assignments", "row_potential", "col_potential", "transport_cost"):
        one, other = getattr(got, name), getattr(expected, name)
        assert (one.dtype, one.shape) == (other.dtype, other.shape), name
        assert torch.equal(one.nan_to_num(-9.0), other.nan_to_num(-9.0)), name
    assert (got.n_iters, got.marginal_error) == (expected.n_iters, expected.marginal_error)


VALUES = {
    "rows": lambda dtype: scores(dtype=dtype),
    "one number": lambda dtype: scores(1, 1, dtype=dtype),
    "one column": lambda dtype: scores(N, 1, dtype=dtype),
    "columns first": lambda dtype: scores(K, N, dtype=dtype).T,
    "every other": lambda dtype: scores(2 * N, 3 * K, dtype=dtype)[::2, ::3],
    "masked": lambda dtype: scores(dtype=dtype).masked_fill(torch.eye(N, K, dtype=torch.bool), -torch.inf),
    "not a number": lambda dtype: scores(dtype=dtype).index_fill(0, torch.tensor(3), torch.nan),
    "large": lambda dtype: scores(dtype=dtype) * 1e3,
    "many": lambda dtype: scores(301, 258, dtype=dtype),
}


@pytest.mark.parametrize(("epsilon", "n_iters"), [(0.05, 3), (1.0, 1), (0.3, 8)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", VALUES)
def test_results_are_those_of_the_usual_way(case, dtype, epsilon, n_iters, taken, monkeypatch) -> None:
    values = VALUES[case](dtype)
    got = fastcl.sinkhorn(values, epsilon=epsilon, n_iters=n_iters)
    assert taken == [True]
    monkeypatch.setattr(small, "MOST_ROWS", 0)
    expected = fastcl.sinkhorn(values, epsilon=epsilon, n_iters=n_iters)
    assert taken == [True, False]
    compare(got, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_is_the_formula(dtype: torch.dtype, taken) -> None:
    values = scores(61, 29, dtype=dtype)
    got = fastcl.sinkhorn(values, epsilon=0.3).assignments
    wide = [torch.ones(size, dtype=torch.float64) for size in (29, 61)]
    expected = log_domain(values.double(), torch.tensor(0.3, dtype=torch.float64), *wide, 3).assignments
    assert taken == [True]
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=1e-12 if dtype == torch.float64 else 1e-6)


OTHERS = {
    "a prior": {"prior": torch.ones(K)},
    "row masses": {"row_marginal": torch.ones(N)},
    "a tolerance": {"tol": 1e-3},
    "a start": {"init": torch.zeros(K)},
    "memory": {"out": torch.empty(N, K)},
    "a tensor": {"epsilon": torch.tensor(0.3)},
    "an integer": {"epsilon": 1},
}


@pytest.mark.parametrize("case", OTHERS)
def test_other_arguments_go_the_usual_way(case: str, taken) -> None:
    fastcl.sinkhorn(scores(), **OTHERS[case])
    assert True not in taken


def test_gradients_and_other_tensors_go_the_usual_way(taken) -> None:
    fastcl.sinkhorn(scores().requires_grad_()).assignments.sum().backward()
    fastcl.sinkhorn(scores(2, N, K))
    with fastcl.use_backend("chunked"):
        fastcl.sinkhorn(scores())
    torch.func.vmap(lambda s: fastcl.sinkhorn(s).assignments)(scores(2, N, K))
    torch.compile(lambda s: fastcl.sinkhorn(s).assignments, fullgraph=True, backend="eager")(scores())
    assert True not in taken


def test_parameters_without_a_gradient(taken) -> None:
    with torch.no_grad():
        result = fastcl.sinkhorn(torch.nn.Parameter(scores()))
    assert taken == [True]
    assert not result.assignments.requires_grad


def test_tensors_made_in_inference_mode_do_not_come_back(taken) -> None:
    values = scores(5, 4)
    with torch.inference_mode():
        inferred = fastcl.sinkhorn(values, epsilon=0.0625).assignments
    result = fastcl.sinkhorn(values, epsilon=0.0625)
    assert taken == [True, True]
    assert inferred.is_inference()
    assert not result.assignments.is_inference()
    leaf = scores(5, 4).requires_grad_()
    (result.transport_cost * leaf.sum()).backward()


@pytest.mark.parametrize("case", VALUES)
def test_the_potential_alone(case: str, taken, monkeypatch) -> None:
    """As SwAV asks for it, of scores that learn."""
    values = VALUES[case](torch.float32).requires_grad_()
    got = column_potential([values], epsilon=0.3, prior=None, n_iters=3, group=None)
    assert taken == [True]
    monkeypatch.setattr(small, "FEW", 0)
    usual = column_potential([values], epsilon=0.3, prior=None, n_iters=3, group=None)
    assert taken == [True]
    assert not got.requires_grad
    torch.testing.assert_close(got, usual, rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scores": scores(0, K)}, "scores: expected at least one row"),
        ({"scores": scores().masked_fill(torch.arange(N)[:, None] == 4, -torch.inf)}, "row 4 has none"),
        ({"scores": scores().masked_fill(torch.arange(K) == 2, -torch.inf)}, "column 2 has none"),
        ({"scores": scores(), "epsilon": 0.0}, "epsilon: expected a positive number"),
        ({"scores": scores(), "epsilon": float("nan")}, "epsilon: expected a finite number"),
        ({"scores": scores(), "epsilon": 1e37}, "epsilon: expected at most 1e"),
        ({"scores": scores(), "n_iters": 0}, "n_iters: expected at least 1"),
        ({"scores": scores(), "n_iters": True}, "n_iters: expected an integer"),
    ],
)
def test_errors_are_those_of_the_usual_way(arguments, message, monkeypatch) -> None:
    found = []
    for most in (small.MOST_ROWS, 0):
        monkeypatch.setattr(small, "MOST_ROWS", most)
        with pytest.raises((TypeError, ValueError), match=message) as raised:
            fastcl.sinkhorn(**arguments)
        found.append((type(raised.value), str(raised.value)))
    assert found[0] == found[1]
