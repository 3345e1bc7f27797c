"""The Triton kernel of the pair sums.

A program owns a block of rows and streams over the columns, so nothing is added by two programs. Its rows are the
anchors, or the contrasts, whose weights then belong to the columns. Rows are sorted by cluster: interior tiles hold
negatives only. Of small distances the inner product would lose the digits; pairs that are near take a loop over
differences of rows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..backends.triton_kernels import (
    LEFT_OUT,
    LOG2E,
    admissible_pairs,
    column_walk,
    in_cluster,
    inner_products,
    interior_tile,
    load_names,
    load_or,
    load_rows,
    mixed_tile,
    product,
    rounded,
    similarities,
)
from ..contrastive.triton.statistics_kernels import row_places

# The numbers of kinds in pair_maps.KINDS; those from DISTANCE on are maps of distances.
SOFTPLUS, HINGE, DISTANCE, SQUARED = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
NEAR = tl.constexpr(1 / 64)  # of the squared norms: smaller squared distances are found again, as in `chunked`
# float16 flushes below 2^-24 and ends at 2^16: slopes are lifted to this, row by row. Norms add a factor of at most 2.
LIFTED = tl.constexpr(2.0**13)
HIGHEST = tl.constexpr(2.0**113)


@triton.jit
def number_of(places, AXIS: tl.constexpr):
    """How many are true along an axis. A sum of integers would become a population count that passes through memory."""
    return tl.sum(tl.where(places, 1.0, 0.0), AXIS).to(tl.int32)


@triton.jit
def log1p_of_unit(u):
    """log(1 + u) for 0 <= u <= 1, with a relative error below 2e-7: a minimax polynomial of log(1 + u) / u."""
    p = tl.full(u.shape, 0.0052326878999137275, tl.float32)
    p = tl.fma(p, u, tl.full(u.shape, -0.02950521327447293, tl.float32))
    p = tl.fma(p, u, tl.full(u.shape, 0.07822591034925812, tl.float32))
    p = tl.fma(p, u, tl.full(u.shape, -0.1366324227205363, tl.float32))
    p = tl.fma(p, u, tl.full(u.shape, 0.19106005104412294, tl.float32))
    p = tl.fma(p, u, tl.full(u.shape, -0.24842981790442767, tl.float32))
    p = tl.fma(p, u, tl.full(u.shape, 0.3331909675437183, tl.float32))
    p = tl.fma(p, u, tl.full(u.shape, -0.4999949313792834, tl.float32))
    p = tl.fma(p, u, tl.full(u.shape, 0.999999969879359, tl.float32))
    return p * u


@triton.jit
def pair_map(t, pairs, pos_margin, neg_margin, KIND: tl.constexpr, MIXED: tl.constexpr):
    """Values and derivatives at logits or distances t; pairs: which are positives, if MIXED. NaN stays NaN."""
    # A positive's value falls with the logit or grows with the distance, a negative's the other way.
    if KIND == SOFTPLUS:
        z = t
        if MIXED:
            z = tl.where(pairs, -t, t)
        u = tl.exp2(tl.abs(z) * -LOG2E)
        value = tl.where(z <= 0, 0.0, z) + log1p_of_unit(u)
        p = 1.0 / (1.0 + u)
        slope = tl.where(z >= 0, p, u * p)
        if MIXED:
            slope = tl.where(pairs, -slope, slope)
    else:
        if KIND == HINGE:
            z = t - neg_margin
            if MIXED:
                z = tl.where(pairs, pos_margin - t, z)
        else:
            z = neg_margin - t
            if MIXED:
                z = tl.where(pairs, t - pos_margin, z)
        value = tl.where(z <= 0, 0.0, z)
        slope = tl.where(z > 0, 1.0, value)
        if KIND == SQUARED:
            slope = value
            value = 0.5 * value * value
        if KIND == HINGE:
            if MIXED:
                slope = tl.where(pairs, -slope, slope)
        else:
            if MIXED:
                slope = tl.where(pairs, slope, -slope)
            else:
                slope = -slope
    return value, slope


@triton.jit
def difference(X, Y, a, c, i, j, d, N, M, D: tl.constexpr, NORMED: tl.constexpr):
    """a_i x_id - c_j y_jd [BLOCK_M, BLOCK_N], with the digits that rounding the products would lose."""
    x = tl.load(X + i.to(tl.int64) * D + d, mask=i < N, other=0.0).to(tl.float32)
    y = tl.load(Y + j.to(tl.int64) * D + d, mask=j < M, other=0.0).to(tl.float32)
    if NORMED:
        high_x = x * a
        high_y = y * c
        low = tl.fma(x, a, -high_x)[:, None] - tl.fma(y, c, -high_y)[None, :]
        apart = (high_x[:, None] - high_y[None, :]) + low
    else:
        apart = x[:, None] - y[None, :]
    return apart


@triton.jit
def pair_tile(
    X, Y, C, x, a, COLUMN_SHIFT, COLUMN_NAMES, OTHER_WEIGHTS, ROW_SQUARES, COLUMN_SQUARES,
    row_shift, row_names, start, end, row_squares, pos_weight, neg_weight, scale, pos_margin, neg_margin,
    pos_value, neg_value, pos_active, neg_active, pos_count, missing, similarity_sums, slope_sums, lift, gradient,
    i0, j0, d0, N, M, WIDTH,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    SELF: tl.constexpr, IDS: tl.constexpr, NORMED: tl.constexpr, BIAS: tl.constexpr,
    KIND: tl.constexpr, ONLY_POSITIVES: tl.constexpr, MIXED: tl.constexpr,
    SUMMED: tl.constexpr, OWN: tl.constexpr, OTHERS: tl.constexpr, SIMILARITIES: tl.constexpr, SLOPES: tl.constexpr,
    GRADIENT: tl.constexpr, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Adds the columns [j0, j0 + BLOCK_N) to the sums of the rows [i0, i0 + BLOCK_M)."""
    dtype: tl.constexpr = Y.dtype.element_ty
    of_distance: tl.constexpr = KIND >= DISTANCE
    i = i0 + tl.arange(0, BLOCK_M)
    j = j0 + tl.arange(0, BLOCK_N)
    is_column = j < M
    y = 0.0
    if BLOCK_K == D:
        y = load_rows(Y, j0, 0, M, D, BLOCK_N, BLOCK_K, MIXED, PRECISION, INTERPRETED)
    c = load_or(C, j, is_column, 0.0)
    column_shift = load_or(COLUMN_SHIFT, j, is_column, 0.0)
    dots = inner_products(X, Y, x, y, i0, j0, N, M, D, BLOCK_M, BLOCK_N, BLOCK_K, MIXED, PRECISION, INTERPRETED)
    similarity = similarities(dots, a, c, NORMED)

    members = tl.full([BLOCK_M, BLOCK_N], True, tl.int1)
    pairs = members
    if MIXED:
        column_names = load_names(COLUMN_NAMES, j, is_column, IDS)
        members = admissible_pairs(i, j, N, M, row_names, column_names, row_shift, column_shift, SELF, IDS, BIAS)
        missing += number_of(is_column[None, :] & ~members, 1)
        pairs = members & in_cluster(j, start, end)
        if ONLY_POSITIVES:
            members = pairs
        pos_count += number_of(pairs, 1)
    if BIAS == 1:
        if not MIXED:
            members = members & (column_shift != LEFT_OUT)[None, :]
            missing += number_of(column_shift == LEFT_OUT, 0)
        column_shift = tl.where(column_shift == LEFT_OUT, 0.0, column_shift)
    if BIAS == 2:
        row_shift = tl.where(row_shift == LEFT_OUT, 0.0, row_shift)

    if of_distance:
        column_squares = tl.load(COLUMN_SQUARES + j, mask=is_column, other=0.0)
        largest = row_squares[:, None] + column_squares[None, :]
        squares = largest - 2.0 * similarity
        near = members & (squares < largest * NEAR)
        any_near = tl.max(tl.max(tl.where(near, 1.0, 0.0), 1), 0)
        if any_near != 0:
            exact = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            for d in range(0, WIDTH):
                apart = difference(X, Y, a, c, i, j, d, N, M, D, NORMED)
                exact += apart * apart
            squares = tl.where(near, exact, squares)
        t = tl.sqrt_rn(tl.where(squares <= 0, 0.0, squares))
    else:
        t = similarity * scale + (row_shift[:, None] + column_shift[None, :])

    value, g = pair_map(t, pairs, pos_margin, neg_margin, KIND, MIXED)
    if SUMMED:
        if MIXED:
            found = tl.where(pairs, value, 0.0)
            pos_value += tl.sum(found, 1)
            pos_active += number_of(found != 0, 1)
            value = tl.where(members & ~pairs, value, 0.0)
        elif BIAS == 1:
            value = tl.where(members, value, 0.0)
        neg_value += tl.sum(value, 1)
        neg_active += number_of(value != 0, 1)

    if OWN or OTHERS:
        weight = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        if OWN:
            weight += neg_weight[:, None]
        if OTHERS:
            weight += tl.load(OTHER_WEIGHTS + tl.cast(M, tl.int64) + j, mask=is_column, other=0.0)[None, :]
        if MIXED:
            of_pairs = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            if OWN:
                of_pairs += pos_weight[:, None]
            if OTHERS:
                of_pairs += tl.load(OTHER_WEIGHTS + j, mask=is_column, other=0.0)[None, :]
            weight = tl.where(pairs, of_pairs, weight)
        g = g * weight
        if MIXED or BIAS == 1:
            g = tl.where(members, g, 0.0)
        if SIMILARITIES:
            similarity_sums += tl.sum(g * similarity, 1)
        if of_distance:  # the derivative by the inner product
            g = tl.where(t == 0, 0.0, -g / t)
        elif SLOPES:
            slope_sums += tl.sum(g, 1)
        if GRADIENT:
            columns = load_rows(Y, j0, d0, M, D, BLOCK_N, BLOCK_D, MIXED, PRECISION, INTERPRETED)
            if of_distance:
                if any_near != 0:
                    direct = tl.where(near, g, 0.0)
                    g = tl.where(near, 0.0, g)
                    for d in range(0, tl.minimum(WIDTH - d0, BLOCK_D)):
                        apart = difference(X, Y, a, c, i, j, d0 + d, N, M, D, NORMED)
                        part = tl.sum(apart * direct, 1)
                        gradient -= tl.where((tl.arange(0, BLOCK_D) == d)[None, :], (part * lift)[:, None], 0.0)
            r = g
            if not INTERPRETED:
                # Else Triton computes the whole tile once more in the layout of the product's operand.
                r = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [r], dtype=tl.float32, is_pure=False, pack=1)
            if NORMED:
                r = r * c[None, :]
            if dtype == tl.float16:
                peak = tl.max(tl.abs(g), 1)
                power = (peak.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
                new = tl.minimum(lift, LIFTED / power)
                gradient = gradient * (new / lift)[:, None]
                lift = new
                r = r * lift[:, None]
            r = rounded(r, dtype, PRECISION, INTERPRETED)
            if of_distance:  # of the same roundings as the product, as the two parts of x - y cancel
                seen = r.to(tl.float32)
                if NORMED:
                    seen = tl.where((c == 0)[None, :], 0.0, seen / c[None, :])
                if dtype == tl.float16:
                    seen = seen / lift[:, None]
                slope_sums += tl.sum(seen, 1)
            gradient = product(r, columns, gradient, PRECISION, INTERPRETED)
    return (
        pos_value, neg_value, pos_active, neg_active, pos_count, missing, similarity_sums, slope_sums, lift, gradient
    )  # fmt: skip


@triton.jit(do_not_specialize=["N", "M", "WIDTH", "POS_MARGIN", "NEG_MARGIN"])
def pair_kernel(
    X, Y, A, C, ROW_SHIFT, COLUMN_SHIFT, START, END, ROW_NAMES, COLUMN_NAMES, ORDER, SCALE,
    ROW_SQUARES, COLUMN_SQUARES, OWN_WEIGHTS, OTHER_WEIGHTS,
    SUMS, GRADIENT, SIMILARITY_SUMS, SLOPE_SUMS, POS_MARGIN, NEG_MARGIN, N, M, WIDTH,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    SELF: tl.constexpr, CLUSTERS: tl.constexpr, IDS: tl.constexpr, NORMED: tl.constexpr, BIAS: tl.constexpr,
    KIND: tl.constexpr, ONLY_POSITIVES: tl.constexpr, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """The sums of a block of rows, and BLOCK_D numbers of their gradients. Arguments that are None are not wanted.

    ROW_SHIFT [N], COLUMN_SHIFT [M]  added to the logits; LEFT_OUT marks a contrast that takes no part. BIAS: contrasts
                                     with such marks are the columns (1) or the rows (2)
    OWN_WEIGHTS [2, N], OTHER_WEIGHTS [2, M]  of positives and of negatives, in the order of the rows; a pair has the
                                     sum of both
    SUMS [3, 2, N]                   values, active pairs and pairs, in the caller's order
    GRADIENT [N, D]                  sum_j G_ij c_j y_j, where G is the derivative by s_ij, or of distances by the inner
                                     product; of distances minus sum_j G_ij a_i x_i
    WIDTH                            the numbers of a row before it was padded
    SIMILARITY_SUMS, SLOPE_SUMS [N]  of G times similarity and of G, in the caller's order
    """
    i0 = tl.program_id(0) * BLOCK_M
    d0 = tl.program_id(1) * BLOCK_D
    i = i0 + tl.arange(0, BLOCK_M)
    is_row = i < N
    size = tl.cast(N, tl.int64)
    scale = tl.load(SCALE)
    a = load_or(A, i, is_row, 0.0)
    row_shift = load_or(ROW_SHIFT, i, is_row, 0.0)
    row_squares = load_or(ROW_SQUARES, i, is_row, 0.0)
    row_names = load_names(ROW_NAMES, i, is_row, IDS)
    start = tl.zeros([BLOCK_M], tl.int32)
    end = start
    if CLUSTERS:
        start = tl.load(START + i, mask=is_row, other=0)
        end = tl.load(END + i, mask=is_row, other=0)
    pos_weight = load_or(OWN_WEIGHTS, i, is_row, 0.0)
    neg_weight = pos_weight
    if OWN_WEIGHTS is not None:
        neg_weight = tl.load(OWN_WEIGHTS + size + i, mask=is_row, other=0.0)
    x = 0.0
    if BLOCK_K == D:
        x = load_rows(X, i0, 0, N, D, BLOCK_M, BLOCK_K, True, PRECISION, INTERPRETED)
    pos_value = tl.zeros([BLOCK_M], tl.float32)
    neg_value = tl.zeros([BLOCK_M], tl.float32)
    similarity_sums = tl.zeros([BLOCK_M], tl.float32)
    slope_sums = tl.zeros([BLOCK_M], tl.float32)
    lift = tl.full([BLOCK_M], 1.0, tl.float32)
    if Y.dtype.element_ty == tl.float16:
        lift = tl.full([BLOCK_M], HIGHEST, tl.float32)
    pos_active = tl.zeros([BLOCK_M], tl.int32)
    neg_active = tl.zeros([BLOCK_M], tl.int32)
    pos_count = tl.zeros([BLOCK_M], tl.int32)
    missing = tl.zeros([BLOCK_M], tl.int32)
    gradient = 0.0
    if GRADIENT is not None:
        gradient = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    # Positives lie in the run of mixed tiles whatever the ids are.
    interior, mixed, first, hole, last, full = column_walk(
        START, END, i0, N, M, BLOCK_M, BLOCK_N, SELF, CLUSTERS, IDS and not ONLY_POSITIVES
    )
    if not ONLY_POSITIVES:
        for step in range(0, interior):
            j0 = interior_tile(step, first, hole) * BLOCK_N
            (
                pos_value, neg_value, pos_active, neg_active, pos_count, missing, similarity_sums, slope_sums, lift,
                gradient,
            ) = pair_tile(
                X, Y, C, x, a, COLUMN_SHIFT, COLUMN_NAMES, OTHER_WEIGHTS, ROW_SQUARES, COLUMN_SQUARES,
                row_shift, row_names, start, end, row_squares, pos_weight, neg_weight, scale, POS_MARGIN, NEG_MARGIN,
                pos_value, neg_value, pos_active, neg_active, pos_count, missing, similarity_sums, slope_sums, lift,
                gradient, i0, j0, d0, N, M, WIDTH,
                D, BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_D, SELF, IDS, NORMED, BIAS, KIND, ONLY_POSITIVES, False,
                SUMS is not None, OWN_WEIGHTS is not None, OTHER_WEIGHTS is not None, SIMILARITY_SUMS is not None,
                SLOPE_SUMS is not None, GRADIENT is not None, PRECISION, INTERPRETED,
            )  # fmt: skip
    for step in range(0, mixed):
        j0 = mixed_tile(step, first, last, full) * BLOCK_N
        (
            pos_value, neg_value, pos_active, neg_active, pos_count, missing, similarity_sums, slope_sums, lift,
            gradient,
        ) = pair_tile(
            X, Y, C, x, a, COLUMN_SHIFT, COLUMN_NAMES, OTHER_WEIGHTS, ROW_SQUARES, COLUMN_SQUARES,
            row_shift, row_names, start, end, row_squares, pos_weight, neg_weight, scale, POS_MARGIN, NEG_MARGIN,
            pos_value, neg_value, pos_active, neg_active, pos_count, missing, similarity_sums, slope_sums, lift,
            gradient, i0, j0, d0, N, M, WIDTH,
            D, BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_D, SELF, IDS, NORMED, BIAS, KIND, ONLY_POSITIVES, True,
            SUMS is not None, OWN_WEIGHTS is not None, OTHER_WEIGHTS is not None, SIMILARITY_SUMS is not None,
            SLOPE_SUMS is not None, GRADIENT is not None, PRECISION, INTERPRETED,
        )  # fmt: skip

    if BIAS == 2:  # of a row that is left out interior tiles have summed something
        slope_sums = tl.where(row_shift == LEFT_OUT, 0.0, slope_sums)
        if GRADIENT is not None:
            gradient = tl.where((row_shift == LEFT_OUT)[:, None], 0.0, gradient)
    if GRADIENT is not None:
        gradient = gradient / lift[:, None]
        if KIND >= DISTANCE:
            own = load_rows(X, i0, d0, N, D, BLOCK_M, BLOCK_D, True, "ieee", INTERPRETED).to(tl.float32)
            factor = slope_sums
            if NORMED:
                factor = factor * a
            gradient -= own * factor[:, None]
        d = d0 + tl.arange(0, BLOCK_D)
        targets = GRADIENT + tl.cast(i0, tl.int64) * D + (tl.arange(0, BLOCK_M)[:, None] * D + d[None, :])
        tl.store(targets, gradient, mask=is_row[:, None])
    if d0 == 0:
        places = row_places(ORDER, i, N)
        if SUMS is not None:
            neg_count = tl.zeros([BLOCK_M], tl.int32)
            if not ONLY_POSITIVES:
                neg_count = M - missing - pos_count
            sums = SUMS + places
            tl.store(sums, pos_value, mask=is_row)
            tl.store(sums + size, neg_value, mask=is_row)
            tl.store(sums + 2 * size, pos_active.to(tl.float32), mask=is_row)
            tl.store(sums + 3 * size, neg_active.to(tl.float32), mask=is_row)
            tl.store(sums + 4 * size, pos_count.to(tl.float32), mask=is_row)
            tl.store(sums + 5 * size, neg_count.to(tl.float32), mask=is_row)
        if SIMILARITY_SUMS is not None:
            tl.store(SIMILARITY_SUMS + places, similarity_sums, mask=is_row)
        if SLOPE_SUMS is not None:
            tl.store(SLOPE_SUMS + places, slope_sums, mask=is_row)
