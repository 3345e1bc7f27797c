"""Sinkhorn's passes on backend ``cuda``, and all iterations in one launch: the kernels of ``csrc/cuda/sinkhorn``.

A group of warps holds a whole row of up to 8192 columns, so one read of the scores gives the sums over rows and over
columns. A pass reads longer rows twice: for the sums over each row, then for the columns. Column sums are formed in
chunks of rows, then added in the order of chunks: the same bits in every run on one device.

All iterations run in one cooperative launch (`iterate`) if there is no process group, rows fit whole, and each problem
of the batch has a multiprocessor. The scores then stay in shared memory if they fit; otherwise each iteration reads
them once. Not yet measured on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..backends import cuda_runtime
from ..backends.native import DTYPES, address
from .reference import CHUNK, LEAST_CHUNK, ColumnTerm, Normalizer, RowTerm, Scores, finite, per_sum, split

if TYPE_CHECKING:
    from .solver import Kept, Problem

BLOCKS = 2  # blocks that each multiprocessor should have


class Step(IntEnum):
    """The values are those of csrc/cuda/sinkhorn/launches.h."""

    NORMALIZE = 0
    PRODUCTS = 1
    GRADIENT = 2
    COLUMN_PRODUCTS = 3
    COLUMN_SUMS = 4
    SCORE_GRADIENT = 5


def iterate(p: Problem, g: Tensor, mass: Tensor, kept: Kept) -> tuple[Tensor, Tensor, Tensor] | None:
    x = p.x
    batch, n, k = x.values.shape
    where = cuda_runtime.where(x.values.device)
    chunk, chunks, resident = cuda_runtime.kernels().sinkhorn_plan(where[0], batch, n, k, x.values.element_size())
    if chunks == 0:
        return None
    open_ended = p.tol is not None
    kept.columns[2] = g
    matrix, partial, error = x.new_matrix(), x.new(batch, chunks, k), x.new(batch)
    potentials = g.new_empty(2, batch, k) if open_ended else None
    if potentials is not None:
        potentials[0] = g
    else:
        error.zero_()
    done = torch.empty((), dtype=torch.int64, device=error.device)
    error_parts = x.new(batch, -(-k // 32))
    scores = x.values.resolve_neg()
    inputs = [value.contiguous() for value in (x.inverse_epsilon, p.epsilon, mass, p.log_prior)]
    outputs = (kept.rows[1:], kept.columns[2], kept.columns[2 + kept.steps], potentials, error, partial, error_parts)
    call = (
        *_strided(scores),
        *(batch, n, k, p.n_iters, chunk, chunks, resident),
        *map(address, (*inputs, *outputs, done, matrix)),
    )
    cuda_runtime.run("sinkhorn_iterations", scores.device, call, -1.0 if p.tol is None else p.tol)
    return matrix, error, done


def column_sums(x: Scores, f: Tensor) -> Normalizer:
    batch, n, k = x.values.shape
    if n == 0 or batch == 0:
        return Normalizer(x.new(batch, k).fill_(-torch.inf), x.new(batch, k).zero_())
    chunk, chunks = _chunk(x, -(-k // 32))
    shift, total = partial = x.new(2, batch, chunks, k)
    _call(Step.COLUMN_SUMS, x, f, partial=partial, chunk=chunk)
    largest = shift.amax(1)
    scale = ((shift - finite(largest)[:, None]) * x.inverse_epsilon).exp()
    return Normalizer(largest, (total * scale).sum(1))


def row_pass(
    x: Scores, g: Tensor, above: Tensor | None, mass: Tensor | None, assignments: bool
) -> tuple[Normalizer, Tensor | None, Tensor | None]:
    rows = Normalizer(*x.new(2, *x.values.shape[:2]))
    matrix = x.new_matrix() if assignments else None
    columns = _reduced(Step.NORMALIZE, x, g, rows, mass=mass, matrix=matrix, sums=mass is not None)
    return rows, None if mass is None else columns, matrix


def products(x: Scores, g: Tensor, rows: Normalizer, mass: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    y = x.new(*x.values.shape[:2])
    return y, _reduced(Step.PRODUCTS, x, g, rows, mass=mass, weights=w, by_row=y)


def column_products(x: Scores, f: Tensor, columns: Normalizer, w: Tensor) -> Tensor:
    y = x.new(*x.values.shape[:2])
    if y.numel():
        shift = Normalizer(finite(columns.shift), columns.sum)
        _call(Step.COLUMN_PRODUCTS, x, f, rows=shift, weights=per_sum(w, columns), by_row=y)
    return y


def assignment_gradient(
    x: Scores, g: Tensor, rows: Normalizer, grad: Tensor | None, less: Tensor
) -> tuple[Tensor, Tensor]:
    d = x.new(*x.values.shape[:2])
    if grad is None:
        d.zero_()
    return d, _reduced(Step.GRADIENT, x, g, rows, less=less, gradient=grad, by_row=d)


def score_gradient(
    x: Scores, g: Tensor, rows: Normalizer, grad: Tensor | None, less: Tensor, terms: Sequence[RowTerm | ColumnTerm]
) -> tuple[Tensor, Tensor]:
    matrix, moment = x.new_matrix(), x.new(*x.values.shape[:2])
    of_rows = [term for term in terms if isinstance(term, RowTerm)]
    of_columns = [term for term in terms if isinstance(term, ColumnTerm)]
    stacks: list[Tensor | None] = [None] * 10
    if of_rows:
        stacks[:6] = [
            *split(torch.stack([term.g.double() for term in of_rows]), x.dtype),
            torch.stack([term.w for term in of_rows]),
            torch.stack([term.rows.shift for term in of_rows]),
            torch.stack([term.p / term.rows.sum for term in of_rows]),
            torch.stack([term.q / term.rows.sum for term in of_rows]),
        ]
    if of_columns:
        stacks[6:] = [
            *split(torch.stack([term.f.double() for term in of_columns]), x.dtype),
            torch.stack([finite(term.columns.shift) for term in of_columns]),
            torch.stack([per_sum(term.w, term.columns) for term in of_columns]),
        ]
    if matrix.numel():
        _call(
            Step.SCORE_GRADIENT,
            x,
            g,
            rows=rows,
            less=less,
            gradient=grad,
            by_row=moment,
            matrix=matrix,
            terms=(len(of_rows), len(of_columns), *stacks),
        )
    return matrix, moment


def _reduced(
    step: Step,
    x: Scores,
    g: Tensor,
    rows: Normalizer,
    *,
    mass: Tensor | None = None,
    weights: Tensor | None = None,
    less: Tensor | None = None,
    gradient: Tensor | None = None,
    by_row: Tensor | None = None,
    matrix: Tensor | None = None,
    sums: bool = True,
) -> Tensor:
    """Runs a pass, which fills its per-row outputs, and returns its column sums [B, K]; [0] without `sums`."""
    batch, n, k = x.values.shape
    if n == 0 or batch == 0:
        return x.new(batch, k).zero_()
    chunk, chunks = _chunk(x, 1 if k <= cuda_runtime.kernels().sinkhorn_whole else -(-k // 32))
    partial = x.new(batch, chunks, k) if sums else None
    _call(
        step,
        x,
        g,
        rows=rows,
        mass=mass,
        weights=weights,
        less=less,
        gradient=gradient,
        by_row=by_row,
        partial=partial,
        matrix=matrix,
        chunk=chunk,
    )
    return x.new(0) if partial is None else partial.sum(1)


def _chunk(x: Scores, others: int) -> tuple[int, int]:
    """Rows per chunk and number of chunks: enough to fill the device if `others` blocks process each chunk."""
    batch, n, _ = x.values.shape
    device = cuda_runtime.where(x.values.device)[0]
    wanted = -(-cuda_runtime.kernels().processors(device) * BLOCKS // (others * batch))
    chunk = min(max(-(-n // wanted), LEAST_CHUNK), CHUNK)
    return chunk, -(-n // chunk)


def _call(
    step: Step,
    x: Scores,
    potential: Tensor,
    *,
    rows: Normalizer | None = None,
    mass: Tensor | None = None,
    weights: Tensor | None = None,
    less: Tensor | None = None,
    gradient: Tensor | None = None,
    by_row: Tensor | None = None,
    partial: Tensor | None = None,
    matrix: Tensor | None = None,
    chunk: int = 0,
    terms: tuple[int | Tensor | None, ...] = (0, 0, *[None] * 10),
) -> None:
    """Launches a pass, with its arguments in the order that csrc/bindings reads.

    Outputs must be contiguous. Inputs are made contiguous, and variables keep them alive until the call ends.
    """
    batch, n, k = x.values.shape
    scores, gradient = x.values.resolve_neg(), None if gradient is None else gradient.resolve_neg()
    shift, total = rows or (None, None)
    given = (x.inverse_epsilon, *split(potential, x.dtype), shift, total, mass, weights, less)
    inputs = [None if value is None else value.contiguous() for value in given]
    laid_out = [term.contiguous() if isinstance(term, Tensor) else term for term in terms]
    call = (
        step,
        *_strided(scores),
        *_strided(gradient),
        *(batch, n, k),
        *map(address, (*inputs, by_row, partial, matrix)),
        chunk,
        -(-n // chunk) if chunk else 0,
        *(term if isinstance(term, int) else address(term) for term in laid_out),
    )
    cuda_runtime.run("sinkhorn_pass", scores.device, call)


def _strided(matrix: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0, 0, 0) if matrix is None else (DTYPES[matrix.dtype], matrix.data_ptr(), *matrix.stride())
