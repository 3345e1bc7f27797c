"""Sinkhorn's passes in blocks of rows: calls `reference` for each block, on any device.

Memory O(N + K + block). On a CPU a block stays in the caches during its several operations.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..backends.rows import CPU_BLOCK, GPU_BLOCK
from . import reference
from .reference import ColumnTerm, Normalizer, RowTerm, Scores, finite


def column_sums(x: Scores, f: Tensor) -> Normalizer:
    largest, total = reference.column_sums(x.block(slice(0, 0)), f[:, :0])
    for rows in _blocks(x):
        part = reference.column_sums(x.block(rows), f[:, rows])
        shift = torch.maximum(largest, part.shift)
        total = rescaled(x, total, largest, shift) + rescaled(x, part.sum, part.shift, shift)
        largest = shift
    return Normalizer(largest, total)


def row_pass(
    x: Scores, g: Tensor, above: Tensor | None, mass: Tensor | None, assignments: bool
) -> tuple[Normalizer, Tensor | None, Tensor | None]:
    batch, n, _ = x.values.shape
    new = x.inverse_epsilon.new_empty
    rows = Normalizer(new(batch, n), new(batch, n))
    columns = None if mass is None else _no_columns(x)
    result = torch.empty_like(x.values, memory_format=torch.contiguous_format) if assignments else None
    for at in _blocks(x):
        part, part_columns, part_result = reference.row_pass(
            x.block(at), g, None, None if mass is None else mass[:, at], assignments
        )
        rows.shift[:, at], rows.sum[:, at] = part
        if columns is not None and part_columns is not None:
            columns += part_columns
        if result is not None and part_result is not None:
            result[:, at] = part_result
    return rows, columns, result


def products(x: Scores, g: Tensor, rows: Normalizer, mass: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    y, columns = torch.empty_like(mass), _no_columns(x)
    for at in _blocks(x):
        y[:, at], part = reference.products(x.block(at), g, _rows(rows, at), mass[:, at], w)
        columns += part
    return y, columns


def column_products(x: Scores, f: Tensor, columns: Normalizer, w: Tensor) -> Tensor:
    y = x.inverse_epsilon.new_empty(f.shape)
    for at in _blocks(x):
        y[:, at] = reference.column_products(x.block(at), f[:, at], columns, w)
    return y


def assignment_gradient(
    x: Scores, g: Tensor, rows: Normalizer, grad: Tensor | None, less: Tensor
) -> tuple[Tensor, Tensor]:
    d, columns = torch.empty_like(less), _no_columns(x)
    for at in _blocks(x):
        part_grad = None if grad is None else grad[:, at]
        d[:, at], part = reference.assignment_gradient(x.block(at), g, _rows(rows, at), part_grad, less[:, at])
        columns += part
    return d, columns


def score_gradient(
    x: Scores, g: Tensor, rows: Normalizer, grad: Tensor | None, less: Tensor, terms: Sequence[RowTerm | ColumnTerm]
) -> tuple[Tensor, Tensor]:
    result = torch.empty_like(x.values, memory_format=torch.contiguous_format)
    moment = torch.empty_like(less)
    for at in _blocks(x):
        result[:, at], moment[:, at] = reference.score_gradient(
            x.block(at),
            g,
            _rows(rows, at),
            None if grad is None else grad[:, at],
            less[:, at],
            [_term(term, at) for term in terms],
        )
    return result, moment


def _no_columns(x: Scores) -> Tensor:
    return x.inverse_epsilon.new_zeros(x.values.shape[0], x.values.shape[2])


def rescaled(x: Scores, total: Tensor, shift: Tensor, to: Tensor) -> Tensor:
    """A sum of exponentials with another shift."""
    return total * ((shift - finite(to)) * x.inverse_epsilon).exp()


def _blocks(x: Scores) -> Iterator[slice]:
    batch, n, k = x.values.shape
    step = max((CPU_BLOCK if x.values.device.type == "cpu" else GPU_BLOCK) // max(batch * k, 1), 1)
    return (slice(start, min(start + step, n)) for start in range(0, n, step))


def _rows(rows: Normalizer, at: slice) -> Normalizer:
    return Normalizer(rows.shift[:, at], rows.sum[:, at])


def _term(term: RowTerm | ColumnTerm, at: slice) -> RowTerm | ColumnTerm:
    if isinstance(term, RowTerm):
        return term._replace(rows=_rows(term.rows, at), p=term.p[:, at], q=term.q[:, at])
    return term._replace(f=term.f[:, at])
