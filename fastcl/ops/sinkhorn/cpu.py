"""Sinkhorn's passes on backend ``cpu``: the C++ engines of ``csrc/cpu``, one problem of the batch at a time."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..backends import native
from ..backends.native import DTYPES, address, run
from .reference import ColumnTerm, Normalizer, RowTerm, Scores, finite, per_sum

if TYPE_CHECKING:
    from .solver import Problem, Solution


class Pass(IntEnum):
    """The values are those of csrc/cpu/sinkhorn/call.h."""

    COLUMN_SUMS = 0
    ROW_PASS = 1
    PRODUCTS = 2
    COLUMN_PRODUCTS = 3
    ASSIGNMENT_GRADIENT = 4
    SCORE_GRADIENT = 5


def column_sums(x: Scores, f: Tensor) -> Normalizer:
    columns = _normalizer(x, _k(x))
    _call(Pass.COLUMN_SUMS, x, f, columns=columns)
    return columns


def row_pass(
    x: Scores, g: Tensor, above: Tensor | None, mass: Tensor | None, assignments: bool
) -> tuple[Normalizer, Tensor | None, Tensor | None]:
    rows = _normalizer(x, _n(x))
    above = None if above is None else above.to(x.dtype)
    masses = None if mass is None else _new(x, _k(x))
    matrix = torch.empty(x.values.shape, dtype=x.values.dtype) if assignments else None
    _call(Pass.ROW_PASS, x, g, rows=rows, above=above, mass=mass, by_column=masses, matrix=matrix)
    return rows, masses, matrix


def products(x: Scores, g: Tensor, rows: Normalizer, mass: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    y, columns = _new(x, _n(x)), _new(x, _k(x))
    _call(Pass.PRODUCTS, x, g, rows=rows, mass=mass, weights=w, by_row=y, by_column=columns)
    return y, columns


def column_products(x: Scores, f: Tensor, columns: Normalizer, w: Tensor) -> Tensor:
    y = _new(x, _n(x))
    _call(Pass.COLUMN_PRODUCTS, x, f, columns=columns, weights=per_sum(w, columns), by_row=y)
    return y


def assignment_gradient(
    x: Scores, g: Tensor, rows: Normalizer, grad: Tensor | None, less: Tensor
) -> tuple[Tensor, Tensor]:
    d, columns = _new(x, _n(x)), _new(x, _k(x))
    _call(Pass.ASSIGNMENT_GRADIENT, x, g, rows=rows, less=less, gradient=grad, by_row=d, by_column=columns)
    return d, columns


def score_gradient(
    x: Scores, g: Tensor, rows: Normalizer, grad: Tensor | None, less: Tensor, terms: Sequence[RowTerm | ColumnTerm]
) -> tuple[Tensor, Tensor]:
    matrix = torch.empty(x.values.shape, dtype=x.values.dtype)
    moment = _new(x, _n(x))
    _call(
        Pass.SCORE_GRADIENT,
        x,
        g,
        rows=rows,
        less=less,
        gradient=grad,
        by_row=moment,
        matrix=matrix,
        terms=[_divided(term) for term in terms],
    )
    return matrix, moment


def solve(p: Problem) -> Solution | None:
    """A fixed number of iterations in one call (csrc/cpu/sinkhorn/solve.h).

    None with a tolerance, with a process group, or without rows: the solver then makes one call per pass.
    """
    from .solver import Kept, Solution

    batch, n, k = p.scores.shape
    if p.tol is not None or p.group or n == 0:
        return None
    x, log_mass, dtype = p.x, p.log_row_mass().contiguous(), p.epsilon.dtype
    mass, start, log_prior = log_mass.exp(), p.start_columns(), p.log_prior.contiguous()
    start = None if start is None else start.contiguous()
    scores, kept, inverse_epsilon = _plain(p.scores), Kept.like(p), x.inverse_epsilon.contiguous()
    assignments = torch.empty(p.scores.shape, dtype=p.scores.dtype, device="cpu")
    f, g = (torch.empty(batch, size, dtype=dtype, device="cpu") for size in (n, k))
    for b in range(batch):
        call = (
            *_rows(scores, b),
            k,
            inverse_epsilon.data_ptr(),
            dtype == torch.float64,
            native.threads(n * k, native.SCORES),
            *(_of_batch(value, b) for value in (assignments, log_prior, log_mass, mass, start)),
            p.n_iters,
            address(kept.rows, b * n),
            batch * n,
            address(kept.columns, b * k),
            batch * k,
            _of_batch(f, b),
            _of_batch(g, b),
        )
        run(native.native_module().sinkhorn_solve(native.engine()[0], float(p.exact), call))
    return Solution(assignments, f, g, mass.new_zeros(batch), torch.tensor(p.n_iters, device="cpu"), kept)


_Term = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor]  # SinkhornTerm in csrc/cpu/sinkhorn/call.h


def _divided(term: RowTerm | ColumnTerm) -> _Term:
    if isinstance(term, RowTerm):
        return term.g, term.rows.shift, term.p / term.rows.sum, term.q / term.rows.sum, term.w
    return term.f, finite(term.columns.shift), None, None, per_sum(term.w, term.columns)


def _n(x: Scores) -> int:
    return x.values.shape[1]


def _k(x: Scores) -> int:
    return x.values.shape[2]


def _new(x: Scores, size: int) -> Tensor:
    return torch.empty(x.values.shape[0], size, dtype=x.dtype)


def _normalizer(x: Scores, size: int) -> Normalizer:
    return Normalizer(_new(x, size), _new(x, size))


def _call(
    which: Pass,
    x: Scores,
    potential: Tensor,
    *,
    rows: Normalizer | None = None,
    columns: Normalizer | None = None,
    above: Tensor | None = None,
    mass: Tensor | None = None,
    weights: Tensor | None = None,
    less: Tensor | None = None,
    gradient: Tensor | None = None,
    by_row: Tensor | None = None,
    by_column: Tensor | None = None,
    matrix: Tensor | None = None,
    terms: Sequence[_Term] = (),
) -> None:
    """Runs a pass, with its arguments in the order that csrc/bindings reads. Outputs must be contiguous."""
    batch, n, k = x.values.shape
    if batch == 0 or n == 0:
        _of_nothing(which, columns, by_column)
        return
    scores, gradient = _plain(x.values), None if gradient is None else _plain(gradient)
    # Contiguous, and in variables, so that the tensors live until the calls end.
    inputs = [potential, *(rows or (None, None)), *(columns or (None, None)), above, mass, weights, less]
    inputs = [None if value is None else _plain(value).contiguous() for value in inputs]
    laid_out = [[None if part is None else _plain(part).contiguous() for part in term] for term in terms]
    threads = native.threads(n * k, native.SCORES)
    inverse_epsilon = x.inverse_epsilon.contiguous()
    for b in range(batch):
        call = (
            which,
            *_rows(scores, b),
            k,
            inverse_epsilon.data_ptr(),
            x.dtype == torch.float64,
            threads,
            *(_of_batch(value, b) for value in (*inputs, by_row, by_column)),
            *_rows(gradient, b),
            _of_batch(matrix, b),
        )
        described = tuple(tuple(_of_batch(part, b) for part in term) for term in laid_out)
        run(native.native_module().sinkhorn(native.engine()[0], call, described))


def _of_nothing(which: Pass, columns: Normalizer | None, by_column: Tensor | None) -> None:
    """The results of a process without rows: empty sums."""
    if which == Pass.COLUMN_SUMS and columns is not None:
        columns.shift.fill_(-torch.inf)
        columns.sum.zero_()
    if by_column is not None:
        by_column.zero_()


def _plain(value: Tensor) -> Tensor:
    return value.resolve_neg() if value.is_neg() else value


def _of_batch(value: Tensor | None, b: int) -> int:
    return 0 if value is None else address(value, b * value.stride(0))


def _rows(value: Tensor | None, b: int) -> tuple[Any, ...]:
    if value is None:
        return 0, 0, 0, 0, 0
    return DTYPES[value.dtype], _of_batch(value, b), value.shape[1], value.stride(1), value.stride(2)
