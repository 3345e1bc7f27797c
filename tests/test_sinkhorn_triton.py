"""Sinkhorn's Triton kernels, pass by pass: each against the dense one in float64. The whole: `test_sinkhorn.py`."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from strategies import generator
from torch import Tensor

import fastcl
from fastcl.kernels import ops, sinkhorn_dense, sinkhorn_triton, triton_engine
from fastcl.kernels.sinkhorn_dense import ColumnTerm, Normalizer, RowTerm, Scores
from fastcl.kernels.sinkhorn_ops import choose

pytestmark = pytest.mark.skipif(
    "triton" not in ops.BACKENDS or not triton_engine.INTERPRETED, reason="Triton is not interpreted here"
)

# Scores and potentials nearly cancel: a place too many, whose score reads as 0, has an exponential beyond all numbers.
OFFSET = {torch.float32: 1e4, torch.bfloat16: 128.0, torch.float16: 1e3}
EPSILON = 0.25

Arguments = dict[str, Any]


def numbers(*shape: int, seed: int, positive: bool = False) -> Tensor:
    values = torch.randn(*shape, generator=generator(seed))
    return values.abs() + 0.1 if positive else values


def problem(batch: int, n: int, k: int, dtype: torch.dtype, layout: Callable[[Tensor], Tensor]) -> Arguments:
    values = (numbers(batch, n, k, seed=0) - OFFSET[dtype]).to(dtype)
    if k > 2:
        values[:, ::3, k // 3] = -torch.inf
    x = Scores(layout(values), torch.tensor(1 / EPSILON))
    g, f = (OFFSET[dtype] + numbers(batch, size, seed=size).double() for size in (k, n))
    if k > 1:
        g[0, k // 2] = -torch.inf  # without mass
    if n > 1:
        f[0, n // 2] = -torch.inf
    rows, _, _ = sinkhorn_dense.row_pass(x, g, None, None, False)
    w = numbers(batch, k, seed=4)
    p, q = numbers(batch, n, seed=5), numbers(batch, n, seed=6)
    terms = [RowTerm(g, rows, p, q, w), RowTerm(g, rows, q, p, w), ColumnTerm(f, sinkhorn_dense.column_sums(x, f), w)]
    grad = layout(numbers(batch, n, k, seed=7).to(dtype))
    mass = numbers(batch, n, seed=8, positive=True)
    return {"x": x, "g": g, "f": f, "rows": rows, "w": w, "less": p, "grad": grad, "mass": mass, "terms": terms}


def column_sums(passes, a) -> tuple:
    return tuple(passes.column_sums(a["x"], a["f"]))


def row_pass(passes, a) -> tuple:
    rows, columns, matrix = passes.row_pass(a["x"], a["g"], None, a["mass"], True)
    return *rows, columns, matrix


def rows_alone(passes, a) -> tuple:
    rows, columns, matrix = passes.row_pass(a["x"], a["g"], None, None, False)
    assert columns is matrix is None
    return tuple(rows)


def products(passes, a) -> tuple:
    return passes.products(a["x"], a["g"], a["rows"], a["mass"], a["w"])


def column_products(passes, a) -> tuple:
    return (passes.column_products(a["x"], a["f"], a["terms"][2].columns, a["w"]),)


def assignment_gradient(passes, a) -> tuple:
    return passes.assignment_gradient(a["x"], a["g"], a["rows"], a["grad"], a["less"])


def no_assignment_gradient(passes, a) -> tuple:
    return passes.assignment_gradient(a["x"], a["g"], a["rows"], None, a["less"])


def score_gradient(passes, a) -> tuple:
    return passes.score_gradient(a["x"], a["g"], a["rows"], a["grad"], a["less"], a["terms"])


def no_score_gradient(passes, a) -> tuple:
    return passes.score_gradient(a["x"], a["g"], a["rows"], None, a["less"], a["terms"][1:2])


PASSES = (column_sums, row_pass, rows_alone, products, column_products, assignment_gradient, no_assignment_gradient)
PASSES += (score_gradient, no_score_gradient)


def widened(value: Any) -> Any:
    """In float64, whatever it is made of."""
    if isinstance(value, Tensor):
        return value.double()
    if isinstance(value, Scores):
        return Scores(value.values.double(), value.inverse_epsilon.double())
    if isinstance(value, list):
        return [widened(each) for each in value]
    return type(value)(*map(widened, value))


def check(which, a: Arguments) -> None:
    wide = {name: widened(value) for name, value in a.items()}
    half = a["x"].values.dtype != torch.float32
    for place, (got, expected) in enumerate(zip(which(sinkhorn_triton, a), which(sinkhorn_dense, wide), strict=True)):
        assert got.shape == expected.shape
        known = expected.isfinite()
        assert torch.equal(got.double()[~known], expected[~known])
        rounding = torch.finfo(got.dtype).eps if half and got.dim() == 3 else 0
        error = (got.double() - expected)[known].norm() / expected[known].norm().clamp(min=1e-30)
        assert error <= 3e-6 + rounding, (which.__name__, place)


def plain(values: Tensor) -> Tensor:
    return values


def spread(values: Tensor) -> Tensor:
    """Negative bit set, columns two numbers apart, batches interleaved."""
    room = torch.zeros(values.shape[1], values.shape[0], 2 * values.shape[2], dtype=values.dtype)
    view = room.transpose(0, 1)[:, :, ::2]
    view.copy_(-values)
    return torch._neg_view(view)


# One column; rows that are held whole, the longest of them; rows in two tiles, the second of one column; in several.
@pytest.mark.parametrize(("n", "k"), [(5, 1), (131, 33), (1, 64), (131, 65), (3, 300)])
@pytest.mark.parametrize("which", PASSES, ids=lambda which: which.__name__)
def test_a_pass_is_the_dense_one(which, n, k) -> None:
    check(which, problem(2, n, k, torch.float32, plain))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("k", [20, 70])
@pytest.mark.parametrize("which", PASSES, ids=lambda which: which.__name__)
def test_half_precision_and_strides(which, k, dtype) -> None:
    check(which, problem(2, 9, k, dtype, spread))


@pytest.mark.parametrize("k", [20, 70])
@pytest.mark.parametrize("which", PASSES, ids=lambda which: which.__name__)
def test_no_rows(which, k) -> None:
    """A process without rows takes part with sums of nothing."""
    for batch, n in ((2, 0), (0, 3)):
        values = torch.empty(batch, n, k)
        rows, columns = Normalizer(*torch.ones(2, batch, n)), Normalizer(*torch.ones(2, batch, k))
        g, f, w, v = torch.zeros(batch, k).double(), torch.zeros(batch, n).double(), *torch.ones(2, batch, k)
        terms = [
            RowTerm(g, rows, rows.sum, rows.sum, w),
            RowTerm(g, rows, rows.sum, rows.sum, w),
            ColumnTerm(f, columns, v),
        ]
        a = {"x": Scores(values, torch.tensor(2.0)), "g": g, "f": f, "rows": rows, "w": w, "less": rows.sum}
        a |= {"grad": values, "mass": rows.sum, "terms": terms}
        for got, expected in zip(which(sinkhorn_triton, a), which(sinkhorn_dense, a), strict=True):
            assert torch.equal(got, expected)


@pytest.mark.parametrize("which", [column_sums, row_pass, products, assignment_gradient])
@pytest.mark.parametrize("k", [20, 70])
def test_chunks_add_up(which, k, monkeypatch) -> None:
    a = problem(1, 400, k, torch.float32, plain)
    chunks = set()
    for size in (128, 512):
        monkeypatch.setattr(sinkhorn_triton, "CHUNK", size)
        monkeypatch.setattr(sinkhorn_triton, "LEAST_CHUNK", size)
        chunks.add(sinkhorn_triton._chunk(a["x"], sinkhorn_triton.columns_tile(True), 1))
        check(which, a)
    assert chunks == {128, 512}


def test_whom_it_serves() -> None:
    with fastcl.use_backend("triton"):
        assert choose(torch.device("cpu"), torch.float32) == "triton"
        assert choose(torch.device("cpu"), torch.float64) == "chunked"
