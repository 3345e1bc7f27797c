"""Triton kernels of a problem with rules about pairs: statistics of each row, and the gradient of each row.

Rules (`contrastive.rules` has the table) leave few tiles without a pair to mask, so there is one loop, over masked
tiles, in place of the tuned kernels' two. Running maxima keep all sums in range. A program owns rows, and the other
set's results come from the same kernels with rows and columns exchanged: then the thresholds are the columns'.

Rows are sorted by group, if there are groups. The columns of a row's group are then [start, end), and a program visits
the tiles of its rows' groups only. Clusters, ids and samples are compared by int32 names; -1 equals nothing.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...backends.triton_kernels import (
    INF,
    LN2,
    LOG2E,
    LOWEST,
    admissible_pairs,
    in_cluster,
    load_or,
    load_rows,
    masked_logits,
    product,
    rounded,
    share_of,
)
from .gradient_kernels import load_side, tile_gradient
from .observation_kernels import observed_tile, store_observed
from .statistics_kernels import raised, row_places

# What a pair is: 0 inadmissible, 1 a negative, POSITIVE a positive. One sum over a tile's columns then counts both.
POSITIVE = tl.constexpr(1 << 16)


@triton.jit
def group_tiles(START, END, i0, N, M, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """(first, number): the tiles of columns that hold the groups of the rows [i0, i0 + BLOCK_M)."""
    first = 0
    last = tl.cdiv(M, BLOCK_N)
    if START is not None:
        first = tl.load(START + i0) // BLOCK_N
        last = tl.cdiv(tl.load(END + tl.minimum(i0 + BLOCK_M, N) - 1), BLOCK_N)
    return first, tl.maximum(last - first, 0)


@triton.jit
def equal_numbers(ROWS, COLUMNS, i, j, is_row, is_column):
    """Bool [BLOCK_M, BLOCK_N]: the int32 names of i and j are equal, and not -1."""
    own = tl.load(ROWS + i, mask=is_row, other=-1)
    other = tl.load(COLUMNS + j, mask=is_column, other=-1)
    return (own[:, None] == other[None, :]) & (own != -1)[:, None]


@triton.jit
def shared_tags(found, ROWS, COLUMNS, i, j, is_row, is_column, N, M, WORDS):
    """Bool [BLOCK_M, BLOCK_N]: found, or i and j have a common bit. ROWS [WORDS, N], COLUMNS [WORDS, M]."""
    for word in range(0, WORDS):
        own = tl.load(ROWS + tl.cast(word, tl.int64) * N + i, mask=is_row, other=0)
        other = tl.load(COLUMNS + tl.cast(word, tl.int64) * M + j, mask=is_column, other=0)
        found = found | ((own[:, None] & other[None, :]) != 0)
    return found


@triton.jit
def beyond_guide(
    ROW_GUIDE, COLUMN_GUIDE, ROW_GUIDE_NORMS, COLUMN_GUIDE_NORMS, ROW_THRESHOLDS, COLUMN_THRESHOLDS,
    i, j, is_row, is_column, i0, j0, N, M,
    GUIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_G: tl.constexpr,
    GUIDE_PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Bool [BLOCK_M, BLOCK_N]: the guide's cosine exceeds the anchor's threshold. Rows have GUIDE numbers, padded."""
    cosines = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, GUIDE, BLOCK_G):
        own = load_rows(ROW_GUIDE, i0, k, N, GUIDE, BLOCK_M, BLOCK_G, True, GUIDE_PRECISION, INTERPRETED)
        other = load_rows(COLUMN_GUIDE, j0, k, M, GUIDE, BLOCK_N, BLOCK_G, True, GUIDE_PRECISION, INTERPRETED)
        cosines = product(own, tl.trans(other), cosines, GUIDE_PRECISION, INTERPRETED)
    own_norms = tl.load(ROW_GUIDE_NORMS + i, mask=is_row, other=0.0)
    other_norms = tl.load(COLUMN_GUIDE_NORMS + j, mask=is_column, other=0.0)
    cosines = cosines * (own_norms[:, None] * other_norms[None, :])
    if ROW_THRESHOLDS is not None:
        beyond = cosines > tl.load(ROW_THRESHOLDS + i, mask=is_row, other=INF)[:, None]
    else:
        beyond = cosines > tl.load(COLUMN_THRESHOLDS + j, mask=is_column, other=INF)[None, :]
    return beyond


@triton.jit
def ruled_tile(
    X, Y, C, COLUMN_BIAS, START, END, ROW_CLUSTERS, COLUMN_CLUSTERS, ROW_IDS, COLUMN_IDS, ROW_SAMPLES, COLUMN_SAMPLES,
    ROW_TAGS, COLUMN_TAGS, WORDS, ROW_GUIDE, COLUMN_GUIDE, ROW_GUIDE_NORMS, COLUMN_GUIDE_NORMS,
    ROW_THRESHOLDS, COLUMN_THRESHOLDS, x, a, row_bias, scale, i0, j0, N, M,
    D: tl.constexpr, GUIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_G: tl.constexpr,
    SELF: tl.constexpr, NORMED: tl.constexpr, BIAS: tl.constexpr,
    PRECISION: tl.constexpr, GUIDE_PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """The columns [j0, j0 + BLOCK_N): (y, c, similarities, logits to base 2, admissible pairs, positives among them).

    y is 0 if rows are streamed along D. A rule whose tensors are None does not apply.
    """
    i = i0 + tl.arange(0, BLOCK_M)
    j = j0 + tl.arange(0, BLOCK_N)
    is_row = i < N
    is_column = j < M
    column_bias = load_or(COLUMN_BIAS, j, is_column, 0.0)
    admissible = admissible_pairs(i, j, N, M, 0, 0, row_bias, column_bias, SELF, False, BIAS)
    if START is not None:
        start = tl.load(START + i, mask=is_row, other=0)
        end = tl.load(END + i, mask=is_row, other=0)
        admissible = admissible & in_cluster(j, start, end)
    if ROW_IDS is not None:
        duplicates = equal_numbers(ROW_IDS, COLUMN_IDS, i, j, is_row, is_column)
        if ROW_SAMPLES is not None:
            duplicates = duplicates & ~equal_numbers(ROW_SAMPLES, COLUMN_SAMPLES, i, j, is_row, is_column)
        admissible = admissible & ~duplicates
    positives = tl.zeros([BLOCK_M, BLOCK_N], tl.int1)
    if ROW_CLUSTERS is not None:
        positives = equal_numbers(ROW_CLUSTERS, COLUMN_CLUSTERS, i, j, is_row, is_column)
    if ROW_TAGS is not None:
        positives = shared_tags(positives, ROW_TAGS, COLUMN_TAGS, i, j, is_row, is_column, N, M, WORDS)
    if ROW_GUIDE is not None:
        beyond = beyond_guide(
            ROW_GUIDE, COLUMN_GUIDE, ROW_GUIDE_NORMS, COLUMN_GUIDE_NORMS, ROW_THRESHOLDS, COLUMN_THRESHOLDS,
            i, j, is_row, is_column, i0, j0, N, M,
            GUIDE, BLOCK_M, BLOCK_N, BLOCK_G, GUIDE_PRECISION, INTERPRETED,
        )  # fmt: skip
        admissible = admissible & (positives | ~beyond)
    kinds = tl.where(admissible, tl.where(positives, POSITIVE, 1), 0)
    y, c, _, _, similarity, t = masked_logits(
        X, Y, C, COLUMN_BIAS, None, x, a, row_bias, scale, i0, j0, N, M,
        D, BLOCK_M, BLOCK_N, BLOCK_K, False, NORMED, BIAS, PRECISION, INTERPRETED,
    )  # fmt: skip
    return y, c, similarity, t, kinds


# Forward.


@triton.jit(do_not_specialize=["N", "M", "WORDS"])
def ruled_statistics_kernel(
    X, Y, A, C, ROW_BIAS, COLUMN_BIAS, START, END, ROW_CLUSTERS, COLUMN_CLUSTERS, ROW_IDS, COLUMN_IDS,
    ROW_SAMPLES, COLUMN_SAMPLES, ROW_TAGS, COLUMN_TAGS, WORDS, ROW_GUIDE, COLUMN_GUIDE,
    ROW_GUIDE_NORMS, COLUMN_GUIDE_NORMS, ROW_THRESHOLDS, COLUMN_THRESHOLDS, ORDER, SCALE, STATISTICS, N, M,
    D: tl.constexpr, GUIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_G: tl.constexpr,
    SELF: tl.constexpr, NORMED: tl.constexpr, BIAS: tl.constexpr, SPLIT: tl.constexpr,
    PRECISION: tl.constexpr, GUIDE_PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """STATISTICS [7, N] as the tuned kernels'. A row block a program; SPLIT: one part of its columns, for
    `join_kernel`: STATISTICS [parts, 7, N]."""
    scale = tl.load(SCALE) * LOG2E
    part = tl.program_id(1)
    i0 = tl.program_id(0) * BLOCK_M
    i = i0 + tl.arange(0, BLOCK_M)
    is_row = i < N
    a = load_or(A, i, is_row, 0.0)
    row_bias = load_or(ROW_BIAS, i, is_row, 0.0)
    x = 0.0
    if BLOCK_K == D:
        x = load_rows(X, i0, 0, N, D, BLOCK_M, BLOCK_K, True, PRECISION, INTERPRETED)
    base = tl.full([BLOCK_M], LOWEST, tl.float32)
    positive_base = base
    negative = tl.zeros([BLOCK_M], tl.float32)
    positive = negative
    sum_positive = negative
    num_positive = tl.zeros([BLOCK_M], tl.int32)
    num_negative = num_positive
    first, tiles = group_tiles(START, END, i0, N, M, BLOCK_M, BLOCK_N)
    from_, to = share_of(tiles, part, tl.num_programs(1), SPLIT)
    for step in range(from_, to):
        _, _, _, t, kinds = ruled_tile(
            X, Y, C, COLUMN_BIAS, START, END, ROW_CLUSTERS, COLUMN_CLUSTERS, ROW_IDS, COLUMN_IDS,
            ROW_SAMPLES, COLUMN_SAMPLES, ROW_TAGS, COLUMN_TAGS, WORDS, ROW_GUIDE, COLUMN_GUIDE,
            ROW_GUIDE_NORMS, COLUMN_GUIDE_NORMS, ROW_THRESHOLDS, COLUMN_THRESHOLDS,
            x, a, row_bias, scale, i0, (first + step) * BLOCK_N, N, M,
            D, GUIDE, BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_G, SELF, NORMED, BIAS,
            PRECISION, GUIDE_PRECISION, INTERPRETED,
        )  # fmt: skip
        counts = tl.sum(kinds, 1)
        num_positive += counts // POSITIVE
        num_negative += counts % POSITIVE
        positives = kinds == POSITIVE
        negatives = kinds == 1
        sum_positive += tl.sum(tl.where(positives, t, 0.0), 1)
        positive_base, fading = raised(positive_base, tl.where(positives, t, -INF))
        positive = positive * fading + tl.sum(tl.where(positives, tl.exp2(t - positive_base[:, None]), 0.0), 1)
        base, fading = raised(base, tl.where(negatives, t, -INF))
        negative = negative * fading + tl.sum(tl.where(negatives, tl.exp2(t - base[:, None]), 0.0), 1)

    num_inadmissible = tl.where(part == 0, M, 0) - num_negative - num_positive  # all parts together have M columns
    size = tl.cast(N, tl.int64)
    places = STATISTICS + row_places(ORDER, i, N)
    if SPLIT:
        places += part.to(tl.int64) * 7 * size
    tl.store(places, tl.where(base > LOWEST, base, 0.0), mask=is_row)
    tl.store(places + size, negative, mask=is_row)
    tl.store(places + 2 * size, tl.where(positive_base > LOWEST, positive_base, 0.0), mask=is_row)
    tl.store(places + 3 * size, positive, mask=is_row)
    tl.store(places + 4 * size, sum_positive * LN2, mask=is_row)
    tl.store(places + 5 * size, num_positive.to(tl.float32), mask=is_row)
    tl.store(places + 6 * size, num_inadmissible.to(tl.float32), mask=is_row)


# Backward.


@triton.jit(do_not_specialize=["N", "M", "WORDS"])
def ruled_gradient_kernel(
    X, Y, A, C, ROW_BIAS, COLUMN_BIAS, START, END, ROW_CLUSTERS, COLUMN_CLUSTERS, ROW_IDS, COLUMN_IDS,
    ROW_SAMPLES, COLUMN_SAMPLES, ROW_TAGS, COLUMN_TAGS, WORDS, ROW_GUIDE, COLUMN_GUIDE,
    ROW_GUIDE_NORMS, COLUMN_GUIDE_NORMS, ROW_THRESHOLDS, COLUMN_THRESHOLDS, SCALE, SIDE, OTHER,
    GRADIENT, SIMILARITY_SUMS, SUMS, N, M,
    D: tl.constexpr, GUIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_G: tl.constexpr,
    SELF: tl.constexpr, NORMED: tl.constexpr, BIAS: tl.constexpr, OWN: tl.constexpr, OTHERS: tl.constexpr,
    SPLIT: tl.constexpr, PRECISION: tl.constexpr, GUIDE_PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """The arguments and results of `gradient_kernel`, with two exponentials."""
    part = tl.program_id(2)
    dtype: tl.constexpr = Y.dtype.element_ty
    i0 = tl.program_id(0) * BLOCK_M
    d0 = tl.program_id(1) * BLOCK_D
    i = i0 + tl.arange(0, BLOCK_M)
    is_row = i < N
    scale = tl.load(SCALE) * LOG2E
    a = load_or(A, i, is_row, 0.0)
    row_bias = load_or(ROW_BIAS, i, is_row, 0.0)
    base = tl.zeros([BLOCK_M], tl.float32)
    weight = base
    positive_base = base
    positive_weight = base
    extra = base
    if OWN:
        base = load_side(SIDE, 0, N, i, is_row, True)
        weight = load_side(SIDE, 1, N, i, is_row, True)
        positive_base = load_side(SIDE, 2, N, i, is_row, True)
        positive_weight = load_side(SIDE, 3, N, i, is_row, True)
        extra = load_side(SIDE, 4, N, i, is_row, True)
    x = 0.0
    if BLOCK_K == D:
        x = load_rows(X, i0, 0, N, D, BLOCK_M, BLOCK_K, True, PRECISION, INTERPRETED)
    gradient = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    similarity_sums = tl.zeros([BLOCK_M], tl.float32)
    sums = tl.zeros([BLOCK_M], tl.float32)
    first, tiles = group_tiles(START, END, i0, N, M, BLOCK_M, BLOCK_N)
    from_, to = share_of(tiles, part, tl.num_programs(2), SPLIT)
    for step in range(from_, to):
        j0 = (first + step) * BLOCK_N
        j = j0 + tl.arange(0, BLOCK_N)
        y, c, similarity, t, kinds = ruled_tile(
            X, Y, C, COLUMN_BIAS, START, END, ROW_CLUSTERS, COLUMN_CLUSTERS, ROW_IDS, COLUMN_IDS,
            ROW_SAMPLES, COLUMN_SAMPLES, ROW_TAGS, COLUMN_TAGS, WORDS, ROW_GUIDE, COLUMN_GUIDE,
            ROW_GUIDE_NORMS, COLUMN_GUIDE_NORMS, ROW_THRESHOLDS, COLUMN_THRESHOLDS,
            x, a, row_bias, scale, i0, j0, N, M,
            D, GUIDE, BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_G, SELF, NORMED, BIAS,
            PRECISION, GUIDE_PRECISION, INTERPRETED,
        )  # fmt: skip
        g = tile_gradient(
            t, j, j < M, kinds == POSITIVE, 0.0, base, weight, positive_base, positive_weight, extra, OTHER, M,
            OWN, OTHERS, False, True,
        )  # fmt: skip
        g = tl.where(kinds > 0, g, 0.0)
        if SIMILARITY_SUMS is not None:
            similarity_sums += tl.sum(g * similarity, 1)
        if SUMS is not None:
            sums += tl.sum(g, 1)
        if NORMED:
            g = g * c[None, :]
        if BLOCK_D == D and BLOCK_K == D:
            columns = y
        else:
            columns = load_rows(Y, j0, d0, M, D, BLOCK_N, BLOCK_D, True, PRECISION, INTERPRETED)
        gradient = product(rounded(g, dtype, PRECISION, INTERPRETED), columns, gradient, PRECISION, INTERPRETED)

    first_row = tl.cast(0, tl.int64)
    if SPLIT:
        first_row = part.to(tl.int64) * N
    d = d0 + tl.arange(0, BLOCK_D)
    places = GRADIENT + (first_row + i0) * D + (tl.arange(0, BLOCK_M)[:, None] * D + d[None, :])
    tl.store(places, gradient, mask=is_row[:, None])
    if d0 == 0:
        if SIMILARITY_SUMS is not None:
            tl.store(SIMILARITY_SUMS + first_row + i, similarity_sums, mask=is_row)
        if SUMS is not None:
            tl.store(SUMS + first_row + i, sums, mask=is_row)


# Statistics for `return_stats`.


@triton.jit(do_not_specialize=["N", "M", "WORDS"])
def ruled_observation_kernel(
    X, Y, A, C, ROW_BIAS, COLUMN_BIAS, START, END, ROW_CLUSTERS, COLUMN_CLUSTERS, ROW_IDS, COLUMN_IDS,
    ROW_SAMPLES, COLUMN_SAMPLES, ROW_TAGS, COLUMN_TAGS, WORDS, ROW_GUIDE, COLUMN_GUIDE,
    ROW_GUIDE_NORMS, COLUMN_GUIDE_NORMS, ROW_THRESHOLDS, COLUMN_THRESHOLDS, ORDER, SCALE, OBSERVED, N, M,
    D: tl.constexpr, GUIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_G: tl.constexpr,
    SELF: tl.constexpr, NORMED: tl.constexpr, BIAS: tl.constexpr,
    PRECISION: tl.constexpr, GUIDE_PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """OBSERVED [10, N] as `observation_kernel`'s. A row block a program."""
    scale = tl.load(SCALE) * LOG2E
    i0 = tl.program_id(0) * BLOCK_M
    i = i0 + tl.arange(0, BLOCK_M)
    is_row = i < N
    a = load_or(A, i, is_row, 0.0)
    row_bias = load_or(ROW_BIAS, i, is_row, 0.0)
    x = 0.0
    if BLOCK_K == D:
        x = load_rows(X, i0, 0, N, D, BLOCK_M, BLOCK_K, True, PRECISION, INTERPRETED)
    max_positive = tl.full([BLOCK_M], LOWEST, tl.float32)
    max_negative = max_positive
    sum_positive = tl.zeros([BLOCK_M], tl.float32)
    sum_negative = sum_positive
    plain_positive = sum_positive
    plain_negative = sum_positive
    num_positive = tl.zeros([BLOCK_M], tl.int32)
    num_negative = num_positive
    mass = sum_positive
    moment = sum_positive
    first, tiles = group_tiles(START, END, i0, N, M, BLOCK_M, BLOCK_N)
    for step in range(0, tiles):
        _, _, similarity, t, kinds = ruled_tile(
            X, Y, C, COLUMN_BIAS, START, END, ROW_CLUSTERS, COLUMN_CLUSTERS, ROW_IDS, COLUMN_IDS,
            ROW_SAMPLES, COLUMN_SAMPLES, ROW_TAGS, COLUMN_TAGS, WORDS, ROW_GUIDE, COLUMN_GUIDE,
            ROW_GUIDE_NORMS, COLUMN_GUIDE_NORMS, ROW_THRESHOLDS, COLUMN_THRESHOLDS,
            x, a, row_bias, scale, i0, (first + step) * BLOCK_N, N, M,
            D, GUIDE, BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_G, SELF, NORMED, BIAS,
            PRECISION, GUIDE_PRECISION, INTERPRETED,
        )  # fmt: skip
        counts = tl.sum(kinds, 1)
        num_positive += counts // POSITIVE
        num_negative += counts % POSITIVE
        (
            max_positive, max_negative, sum_positive, sum_negative, plain_positive, plain_negative,
            _, _, mass, moment,
        ) = observed_tile(
            t, similarity, scale, tl.maximum(max_negative, max_positive), kinds > 0, kinds == POSITIVE,
            max_positive, max_negative, sum_positive, sum_negative, plain_positive, plain_negative,
            num_positive, num_negative, mass, moment, True, BIAS,
        )  # fmt: skip
    store_observed(
        OBSERVED, ORDER, i, is_row, N,
        max_positive, max_negative, sum_positive, sum_negative, plain_positive, plain_negative,
        num_positive, num_negative, mass, moment, BIAS,
    )  # fmt: skip
