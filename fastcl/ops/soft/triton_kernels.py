"""Triton kernels of soft assignments: they compute a tile of weights w_ij = <r_i, q_j> beside each tile of logits.

Assignments are stored like rows of C numbers, padded with zeros, and are streamed along C. Any pair may be a positive,
so every tile is masked, and running maxima keep all sums in range. A program owns rows, in the forward and in the
backward; the other set uses the same kernel with rows and columns exchanged. The functions of the contrastive kernels
compute the logits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..backends.triton_kernels import (
    INF,
    LN2,
    LOG2E,
    LOWEST,
    admissible_pairs,
    load_names,
    load_or,
    load_rows,
    masked_logits,
    product,
    rounded,
)

LARGEST = tl.constexpr(3.4028234663852886e38)  # replaces infinity, so that 0 times it is 0


@triton.jit
def soft_tile(
    X, Y, R, Q, x, a, row_bias, row_names, C, COLUMN_BIAS, COLUMN_NAMES, scale, i0, j0, N, M,
    D: tl.constexpr, CLASSES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
    SELF: tl.constexpr, IDS: tl.constexpr, NORMED: tl.constexpr, BIAS: tl.constexpr,
    PRECISION: tl.constexpr, ASSIGNMENT_PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """For the columns [j0, j0 + BLOCK_N): similarities, logits to base 2, weights, the mask of admissible pairs, c."""
    i = i0 + tl.arange(0, BLOCK_M)
    j = j0 + tl.arange(0, BLOCK_N)
    _, c, column_bias, column_names, similarity, t = masked_logits(
        X, Y, C, COLUMN_BIAS, COLUMN_NAMES, x, a, row_bias, scale, i0, j0, N, M,
        D, BLOCK_M, BLOCK_N, BLOCK_K, IDS, NORMED, BIAS, PRECISION, INTERPRETED,
    )  # fmt: skip
    w = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, CLASSES, BLOCK_C):
        r = load_rows(R, i0, k, N, CLASSES, BLOCK_M, BLOCK_C, True, ASSIGNMENT_PRECISION, INTERPRETED)
        q = load_rows(Q, j0, k, M, CLASSES, BLOCK_N, BLOCK_C, True, ASSIGNMENT_PRECISION, INTERPRETED)
        w = product(r, tl.trans(q), w, ASSIGNMENT_PRECISION, INTERPRETED)
    w = tl.where(w > LARGEST, LARGEST, w)
    admissible = admissible_pairs(i, j, N, M, row_names, column_names, row_bias, column_bias, SELF, IDS, BIAS)
    return similarity, t, w, admissible, c


@triton.jit(do_not_specialize=["N", "M"])
def soft_statistics_kernel(
    X, Y, R, Q, A, C, ROW_BIAS, COLUMN_BIAS, ROW_NAMES, COLUMN_NAMES, SCALE, STATISTICS, N, M,
    D: tl.constexpr, CLASSES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
    SELF: tl.constexpr, IDS: tl.constexpr, NORMED: tl.constexpr, BIAS: tl.constexpr,
    PRECISION: tl.constexpr, ASSIGNMENT_PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """One row block for each program. STATISTICS [5, N]: the largest logit to base 2, the sum of 2^(t - that), the sums
    of w s and of w, and the number of admissible pairs."""
    i0 = tl.program_id(0) * BLOCK_M
    i = i0 + tl.arange(0, BLOCK_M)
    is_row = i < N
    scale = tl.load(SCALE) * LOG2E
    a = load_or(A, i, is_row, 0.0)
    row_bias = load_or(ROW_BIAS, i, is_row, 0.0)
    row_names = load_names(ROW_NAMES, i, is_row, IDS)
    x = 0.0
    if BLOCK_K == D:
        x = load_rows(X, i0, 0, N, D, BLOCK_M, BLOCK_K, True, PRECISION, INTERPRETED)
    base = tl.full([BLOCK_M], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    logits = tl.zeros([BLOCK_M], tl.float32)
    weights = tl.zeros([BLOCK_M], tl.float32)
    size = tl.zeros([BLOCK_M], tl.int32)
    for j0 in range(0, M, BLOCK_N):
        _, t, w, admissible, _ = soft_tile(
            X, Y, R, Q, x, a, row_bias, row_names, C, COLUMN_BIAS, COLUMN_NAMES, scale, i0, j0, N, M,
            D, CLASSES, BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_C, SELF, IDS, NORMED, BIAS,
            PRECISION, ASSIGNMENT_PRECISION, INTERPRETED,
        )  # fmt: skip
        new = tl.maximum(base, tl.max(tl.where(admissible, t, -INF), 1))
        e = tl.where(admissible, tl.exp2(t - new[:, None]), 0.0)
        total = total * tl.exp2(base - new) + tl.sum(e, 1)
        base = new
        logits += tl.sum(tl.where(admissible & (w != 0), w * t, 0.0), 1)
        weights += tl.sum(tl.where(admissible, w, 0.0), 1)
        size += tl.sum(admissible.to(tl.int32), 1)
    places = STATISTICS + i.to(tl.int64)
    rows = tl.cast(N, tl.int64)
    tl.store(places, tl.where(base > LOWEST, base, 0.0), mask=is_row)
    tl.store(places + rows, total, mask=is_row)
    tl.store(places + 2 * rows, logits * LN2, mask=is_row)
    tl.store(places + 3 * rows, weights, mask=is_row)
    tl.store(places + 4 * rows, size.to(tl.float32), mask=is_row)


@triton.jit(do_not_specialize=["N", "M"])
def soft_gradient_kernel(
    X, Y, R, Q, A, C, ROW_BIAS, COLUMN_BIAS, ROW_NAMES, COLUMN_NAMES, SCALE, SIDE, OTHER,
    GRADIENT, SIMILARITY_SUMS, SUMS, N, M,
    D: tl.constexpr, CLASSES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
    SELF: tl.constexpr, IDS: tl.constexpr, NORMED: tl.constexpr, BIAS: tl.constexpr,
    PRECISION: tl.constexpr, ASSIGNMENT_PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """The gradient sum_j G_ij c_j y_j; a program has its rows [i0, i0 + BLOCK_M) and columns [d0, d0 + BLOCK_D).

    SIDE [3, N] and OTHER [3, M] hold base, weight and factor of a side's part of G, 2^(t - base) * weight + factor
    * w_ij; None if the side has no gradient. All parts are added in float32. Outputs are those of `gradient_kernel`.
    """
    dtype: tl.constexpr = Y.dtype.element_ty
    i0 = tl.program_id(0) * BLOCK_M
    d0 = tl.program_id(1) * BLOCK_D
    i = i0 + tl.arange(0, BLOCK_M)
    is_row = i < N
    scale = tl.load(SCALE) * LOG2E
    a = load_or(A, i, is_row, 0.0)
    row_bias = load_or(ROW_BIAS, i, is_row, 0.0)
    row_names = load_names(ROW_NAMES, i, is_row, IDS)
    if SIDE is not None:
        base = tl.load(SIDE + i, mask=is_row, other=0.0)
        weight = tl.load(SIDE + tl.cast(N, tl.int64) + i, mask=is_row, other=0.0)
        factor = tl.load(SIDE + 2 * tl.cast(N, tl.int64) + i, mask=is_row, other=0.0)
    x = 0.0
    if BLOCK_K == D:
        x = load_rows(X, i0, 0, N, D, BLOCK_M, BLOCK_K, True, PRECISION, INTERPRETED)
    gradient = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    similarity_sums = tl.zeros([BLOCK_M], tl.float32)
    sums = tl.zeros([BLOCK_M], tl.float32)
    for j0 in range(0, M, BLOCK_N):
        similarity, t, w, admissible, c = soft_tile(
            X, Y, R, Q, x, a, row_bias, row_names, C, COLUMN_BIAS, COLUMN_NAMES, scale, i0, j0, N, M,
            D, CLASSES, BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_C, SELF, IDS, NORMED, BIAS,
            PRECISION, ASSIGNMENT_PRECISION, INTERPRETED,
        )  # fmt: skip
        j = j0 + tl.arange(0, BLOCK_N)
        is_column = j < M
        g = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        if SIDE is not None:
            g += tl.exp2(t - base[:, None]) * weight[:, None] + w * factor[:, None]
        if OTHER is not None:
            other_base = tl.load(OTHER + j, mask=is_column, other=0.0)
            other_weight = tl.load(OTHER + tl.cast(M, tl.int64) + j, mask=is_column, other=0.0)
            other_factor = tl.load(OTHER + 2 * tl.cast(M, tl.int64) + j, mask=is_column, other=0.0)
            g += tl.exp2(t - other_base[None, :]) * other_weight[None, :] + w * other_factor[None, :]
        g = tl.where(admissible, g, 0.0)
        if SIMILARITY_SUMS is not None:
            similarity_sums += tl.sum(g * similarity, 1)
        if SUMS is not None:
            sums += tl.sum(g, 1)
        if NORMED:
            g = g * c[None, :]
        columns = load_rows(Y, j0, d0, M, D, BLOCK_N, BLOCK_D, True, PRECISION, INTERPRETED)
        gradient = product(rounded(g, dtype, PRECISION, INTERPRETED), columns, gradient, PRECISION, INTERPRETED)
    d = d0 + tl.arange(0, BLOCK_D)
    places = GRADIENT + tl.cast(i0, tl.int64) * D + (tl.arange(0, BLOCK_M)[:, None] * D + d[None, :])
    tl.store(places, gradient, mask=is_row[:, None])
    if d0 == 0:
        if SIMILARITY_SUMS is not None:
            tl.store(SIMILARITY_SUMS + i, similarity_sums, mask=is_row)
        if SUMS is not None:
            tl.store(SUMS + i, sums, mask=is_row)
