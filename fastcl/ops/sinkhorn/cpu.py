"""Sinkhorn's passes on backend ``cpu``: the C++ engines of ``csrc/cpu``, one problem of the batch at a time."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from enum import IntEnum
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from ..backends import native
from ..backends.native import DTYPES, address, run
from .reference import ColumnTerm, Normalizer, RowTerm, Scores, finite, per_sum

if TYPE_CHECKING:
    from .solver import Passes, Problem, Solution


class Pass(IntEnum):
    """The values are those of csrc/cpu/sinkhorn/call.h."""

    COLUMN_SUMS = 0
    ROW_PASS = 1
    PRODUCTS = 2
    COLUMN_PRODUCTS = 3
    ASSIGNMENT_GRADIENT = 4
    SCORE_GRADIENT = 5
    PLAN_PRODUCTS = 7
    PLAN_GRADIENT = 8


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
    return _assignment_gradient(x, g, rows, grad, less, None)


def _assignment_gradient(
    x: Scores, g: Tensor, rows: Normalizer, grad: Tensor | None, less: Tensor, kept: Tensor | None
) -> tuple[Tensor, Tensor]:
    """kept [B, N, K]: is filled with the exponentials."""
    d, columns = _new(x, _n(x)), _new(x, _k(x))
    _call(Pass.ASSIGNMENT_GRADIENT, x, g, rows=rows, less=less, gradient=grad, by_row=d, by_column=columns, matrix=kept)
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


def backward(p: Problem, moments: bool) -> Passes:
    """The passes of one backward, with exponentials in the gradient's memory. Without `moments` those are zeros."""
    from .solver import Passes

    keeps = p.init is None and p.scores.dtype == p.epsilon.dtype and p.scores.numel() > 0
    return Backward(p.x, p.group, moments) if keeps else cast(Passes, sys.modules[__name__])


class Backward:
    """The passes of one backward. The first one writes its exponentials where the gradient of the scores will be.

    With e the exponentials, shift and g of that pass, the plan of another row update (g', normalizer') is

        R'_ij = e_ij u_i v_j,      v_j = exp((g'_j - g_j) / epsilon),      1 / u_i = sum_j e_ij v_j,

    so later passes take no exponentials. e lacks entries below the smallest normal number; where v varies too much for
    these to be negligible, a pass reads the scores instead. Not for a warm start (README.md).
    """

    column_sums = staticmethod(column_sums)
    row_pass = staticmethod(row_pass)
    column_products = staticmethod(column_products)

    def __init__(self, x: Scores, group: str, moments: bool) -> None:
        self._inverse = x.inverse_epsilon.double()  # as the passes round it
        self._group = group
        self._moments = moments
        self._plan: Tensor | None = None  # e [B, N, K]
        self._g: Tensor  # [B, K]
        self._massless: Tensor  # [B, K]
        self._rows: Normalizer  # [B, N]; its sum is that of e
        # u [B, N] and v [B, K] by the address of g'; None: out of range
        self._known: dict[int, tuple[Tensor, Tensor] | None] = {}

    def assignment_gradient(
        self, x: Scores, g: Tensor, rows: Normalizer, grad: Tensor | None, less: Tensor
    ) -> tuple[Tensor, Tensor]:
        if not rows.shift.abs().amax().item() * self._inverse.item() <= 32:  # as in csrc/cpu/sinkhorn/solve.cpp
            return assignment_gradient(x, g, rows, grad, less)
        self._plan = torch.empty(x.values.shape, dtype=x.dtype)
        self._g, self._rows = g, Normalizer(rows.shift, torch.empty_like(rows.sum))
        self._massless = g == -torch.inf
        return _assignment_gradient(x, g, self._rows, grad, less, self._plan)

    def products(self, x: Scores, g: Tensor, rows: Normalizer, mass: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        v = None if self._plan is None else self._column_factors(x, g)
        if v is None:
            self._known[g.data_ptr()] = None
            return products(x, g, rows, mass, w)
        totals, y, columns = self._plan_products(x, mass, v, w * v)
        self._known[g.data_ptr()] = totals.reciprocal(), v
        return y, columns.mul_(v)

    def score_gradient(
        self,
        x: Scores,
        g: Tensor,
        rows: Normalizer,
        grad: Tensor | None,
        less: Tensor,
        terms: Sequence[RowTerm | ColumnTerm],
    ) -> tuple[Tensor, Tensor]:
        factors = [None if self._plan is None else self._factors(x, term) for term in terms]
        matrix, self._plan = self._plan, None
        if matrix is None or None in factors:
            return score_gradient(x, g, rows, grad, less, terms)
        moment = _new(x, _n(x)) if self._moments else None
        of_rows, of_columns = ([t for f in factors if f is not None for t in f[side]] for side in (0, 1))
        _call(
            Pass.PLAN_GRADIENT,
            x,
            None,
            rows=self._rows,
            less=less,
            gradient=grad,
            by_row=moment,
            matrix=matrix,
            plan=matrix,
            row_factors=torch.cat(of_rows, 1),
            column_factors=torch.cat(of_columns, 1),
        )
        return matrix, torch.zeros_like(less) if moment is None else moment

    def _column_factors(self, x: Scores, g: Tensor) -> Tensor | None:
        """v [B, K], divided by its largest element, or None if it is not within a factor of 2^24."""
        if g.data_ptr() == self._g.data_ptr():
            return torch.ones_like(g, dtype=x.dtype)
        v = (g - self._g).mul_(self._inverse).masked_fill_(self._massless, -torch.inf)
        v -= v.amax(-1, keepdim=True)
        if not v.masked_fill(self._massless, 0).amin().item() >= -24 * math.log(2):  # NaN too
            return None
        return v.exp_().to(x.dtype)

    def _factors(self, x: Scores, term: RowTerm | ColumnTerm) -> tuple[list[Tensor], list[Tensor]] | None:
        """[u, p, q], each [B, N], and [v, w], each [B, K]: the term is e_ij u_i v_j (p_i + q_i w_j)."""
        if isinstance(term, RowTerm):
            known = self._known[term.g.data_ptr()]
            if known is None:
                return None
            u, v = known
            return [u, term.p, term.q], [v, term.w]
        # C_ij = e_ij u_i / sum_i e_ij u_i
        w = torch.where(term.columns.sum > 0, term.w, 0)
        of_row = (self._rows.shift.double() + term.f).mul_(self._inverse)
        most = of_row.amax(-1, keepdim=True)
        of_column = (self._g + finite(term.columns.shift)).mul_(-self._inverse).masked_fill_(w == 0, -torch.inf)
        if not (of_column + most).amax().item() <= 60 * math.log(2):
            return None
        u = (of_row - most).exp_().to(x.dtype)
        if self._group:  # the rows are not all here
            v = (of_column + most).exp_().to(x.dtype) * per_sum(w, term.columns)
        else:  # sums that are formed anew have the same roundings of e
            ones = torch.ones_like(w)
            _, _, sums = self._plan_products(x, u * self._rows.sum, ones, ones)
            v = torch.where(w == 0, 0, w / sums)
        return [u, torch.ones_like(u), torch.zeros_like(u)], [v, torch.zeros_like(v)]

    def _plan_products(self, x: Scores, mass: Tensor, v: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """1 / u_i = sum_j e_ij v_j, y_i = u_i sum_j e_ij w_j and sum_i mass_i u_i y_i e_ij."""
        totals, y, columns = _new(x, _n(x)), _new(x, _n(x)), _new(x, _k(x))
        _call(
            Pass.PLAN_PRODUCTS,
            x,
            None,
            rows=Normalizer(totals, totals),
            mass=mass,
            by_row=y,
            by_column=columns,
            plan=self._plan,
            column_factors=torch.cat((v, w), 1),
        )
        return totals, y, columns


def solve(p: Problem, out: Tensor | None = None) -> Solution | None:
    """A fixed number of iterations in one call (csrc/cpu/sinkhorn/solve.h).

    out [B, N, K]: becomes the assignments, if it is contiguous. None with a tolerance, with a process group, or without
    rows: the solver then makes one call per pass.
    """
    from .solver import Kept, Solution

    batch, n, k = p.scores.shape
    if p.tol is not None or p.group or n == 0:
        return None
    dtype, epsilon = p.epsilon.dtype, p.epsilon.item()
    start = p.start_columns()
    scores, log_prior, log_rows = _plain(p.scores), p.log_prior.contiguous(), p.log_row_marginal.contiguous()
    start, kept = None if start is None else start.contiguous(), Kept.like(p)
    new = p.epsilon.new_empty
    if out is None or not out.is_contiguous() or out.is_neg():
        out = torch.empty(p.scores.shape, dtype=p.scores.dtype, device="cpu")
    f, g = new(batch, n), new(batch, k)
    module, engine = native.native_module(), native.engine()[0]
    for b in range(batch):
        call = (
            *_rows(scores, b),
            k,
            dtype == torch.float64,
            native.threads(n * k, native.SCORES),
            *(_of_batch(value, b) for value in (out, log_prior, log_rows, start)),
            p.n_iters,
            address(kept.rows, b * n),
            batch * n,
            address(kept.columns, b * k),
            batch * k,
            _of_batch(f, b),
            _of_batch(g, b),
        )
        run(module.sinkhorn_solve(engine, epsilon, call))
    steps = torch.full((), p.n_iters, dtype=torch.int64, device="cpu")
    return Solution(out, f, g, p.epsilon.new_zeros(batch), steps, kept)


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
    potential: Tensor | None,
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
    plan: Tensor | None = None,
    row_factors: Tensor | None = None,
    column_factors: Tensor | None = None,
) -> None:
    """Runs a pass, with its arguments in the order that csrc/bindings reads. Outputs must be contiguous.

    row_factors: [B, 3 M N], column_factors: [B, 2 M K], of M terms.
    """
    batch, n, k = x.values.shape
    if batch == 0 or n == 0:
        _of_nothing(which, columns, by_column)
        return
    scores, gradient = _plain(x.values), None if gradient is None else _plain(gradient)
    # Contiguous, and in variables, so that the tensors live until the calls end.
    inputs = [potential, *(rows or (None, None)), *(columns or (None, None)), above, mass, weights, less]
    inputs = [None if value is None else _plain(value).contiguous() for value in inputs]
    row_factors, column_factors = (None if f is None else f.contiguous() for f in (row_factors, column_factors))
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
            *(_of_batch(value, b) for value in (matrix, plan, row_factors, column_factors)),
            0 if column_factors is None else column_factors.shape[1] // k,
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
