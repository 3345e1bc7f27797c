"""Sinkhorn's passes as Triton kernels; `reference` defines what they compute, `triton` launches them.

Scores have any strides; all other tensors are contiguous, and potentials are pairs of float32
(`sinkhorn_split_kernel`). A program owns rows, or columns of a chunk of rows. No sum is shared by two programs: each
chunk writes a partial sum over its rows, and the partial sums are added in the order of chunks.

Exponentials are exp2((S + potential - shift) * scale) with scale = log2(e) / epsilon. The sum is formed before the
product because its terms nearly cancel where the plan has mass. Outside of the matrix the potential is -inf or the
shift is inf, so exponentials are 0 there, and no NaN enters a sum.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..backends.triton_kernels import LOG2E, rounded

NOTHING = tl.constexpr(-3.4028234663852886e38)  # initial running maximum: finite, so that differences are never NaN
# The values of PASS: what a row is reduced to, and the weights of its exponentials in the column sums.
NORMALIZE = tl.constexpr(0)
PRODUCTS = tl.constexpr(1)
GRADIENT = tl.constexpr(2)
COLUMN_PRODUCTS = tl.constexpr(3)


@triton.jit(do_not_specialize=["SIZE"])
def sinkhorn_split_kernel(POTENTIAL, HIGH, LOW, SIZE, COLUMNS: tl.constexpr):
    """Splits float64 numbers into sums of two float32."""
    j = tl.cast(tl.program_id(0), tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    exact = tl.load(POTENTIAL + j, mask=j < SIZE, other=0.0)
    high = exact.to(tl.float32)
    low = (exact - high.to(tl.float64)).to(tl.float32)
    tl.store(HIGH + j, high, mask=j < SIZE)
    tl.store(LOW + j, tl.where(tl.abs(high) == float("inf"), 0.0, low), mask=j < SIZE)


@triton.jit
def load_tile(S, b, i, j, N, K, PER_BATCH, PER_ROW, PER_COLUMN):
    """A tile [ROWS, COLUMNS] as float32, 0 outside of the matrix."""
    places = i.to(tl.int64)[:, None] * PER_ROW + j.to(tl.int64)[None, :] * PER_COLUMN
    inside = (i < N)[:, None] & (j < K)[None, :]
    return tl.load(S + tl.cast(b, tl.int64) * PER_BATCH + places, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def store_tile(MATRIX, b, i, j, N, K, values, INTERPRETED: tl.constexpr):
    places = (tl.cast(b, tl.int64) * N + i.to(tl.int64))[:, None] * K + j[None, :]
    inside = (i < N)[:, None] & (j < K)[None, :]
    tl.store(MATRIX + places, rounded(values, MATRIX.dtype.element_ty, "ieee", INTERPRETED), mask=inside)


@triton.jit
def weights(e, grad, less, per_sum, reduced, PASS: tl.constexpr):
    """A tile's terms of the column sums. per_sum: mass / sum, for GRADIENT 1 / sum; 0 beyond the last row."""
    if PASS == PRODUCTS:
        weighted = e * (per_sum * reduced)[:, None]
    elif PASS == GRADIENT:
        weighted = e * per_sum[:, None] * (grad - (reduced + less)[:, None])
    else:
        weighted = e * per_sum[:, None]
    return weighted


# The first column update.


@triton.jit(do_not_specialize=["N", "CHUNK", "CHUNKS"])
def sinkhorn_column_sums_kernel(
    S,
    HIGH,  # f [B, N]
    LOW,
    PART_SHIFT,  # [B, CHUNKS, K]
    PART_SUM,
    INVERSE_EPSILON,
    N,
    K,
    PER_BATCH,
    PER_ROW,
    PER_COLUMN,
    CHUNK,
    CHUNKS,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Largest S + f and sum of exponentials of each column over a chunk of rows."""
    tiles = tl.cdiv(K, COLUMNS)
    tile = tl.program_id(0) % tiles
    chunk = tl.program_id(0) // tiles % CHUNKS
    b = tl.program_id(0) // tiles // CHUNKS
    j = tile * COLUMNS + tl.arange(0, COLUMNS)
    columns = j < K
    scale = tl.load(INVERSE_EPSILON) * LOG2E
    most = tl.full([COLUMNS], NOTHING, tl.float32)
    total = tl.zeros([COLUMNS], tl.float32)
    for i0 in range(chunk * CHUNK, tl.minimum(N, (chunk + 1) * CHUNK), ROWS):
        i = i0 + tl.arange(0, ROWS)
        rows = i < N
        at_i = tl.cast(b, tl.int64) * N + i
        high = tl.load(HIGH + at_i, mask=rows, other=float("-inf"))
        low = tl.load(LOW + at_i, mask=rows, other=0.0)
        t = (load_tile(S, b, i, j, N, K, PER_BATCH, PER_ROW, PER_COLUMN) + high[:, None]) + low[:, None]
        larger = tl.maximum(most, tl.max(t, 0))
        total = total * tl.exp2((most - larger) * scale) + tl.sum(tl.exp2((t - larger[None, :]) * scale), 0)
        most = larger
    places = (tl.cast(b, tl.int64) * CHUNKS + chunk) * K + j
    tl.store(PART_SHIFT + places, most, mask=columns)
    tl.store(PART_SUM + places, total, mask=columns)


# Rows that a program holds whole: one read of the scores.


@triton.jit(do_not_specialize=["N", "CHUNK", "CHUNKS"])
def sinkhorn_whole_rows_kernel(
    S,
    HIGH,  # g [B, K]
    LOW,
    SHIFT,  # [B, N]: written by NORMALIZE, else read
    SUM,
    MASS,  # [B, N]
    W,  # [B, K]
    LESS,  # [B, N]
    GRAD,  # [B, N, K], any strides
    BY_ROW,  # [B, N]
    PARTIAL,  # [B, CHUNKS, K]
    MATRIX,  # [B, N, K]
    INVERSE_EPSILON,
    N,
    K,
    PER_BATCH,
    PER_ROW,
    PER_COLUMN,
    GRAD_PER_BATCH,
    GRAD_PER_ROW,
    GRAD_PER_COLUMN,
    CHUNK,
    CHUNKS,
    PASS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """row_pass, products or assignment_gradient of a chunk of rows: the sum over each row, and the chunk's part of the
    column sums."""
    chunk = tl.program_id(0) % CHUNKS
    b = tl.program_id(0) // CHUNKS
    j = tl.arange(0, COLUMNS)
    columns = j < K
    at_j = tl.cast(b, tl.int64) * K + j
    scale = tl.load(INVERSE_EPSILON) * LOG2E
    high = tl.load(HIGH + at_j, mask=columns, other=float("-inf"))
    low = tl.load(LOW + at_j, mask=columns, other=0.0)
    sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    for i0 in range(chunk * CHUNK, tl.minimum(N, (chunk + 1) * CHUNK), ROWS):
        i = i0 + tl.arange(0, ROWS)
        rows = i < N
        at_i = tl.cast(b, tl.int64) * N + i
        t = (load_tile(S, b, i, j, N, K, PER_BATCH, PER_ROW, PER_COLUMN) + high[None, :]) + low[None, :]
        if PASS == NORMALIZE:
            shift = tl.maximum(tl.max(t, 1), NOTHING)
            e = tl.exp2((t - shift[:, None]) * scale)
            total = tl.sum(e, 1)
            tl.store(SHIFT + at_i, shift, mask=rows)
            tl.store(SUM + at_i, total, mask=rows)
            reduced = total
        else:
            e = tl.exp2((t - tl.load(SHIFT + at_i, mask=rows, other=float("inf"))[:, None]) * scale)
            total = tl.load(SUM + at_i, mask=rows, other=1.0)
        grad = e
        less = total
        if PASS == PRODUCTS:
            w = tl.load(W + at_j, mask=columns, other=0.0)
            reduced = tl.sum(e * w[None, :], 1) / total
            tl.store(BY_ROW + at_i, reduced, mask=rows)
        if PASS == GRADIENT:
            less = tl.load(LESS + at_i, mask=rows, other=0.0)
            if GRAD is not None:
                grad = load_tile(GRAD, b, i, j, N, K, GRAD_PER_BATCH, GRAD_PER_ROW, GRAD_PER_COLUMN)
                reduced = tl.sum(e * grad, 1) / total
            else:
                grad = tl.zeros([ROWS, COLUMNS], tl.float32)
                reduced = tl.zeros([ROWS], tl.float32)
            tl.store(BY_ROW + at_i, reduced, mask=rows)
        if MATRIX is not None:
            store_tile(MATRIX, b, i, j, N, K, e / total[:, None], INTERPRETED)
        if PARTIAL is not None:
            mass = tl.where(rows, 1.0, 0.0)
            if PASS != GRADIENT:
                mass = tl.load(MASS + at_i, mask=rows, other=0.0)
            sums += weights(e, grad, less, tl.where(rows, mass / total, 0.0), reduced, PASS)
    if PARTIAL is not None:
        places = (tl.cast(b, tl.int64) * CHUNKS + chunk) * K + j
        tl.store(PARTIAL + places, tl.sum(sums, 0), mask=columns)


# Longer rows: first the sums over each row, then the column sums in a second read.


@triton.jit(do_not_specialize=["N"])
def sinkhorn_rows_kernel(
    S,
    HIGH,  # g [B, K]; for COLUMN_PRODUCTS f [B, N]
    LOW,
    SHIFT,  # [B, N]: written by NORMALIZE, else read; for COLUMN_PRODUCTS [B, K]
    SUM,
    W,  # [B, K]
    GRAD,
    BY_ROW,  # [B, N]
    INVERSE_EPSILON,
    N,
    K,
    PER_BATCH,
    PER_ROW,
    PER_COLUMN,
    GRAD_PER_BATCH,
    GRAD_PER_ROW,
    GRAD_PER_COLUMN,
    PASS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The sum over each row, one tile of columns after another."""
    blocks = tl.cdiv(N, ROWS)
    i = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    b = tl.program_id(0) // blocks
    rows = i < N
    at_i = tl.cast(b, tl.int64) * N + i
    scale = tl.load(INVERSE_EPSILON) * LOG2E
    most = tl.full([ROWS], NOTHING, tl.float32)
    if PASS == COLUMN_PRODUCTS:
        row_high = tl.load(HIGH + at_i, mask=rows, other=float("-inf"))
        row_low = tl.load(LOW + at_i, mask=rows, other=0.0)
    elif PASS != NORMALIZE:
        most = tl.load(SHIFT + at_i, mask=rows, other=float("inf"))
    sums = tl.zeros([ROWS], tl.float32)
    for j0 in range(0, K, COLUMNS):
        j = j0 + tl.arange(0, COLUMNS)
        columns = j < K
        at_j = tl.cast(b, tl.int64) * K + j
        s = load_tile(S, b, i, j, N, K, PER_BATCH, PER_ROW, PER_COLUMN)
        if PASS == COLUMN_PRODUCTS:
            t = (s + row_high[:, None]) + row_low[:, None]
            e = tl.exp2((t - tl.load(SHIFT + at_j, mask=columns, other=float("inf"))[None, :]) * scale)
        else:
            high = tl.load(HIGH + at_j, mask=columns, other=float("-inf"))
            low = tl.load(LOW + at_j, mask=columns, other=0.0)
            t = (s + high[None, :]) + low[None, :]
            if PASS == NORMALIZE:
                larger = tl.maximum(most, tl.max(t, 1))
                sums *= tl.exp2((most - larger) * scale)
                most = larger
            e = tl.exp2((t - most[:, None]) * scale)
        if W is not None:
            e *= tl.load(W + at_j, mask=columns, other=0.0)[None, :]
        if PASS == GRADIENT:
            e *= load_tile(GRAD, b, i, j, N, K, GRAD_PER_BATCH, GRAD_PER_ROW, GRAD_PER_COLUMN)
        sums += tl.sum(e, 1)
    if PASS == NORMALIZE:
        tl.store(SHIFT + at_i, most, mask=rows)
        tl.store(SUM + at_i, sums, mask=rows)
    elif PASS == COLUMN_PRODUCTS:
        tl.store(BY_ROW + at_i, sums, mask=rows)
    else:
        tl.store(BY_ROW + at_i, sums / tl.load(SUM + at_i, mask=rows, other=1.0), mask=rows)


@triton.jit(do_not_specialize=["N", "CHUNK", "CHUNKS"])
def sinkhorn_columns_kernel(
    S,
    HIGH,  # g [B, K]
    LOW,
    SHIFT,  # [B, N]
    SUM,
    MASS,
    LESS,
    GRAD,
    BY_ROW,  # [B, N]: read
    PARTIAL,  # [B, CHUNKS, K]
    MATRIX,  # [B, N, K]
    INVERSE_EPSILON,
    N,
    K,
    PER_BATCH,
    PER_ROW,
    PER_COLUMN,
    GRAD_PER_BATCH,
    GRAD_PER_ROW,
    GRAD_PER_COLUMN,
    CHUNK,
    CHUNKS,
    PASS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """A chunk's part of the column sums, and the assignments, from the sums over each row."""
    tiles = tl.cdiv(K, COLUMNS)
    tile = tl.program_id(0) % tiles
    chunk = tl.program_id(0) // tiles % CHUNKS
    b = tl.program_id(0) // tiles // CHUNKS
    j = tile * COLUMNS + tl.arange(0, COLUMNS)
    columns = j < K
    at_j = tl.cast(b, tl.int64) * K + j
    scale = tl.load(INVERSE_EPSILON) * LOG2E
    high = tl.load(HIGH + at_j, mask=columns, other=float("-inf"))
    low = tl.load(LOW + at_j, mask=columns, other=0.0)
    sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    for i0 in range(chunk * CHUNK, tl.minimum(N, (chunk + 1) * CHUNK), ROWS):
        i = i0 + tl.arange(0, ROWS)
        rows = i < N
        at_i = tl.cast(b, tl.int64) * N + i
        t = (load_tile(S, b, i, j, N, K, PER_BATCH, PER_ROW, PER_COLUMN) + high[None, :]) + low[None, :]
        e = tl.exp2((t - tl.load(SHIFT + at_i, mask=rows, other=float("inf"))[:, None]) * scale)
        total = tl.load(SUM + at_i, mask=rows, other=1.0)
        if MATRIX is not None:
            store_tile(MATRIX, b, i, j, N, K, e / total[:, None], INTERPRETED)
        if PARTIAL is not None:
            mass = tl.where(rows, 1.0, 0.0)
            reduced = total
            less = total
            grad = e
            if PASS != GRADIENT:
                mass = tl.load(MASS + at_i, mask=rows, other=0.0)
            if PASS != NORMALIZE:
                reduced = tl.load(BY_ROW + at_i, mask=rows, other=0.0)
            if PASS == GRADIENT:
                less = tl.load(LESS + at_i, mask=rows, other=0.0)
                if GRAD is not None:
                    grad = load_tile(GRAD, b, i, j, N, K, GRAD_PER_BATCH, GRAD_PER_ROW, GRAD_PER_COLUMN)
                else:
                    grad = tl.zeros([ROWS, COLUMNS], tl.float32)
            sums += weights(e, grad, less, tl.where(rows, mass / total, 0.0), reduced, PASS)
    if PARTIAL is not None:
        places = (tl.cast(b, tl.int64) * CHUNKS + chunk) * K + j
        tl.store(PARTIAL + places, tl.sum(sums, 0), mask=columns)


# The gradient of the scores.


@triton.jit(do_not_specialize=["N", "ROW_TERMS", "COLUMN_TERMS"])
def sinkhorn_score_gradient_kernel(
    S,
    HIGH,  # g [B, K]
    LOW,
    SHIFT,  # [B, N]
    SUM,
    LESS,
    GRAD,
    TERM_HIGH,  # g of the row terms [ROW_TERMS, B, K]
    TERM_LOW,
    TERM_W,
    TERM_SHIFT,  # [ROW_TERMS, B, N]
    TERM_P,
    TERM_Q,
    COLUMN_HIGH,  # f of the column terms [COLUMN_TERMS, B, N]
    COLUMN_LOW,
    COLUMN_SHIFT,  # [COLUMN_TERMS, B, K]
    COLUMN_W,
    MOMENT,  # [B, N]
    MATRIX,  # [B, N, K]
    INVERSE_EPSILON,
    N,
    K,
    PER_BATCH,
    PER_ROW,
    PER_COLUMN,
    GRAD_PER_BATCH,
    GRAD_PER_ROW,
    GRAD_PER_COLUMN,
    BATCH,
    ROW_TERMS,
    COLUMN_TERMS,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """score_gradient of a block of rows, one tile of columns after another. Terms are already divided by their sums."""
    blocks = tl.cdiv(N, ROWS)
    i = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    b = tl.program_id(0) // blocks
    rows = i < N
    at_i = tl.cast(b, tl.int64) * N + i
    inverse_epsilon = tl.load(INVERSE_EPSILON)
    scale = inverse_epsilon * LOG2E
    shift = tl.load(SHIFT + at_i, mask=rows, other=float("inf"))
    inverse = 1.0 / tl.load(SUM + at_i, mask=rows, other=1.0)
    less = tl.load(LESS + at_i, mask=rows, other=0.0)
    moment = tl.zeros([ROWS], tl.float32)
    for j0 in range(0, K, COLUMNS):
        j = j0 + tl.arange(0, COLUMNS)
        columns = j < K
        at_j = tl.cast(b, tl.int64) * K + j
        s = load_tile(S, b, i, j, N, K, PER_BATCH, PER_ROW, PER_COLUMN)
        high = tl.load(HIGH + at_j, mask=columns, other=float("-inf"))
        low = tl.load(LOW + at_j, mask=columns, other=0.0)
        t = (s + high[None, :]) + low[None, :]
        r = tl.exp2((t - shift[:, None]) * scale) * inverse[:, None]
        if GRAD is not None:
            grad = load_tile(GRAD, b, i, j, N, K, GRAD_PER_BATCH, GRAD_PER_ROW, GRAD_PER_COLUMN)
            total = r * (grad - less[:, None])
        else:
            total = r * (0.0 - less[:, None])
        for m in range(0, ROW_TERMS):
            term_i = tl.cast(m * BATCH + b, tl.int64) * N + i
            term_j = tl.cast(m * BATCH + b, tl.int64) * K + j
            high = tl.load(TERM_HIGH + term_j, mask=columns, other=float("-inf"))
            low = tl.load(TERM_LOW + term_j, mask=columns, other=0.0)
            w = tl.load(TERM_W + term_j, mask=columns, other=0.0)
            term_shift = tl.load(TERM_SHIFT + term_i, mask=rows, other=float("inf"))
            p = tl.load(TERM_P + term_i, mask=rows, other=0.0)
            q = tl.load(TERM_Q + term_i, mask=rows, other=0.0)
            t = (s + high[None, :]) + low[None, :]
            total -= tl.exp2((t - term_shift[:, None]) * scale) * (p[:, None] + q[:, None] * w[None, :])
        for m in range(0, COLUMN_TERMS):
            term_i = tl.cast(m * BATCH + b, tl.int64) * N + i
            term_j = tl.cast(m * BATCH + b, tl.int64) * K + j
            f_high = tl.load(COLUMN_HIGH + term_i, mask=rows, other=float("-inf"))
            f_low = tl.load(COLUMN_LOW + term_i, mask=rows, other=0.0)
            column_shift = tl.load(COLUMN_SHIFT + term_j, mask=columns, other=float("inf"))
            w = tl.load(COLUMN_W + term_j, mask=columns, other=0.0)
            t = (s + f_high[:, None]) + f_low[:, None]
            total -= tl.exp2((t - column_shift[None, :]) * scale) * w[None, :]
        moment += tl.sum(tl.where(total != 0.0, total * s, 0.0), 1)  # a score of -inf has weight 0
        store_tile(MATRIX, b, i, j, N, K, total * inverse_epsilon, INTERPRETED)
    tl.store(MOMENT + at_i, moment, mask=rows)
