"""Triton kernels of the anchors' own positives: what they add to the statistics and to the gradients.

PyTorch takes more than a hundred operators for it (`own_contrasts`). Each takes longer to launch than one of these
kernels takes for a few thousand rows.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def unit_part(X, row, d, is_row, inverse, WIDTH, ROW_STRIDE, COLUMN_STRIDE):
    """The numbers d of rows, float32, times their inverse norms."""
    places = X + row[:, None] * ROW_STRIDE + d[None, :] * tl.cast(COLUMN_STRIDE, tl.int64)
    x = tl.load(places, mask=is_row[:, None] & (d < WIDTH)[None, :], other=0.0)
    return x.to(tl.float32) * inverse[:, None]


@triton.jit
def inverse_of(NORMS, i, is_row, BLOCK_M: tl.constexpr):
    """Inverse norms of rows; without NORMS they are taken as they are."""
    inverse = tl.full([BLOCK_M], 1.0, tl.float32)
    if NORMS is not None:
        inverse = tl.load(NORMS + i, mask=is_row, other=0.0)
    return inverse


@triton.jit
def joined_log_sum(
    FIELDS, PARTS, NEW_FIELDS, NEW_PARTS, i, size, is_row, logit, PLACE: tl.constexpr, LOG_SUMS: tl.constexpr,
    JOINS: tl.constexpr,
):  # fmt: skip
    """Copies the log-sum with this place, which is -1 if it is not wanted; JOINS: with one more logit."""
    if PLACE >= 0:
        at = PLACE * size + i
        shift = tl.load(PARTS + at, mask=is_row, other=0.0)
        total = tl.load(PARTS + LOG_SUMS * size + at, mask=is_row, other=1.0)
        field = tl.load(FIELDS + at, mask=is_row, other=0.0)
        if JOINS:
            nothing = total == 0.0  # then the shift is undefined; NaN is not 0
            larger = tl.where(nothing | (logit > shift), logit, shift)
            total = tl.where(nothing, 0.0, total * tl.exp(shift - larger)) + tl.exp(logit - larger)
            shift = larger
            field = shift + tl.log(total)
        tl.store(NEW_FIELDS + at, field, mask=is_row)
        tl.store(NEW_PARTS + at, shift, mask=is_row)
        tl.store(NEW_PARTS + LOG_SUMS * size + at, total, mask=is_row)


@triton.jit(do_not_specialize=["N"])
def positive_kernel(
    X, Y, X_NORMS, Y_NORMS, SCALE, FIELDS, COUNTS, PARTS, NEW_FIELDS, NEW_COUNTS, NEW_PARTS,
    N, WIDTH, X_STRIDE, X_COLUMN_STRIDE, Y_STRIDE, Y_COLUMN_STRIDE,
    ALL: tl.constexpr, POS: tl.constexpr, NEG: tl.constexpr, SUM: tl.constexpr, LOG_SUMS: tl.constexpr,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """NEW_*: FIELDS [., N], COUNTS [2, N], PARTS [2, LOG_SUMS, N] with row i of Y one more positive of row i of X."""
    i = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    is_row = i < N
    row = i.to(tl.int64)
    size = tl.cast(N, tl.int64)
    a, b = inverse_of(X_NORMS, i, is_row, BLOCK_M), inverse_of(Y_NORMS, i, is_row, BLOCK_M)
    similarity = tl.zeros([BLOCK_M], tl.float32)
    for d0 in range(0, D, BLOCK_D):
        d = d0 + tl.arange(0, BLOCK_D)
        x = unit_part(X, row, d, is_row, a, WIDTH, X_STRIDE, X_COLUMN_STRIDE)
        y = unit_part(Y, row, d, is_row, b, WIDTH, Y_STRIDE, Y_COLUMN_STRIDE)
        similarity += tl.sum(x * y, 1)
    logit = tl.load(SCALE) * similarity
    joined_log_sum(FIELDS, PARTS, NEW_FIELDS, NEW_PARTS, i, size, is_row, logit, ALL, LOG_SUMS, True)
    joined_log_sum(FIELDS, PARTS, NEW_FIELDS, NEW_PARTS, i, size, is_row, logit, POS, LOG_SUMS, True)
    joined_log_sum(FIELDS, PARTS, NEW_FIELDS, NEW_PARTS, i, size, is_row, logit, NEG, LOG_SUMS, False)
    if SUM >= 0:
        field = tl.load(FIELDS + SUM * size + i, mask=is_row, other=0.0)
        tl.store(NEW_FIELDS + SUM * size + i, field + logit, mask=is_row)
    tl.store(NEW_COUNTS + i, tl.load(COUNTS + i, mask=is_row, other=0.0) + 1.0, mask=is_row)
    tl.store(NEW_COUNTS + size + i, tl.load(COUNTS + size + i, mask=is_row, other=0.0), mask=is_row)


@triton.jit
def share_of(GRAD, PARTS, i, size, is_row, logit, PLACE: tl.constexpr, LOG_SUMS: tl.constexpr):
    """The derivative of a log-sum, times its gradient, in one of its logits; 0 if it is not wanted."""
    found = tl.zeros(logit.shape, tl.float32)
    if PLACE >= 0:
        at = PLACE * size + i
        grad = tl.load(GRAD + at, mask=is_row, other=0.0)
        shift = tl.load(PARTS + at, mask=is_row, other=0.0)
        total = tl.load(PARTS + LOG_SUMS * size + at, mask=is_row, other=1.0)
        found = grad / total * tl.exp(logit - shift)
    return found


@triton.jit(do_not_specialize=["N"])
def positive_gradient_kernel(
    X, Y, X_NORMS, Y_NORMS, SCALE, GRAD, PARTS, SWEPT, X_GRADIENT, Y_GRADIENT, SIMILARITY_SUMS,
    N, WIDTH, X_STRIDE, X_COLUMN_STRIDE, Y_STRIDE, Y_COLUMN_STRIDE,
    ALL: tl.constexpr, POS: tl.constexpr, NEG: tl.constexpr, SUM: tl.constexpr, LOG_SUMS: tl.constexpr,
    LARGEST_INVERSE: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """X_GRADIENT [N, WIDTH]: SWEPT [N, WIDTH] and the gradient through the logits of `positive_kernel`; Y_GRADIENT the
    latter for Y; SIMILARITY_SUMS [N] each logit's gradient times the similarity. None: not needed.

    GRAD [., N]: of the joined fields, whose parts are PARTS.
    """
    i = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    is_row = i < N
    row = i.to(tl.int64)
    size = tl.cast(N, tl.int64)
    a, b = inverse_of(X_NORMS, i, is_row, BLOCK_M), inverse_of(Y_NORMS, i, is_row, BLOCK_M)
    similarity = tl.zeros([BLOCK_M], tl.float32)
    x_squares = tl.zeros([BLOCK_M], tl.float32)
    y_squares = tl.zeros([BLOCK_M], tl.float32)
    for d0 in range(0, D, BLOCK_D):
        d = d0 + tl.arange(0, BLOCK_D)
        x = unit_part(X, row, d, is_row, a, WIDTH, X_STRIDE, X_COLUMN_STRIDE)
        y = unit_part(Y, row, d, is_row, b, WIDTH, Y_STRIDE, Y_COLUMN_STRIDE)
        similarity += tl.sum(x * y, 1)
        x_squares += tl.sum(x * x, 1)
        y_squares += tl.sum(y * y, 1)
    scale = tl.load(SCALE)
    logit = scale * similarity
    g = share_of(GRAD, PARTS, i, size, is_row, logit, ALL, LOG_SUMS)
    g += share_of(GRAD, PARTS, i, size, is_row, logit, POS, LOG_SUMS)
    if SUM >= 0:
        g += tl.load(GRAD + SUM * size + i, mask=is_row, other=0.0)
    if SIMILARITY_SUMS is not None:
        tl.store(SIMILARITY_SUMS + i, g * similarity, mask=is_row)
    g *= scale
    # Off the rows where they were normalised; below the floor of the norm a row was divided by a constant.
    x_along = tl.zeros([BLOCK_M], tl.float32)
    y_along = tl.zeros([BLOCK_M], tl.float32)
    if X_NORMS is not None:
        linear = (a == 0.0) | (a >= LARGEST_INVERSE)
        x_along = tl.where(linear, 0.0, g * similarity / tl.where(linear, 1.0, x_squares))
    if Y_NORMS is not None:
        linear = (b == 0.0) | (b >= LARGEST_INVERSE)
        y_along = tl.where(linear, 0.0, g * similarity / tl.where(linear, 1.0, y_squares))
    for d0 in range(0, D, BLOCK_D):
        d = d0 + tl.arange(0, BLOCK_D)
        x = unit_part(X, row, d, is_row, a, WIDTH, X_STRIDE, X_COLUMN_STRIDE)
        y = unit_part(Y, row, d, is_row, b, WIDTH, Y_STRIDE, Y_COLUMN_STRIDE)
        places = row[:, None] * WIDTH + d[None, :]
        there = is_row[:, None] & (d < WIDTH)[None, :]
        if X_GRADIENT is not None:
            swept = tl.load(SWEPT + places, mask=there, other=0.0)
            towards = (g[:, None] * y - x_along[:, None] * x) * a[:, None]
            tl.store(X_GRADIENT + places, swept + towards, mask=there)
        if Y_GRADIENT is not None:
            tl.store(Y_GRADIENT + places, (g[:, None] * x - y_along[:, None] * y) * b[:, None], mask=there)
