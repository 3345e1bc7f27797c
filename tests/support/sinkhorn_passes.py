"""Sinkhorn's passes on synthetic problems, compared with the dense ones in float64."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastcl.ops.sinkhorn import reference as sinkhorn_reference
from fastcl.ops.sinkhorn.reference import ColumnTerm, Normalizer, RowTerm, Scores
from tests.support.strategies import generator

# Scores and potentials nearly cancel: one entry too many, whose score reads as 0, has an exponential that overflows.
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
    rows, _, _ = sinkhorn_reference.row_pass(x, g, None, None, False)
    w = numbers(batch, k, seed=4)
    p, q = numbers(batch, n, seed=5), numbers(batch, n, seed=6)
    terms = [
        RowTerm(g, rows, p, q, w),
        RowTerm(g, rows, q, p, w),
        ColumnTerm(f, sinkhorn_reference.column_sums(x, f), w),
    ]
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
    """In float64, whatever its layout."""
    if isinstance(value, Tensor):
        return value.double()
    if isinstance(value, Scores):
        return Scores(value.values.double(), value.inverse_epsilon.double())
    if isinstance(value, list):
        return [widened(each) for each in value]
    return type(value)(*map(widened, value))


def check(which, a: Arguments, passes) -> None:
    wide = {name: widened(value) for name, value in a.items()}
    half = a["x"].values.dtype != torch.float32
    for place, (got, expected) in enumerate(zip(which(passes, a), which(sinkhorn_reference, wide), strict=True)):
        assert got.shape == expected.shape
        known = expected.isfinite()
        assert torch.equal(got.double()[~known], expected[~known])
        rounding = torch.finfo(got.dtype).eps if half and got.dim() == 3 else 0
        error = (got.double() - expected)[known].norm() / expected[known].norm().clamp(min=1e-30)
        assert error <= 3e-6 + rounding, (which.__name__, place)


def plain(values: Tensor) -> Tensor:
    return values


def spread(values: Tensor) -> Tensor:
    """The values with the negative bit set, columns two numbers apart, batches interleaved."""
    room = torch.zeros(values.shape[1], values.shape[0], 2 * values.shape[2], dtype=values.dtype)
    view = room.transpose(0, 1)[:, :, ::2]
    view.copy_(-values)
    return torch._neg_view(view)


def check_no_rows(which, passes, k: int) -> None:
    """A process without rows takes part with empty sums."""
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
        for got, expected in zip(which(passes, a), which(sinkhorn_reference, a), strict=True):
            assert torch.equal(got, expected)
