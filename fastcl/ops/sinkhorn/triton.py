"""Sinkhorn's passes on backend ``triton``: launches of the kernels in `triton_kernels`.

A program holds whole rows of up to `WHOLE` columns, so one read of the scores gives the sums over rows and over
columns. A pass reads longer rows twice, in tiles: for the sums over each row, then for the columns. Column sums are
formed in chunks of at most `CHUNK` rows, then added in the order of chunks: the same bits in every run on one device,
with memory of K numbers per chunk.

Tiles are not yet measured on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends import triton_launch
from ..backends.triton_launch import blocks, launch, on_device
from ..backends.triton_tiles import Tile
from .reference import CHUNK, LEAST_CHUNK, ColumnTerm, Normalizer, RowTerm, Scores, finite, per_sum

WHOLE, WHOLE_SPREAD = 8192, 2048  # for contiguous columns, and for strided ones, whose addresses need registers
WARPS = 32  # warps that each multiprocessor should have
NORMALIZE, PRODUCTS, GRADIENT, COLUMN_PRODUCTS = range(4)  # as in `triton_kernels`


def whole_rows_tile(k: int, spread: bool, interpreted: bool) -> Tile | None:
    """Shape for rows that a program holds whole; None for longer rows. spread: the columns are not contiguous."""
    columns = max(16, 1 << (k - 1).bit_length())
    if interpreted:
        return Tile(128, columns, 0, 0, 4, 1) if k <= 64 else None
    if k > (WHOLE_SPREAD if spread else WHOLE):
        return None
    warps = max(4, columns // (128 if spread else 256))  # four or eight numbers per thread
    return Tile(max(1, min(16, (512 if spread else 1024) // columns)), columns, 0, 0, warps, 1)


def part_rows_tile(interpreted: bool) -> Tile:
    """Shape for longer rows, and for passes that hold no row."""
    return Tile(128, 128, 0, 0, 4, 1) if interpreted else Tile(4, 1024, 0, 0, 8, 1)


def score_gradient_tile(interpreted: bool) -> Tile:
    """Shape for `score_gradient`, the pass that needs the most registers."""
    return Tile(128, 128, 0, 0, 4, 1) if interpreted else Tile(4, 512, 0, 0, 4, 1)


def columns_tile(interpreted: bool) -> Tile:
    """Shape for programs that own columns and loop over rows."""
    return Tile(128, 128, 0, 0, 4, 1) if interpreted else Tile(16, 256, 0, 0, 8, 1)


def column_sums(x: Scores, f: Tensor) -> Normalizer:
    batch, n, k = x.values.shape
    if n == 0 or batch == 0:
        return Normalizer(x.new(batch, k).fill_(-torch.inf), x.new(batch, k).zero_())
    shape = columns_tile(triton_launch.INTERPRETED)
    tiles = blocks(k, shape.block_n)
    chunk = _chunk(x, shape, tiles * batch)
    chunks = blocks(n, chunk)
    shift, total = x.new(2, batch, chunks, k)
    given = {**_potential(f), "PART_SHIFT": shift, "PART_SUM": total, "CHUNK": chunk, "CHUNKS": chunks}
    _launch("sinkhorn_column_sums_kernel", x, shape, tiles * chunks * batch, **given)
    shift = torch.where(total == 0, -torch.inf, shift)  # a non-empty sum has a term of 1, so 0 means only -inf
    largest = shift.amax(1)
    scale = ((shift - finite(largest)[:, None]) * x.inverse_epsilon).exp()
    return Normalizer(largest, (total * scale).sum(1))


def row_pass(
    x: Scores, g: Tensor, above: Tensor | None, mass: Tensor | None, assignments: bool
) -> tuple[Normalizer, Tensor | None, Tensor | None]:
    rows = Normalizer(*x.new(2, *x.values.shape[:2]))
    matrix = x.new_matrix() if assignments else None
    columns = _reduce(x, NORMALIZE, g, rows, mass=mass, matrix=matrix, sums=mass is not None)
    return rows, None if mass is None else columns, matrix


def products(x: Scores, g: Tensor, rows: Normalizer, mass: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    y = x.new(*x.values.shape[:2])
    return y, _reduce(x, PRODUCTS, g, rows, by_row=y, mass=mass, w=w)


def column_products(x: Scores, f: Tensor, columns: Normalizer, w: Tensor) -> Tensor:
    batch, n, _ = x.values.shape
    y = x.new(batch, n)
    shape = part_rows_tile(triton_launch.INTERPRETED)
    shift, weight = finite(columns.shift).contiguous(), per_sum(w, columns).contiguous()
    given: dict[str, Any] = {
        **_potential(f),
        "SHIFT": shift,
        "SUM": None,
        "W": weight,
        "BY_ROW": y,
        "PASS": COLUMN_PRODUCTS,
    }
    _launch("sinkhorn_rows_kernel", x, shape, blocks(n, shape.block_m) * batch, **given)
    return y


def assignment_gradient(
    x: Scores, g: Tensor, rows: Normalizer, grad: Tensor | None, less: Tensor
) -> tuple[Tensor, Tensor]:
    d = x.new(*x.values.shape[:2])
    return d, _reduce(x, GRADIENT, g, rows, by_row=d, less=less, grad=grad)


def score_gradient(
    x: Scores, g: Tensor, rows: Normalizer, grad: Tensor | None, less: Tensor, terms: Sequence[RowTerm | ColumnTerm]
) -> tuple[Tensor, Tensor]:
    batch, n, k = x.values.shape
    matrix, moment = x.new_matrix(), x.new(batch, n)
    of_rows = [term for term in terms if isinstance(term, RowTerm)]
    of_columns = [term for term in terms if isinstance(term, ColumnTerm)]

    def stacked(values: list[Tensor], size: int) -> Tensor:
        return torch.stack(values) if values else x.new(0, batch, size)

    shape = score_gradient_tile(triton_launch.INTERPRETED)
    _launch(
        "sinkhorn_score_gradient_kernel",
        x,
        shape,
        blocks(n, shape.block_m) * batch,
        grad,
        **_potential(g),
        **_potential(stacked([term.g for term in of_rows], k).double(), "TERM_"),
        **_potential(stacked([term.f for term in of_columns], n).double(), "COLUMN_"),
        SHIFT=rows.shift.contiguous(),
        SUM=rows.sum.contiguous(),
        LESS=less.contiguous(),
        TERM_W=stacked([term.w for term in of_rows], k),
        TERM_SHIFT=stacked([term.rows.shift for term in of_rows], n),
        TERM_P=stacked([term.p / term.rows.sum for term in of_rows], n),
        TERM_Q=stacked([term.q / term.rows.sum for term in of_rows], n),
        COLUMN_SHIFT=stacked([finite(term.columns.shift) for term in of_columns], k),
        COLUMN_W=stacked([per_sum(term.w, term.columns) for term in of_columns], k),
        MOMENT=moment,
        MATRIX=matrix,
        BATCH=batch,
        ROW_TERMS=len(of_rows),
        COLUMN_TERMS=len(of_columns),
    )
    return matrix, moment


def _reduce(
    x: Scores,
    which: int,
    g: Tensor,
    rows: Normalizer,
    *,
    by_row: Tensor | None = None,
    mass: Tensor | None = None,
    w: Tensor | None = None,
    less: Tensor | None = None,
    grad: Tensor | None = None,
    matrix: Tensor | None = None,
    sums: bool = True,
) -> Tensor:
    """Runs a pass, which fills its per-row outputs, and returns its column sums [B, K]; [0] without `sums`."""
    batch, n, k = x.values.shape
    if n == 0 or batch == 0:
        return x.new(batch, k).zero_()
    interpreted = triton_launch.INTERPRETED
    spread = any(given is not None and given.stride(2) != 1 for given in (x.values, grad))
    whole = whole_rows_tile(k, spread, interpreted)
    shape = whole or columns_tile(interpreted)
    tiles = 1 if whole else blocks(k, shape.block_n)
    chunk = _chunk(x, shape, tiles * batch)
    chunks = blocks(n, chunk)
    partial = x.new(batch, chunks, k) if sums else None
    vectors = {"SHIFT": rows.shift, "SUM": rows.sum, "MASS": mass, "W": w, "LESS": less}
    given: dict[str, Any] = {name: None if value is None else value.contiguous() for name, value in vectors.items()}
    given |= {**_potential(g), "BY_ROW": by_row, "PASS": which}
    of_chunks = {"PARTIAL": partial, "MATRIX": matrix, "CHUNK": chunk, "CHUNKS": chunks}
    if whole:
        _launch("sinkhorn_whole_rows_kernel", x, shape, chunks * batch, grad, **given, **of_chunks)
    else:
        part = part_rows_tile(interpreted)
        if which == GRADIENT and grad is None and by_row is not None:
            by_row.zero_()
        else:
            _launch("sinkhorn_rows_kernel", x, part, blocks(n, part.block_m) * batch, grad, **given)
        if sums or matrix is not None:
            _launch("sinkhorn_columns_kernel", x, shape, tiles * chunks * batch, grad, **given, **of_chunks)
    return x.new(0) if partial is None else partial.sum(1)


def _chunk(x: Scores, shape: Tile, others: int) -> int:
    """Rows per chunk: enough chunks to fill the device if `others` programs process each chunk."""
    n = x.values.shape[1]
    programs = triton_launch.programs(x.values.device) * max(1, WARPS // shape.warps)
    rows = min(max(blocks(n, blocks(programs, others)), LEAST_CHUNK), CHUNK)
    return blocks(rows, shape.block_m) * shape.block_m


def _potential(potential: Tensor, prefix: str = "") -> dict[str, Tensor]:
    """A float64 potential of any shape as two float32 tensors."""
    exact = potential.contiguous()
    high, low = torch.empty(2, *exact.shape, dtype=torch.float32, device=exact.device)
    if exact.numel():
        shape = Tile(1, 1024, 0, 0, 4, 1)
        given = {"POTENTIAL": exact, "HIGH": high, "LOW": low, "SIZE": exact.numel(), "COLUMNS": shape.block_n}
        with on_device(exact.device):
            launch("sinkhorn_split_kernel", shape, (blocks(exact.numel(), shape.block_n),), given)
    return {prefix + "HIGH": high, prefix + "LOW": low}


def _launch(name: str, x: Scores, shape: Tile, programs: int, grad: Tensor | None = None, **given: Any) -> None:
    if programs == 0:
        return
    _, n, k = x.values.shape
    scores = x.values.resolve_neg()
    weight = None if grad is None else grad.resolve_neg()
    known: dict[str, Any] = {
        "S": scores,
        "GRAD": weight,
        "INVERSE_EPSILON": x.inverse_epsilon,
        "N": n,
        "K": k,
        "ROWS": shape.block_m,
        "COLUMNS": shape.block_n,
        "INTERPRETED": triton_launch.INTERPRETED,
    }
    for tensor, prefix in ((scores, "PER_"), (scores if weight is None else weight, "GRAD_PER_")):
        known |= dict(zip((prefix + "BATCH", prefix + "ROW", prefix + "COLUMN"), tensor.stride(), strict=True))
    with on_device(scores.device):
        launch(name, shape, (programs,), {**given, **known})
