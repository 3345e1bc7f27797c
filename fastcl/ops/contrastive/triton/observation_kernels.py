"""Triton kernel of the statistics for people to look at: a sweep of its own, over every tile alike.

The forward's kernels keep few numbers a row, which leaves registers for their tiles. Those who ask for these statistics
pay a second forward sweep. A program owns rows; running maxima.
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
    load_names,
    load_or,
    load_rows,
    masked_logits,
)
from .statistics_kernels import row_places


@triton.jit
def observed_tile(
    t, similarity, scale, before, pairs, in_clusters,
    max_positive, max_negative, sum_positive, sum_negative, plain_positive, plain_negative,
    num_positive, num_negative, mass, moment,
    CLUSTERS: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """The ten numbers of each row, joined by the tile's `pairs`; the positives are those in_clusters.

    before: the largest logit before the tile.

    Mass and moment are the sums of 2^(t - b) and of (b - t) 2^(t - b), b the largest logit so far. Entropy is the
    logarithm of the one plus the quotient of both: nothing cancels.
    """
    negatives = pairs
    if CLUSTERS:
        positives = pairs & in_clusters
        negatives = pairs & ~positives
        num_positive += tl.sum(positives.to(tl.int32), 1)
        sum_positive += tl.sum(tl.where(positives, t, 0.0), 1)
        if BIAS != 0:
            plain_positive += tl.sum(tl.where(positives, similarity * scale, 0.0), 1)
        max_positive = tl.maximum(max_positive, tl.max(tl.where(positives, t, -INF), 1))
    num_negative += tl.sum(negatives.to(tl.int32), 1)
    sum_negative += tl.sum(tl.where(negatives, t, 0.0), 1)
    if BIAS != 0:
        plain_negative += tl.sum(tl.where(negatives, similarity * scale, 0.0), 1)
    max_negative = tl.maximum(max_negative, tl.max(tl.where(negatives, t, -INF), 1))
    base = tl.maximum(max_negative, max_positive)
    fading = tl.exp2(before - base)
    below = tl.where(pairs, base[:, None] - t, 0.0)
    e = tl.where(pairs, tl.exp2(-below), 0.0)
    moment = tl.where(mass > 0, (moment + (base - before) * mass) * fading, 0.0) + tl.sum(below * e, 1)
    mass = mass * fading + tl.sum(e, 1)
    return (
        max_positive, max_negative, sum_positive, sum_negative, plain_positive, plain_negative,
        num_positive, num_negative, mass, moment,
    )  # fmt: skip


@triton.jit
def store_observed(
    OBSERVED, ORDER, i, is_row, N,
    max_positive, max_negative, sum_positive, sum_negative, plain_positive, plain_negative,
    num_positive, num_negative, mass, moment,
    BIAS: tl.constexpr,
):  # fmt: skip
    """OBSERVED [10, N], in the caller's order, from the ten numbers of each row i."""
    if BIAS == 0:
        plain_positive = sum_positive
        plain_negative = sum_negative
    some = num_positive + num_negative > 0
    total = tl.where(some, mass, 1.0)
    places = OBSERVED + row_places(ORDER, i, N)
    size = tl.cast(N, tl.int64)
    # A maximum leaves NaN out, a sum does not.
    max_positive = tl.where(max_positive > LOWEST, max_positive, -INF)
    max_negative = tl.where(max_negative > LOWEST, max_negative, -INF)
    max_positive = tl.where(sum_positive == sum_positive, max_positive, sum_positive)
    max_negative = tl.where(sum_negative == sum_negative, max_negative, sum_negative)
    tl.store(places, max_positive * LN2, mask=is_row)
    tl.store(places + size, max_negative * LN2, mask=is_row)
    tl.store(places + 2 * size, sum_positive * LN2, mask=is_row)
    tl.store(places + 3 * size, sum_negative * LN2, mask=is_row)
    base = tl.maximum(max_negative, max_positive)
    tl.store(places + 4 * size, tl.where(some, (base + tl.log2(total)) * LN2, -INF), mask=is_row)
    tl.store(places + 5 * size, tl.where(some, (tl.log2(total) + moment / total) * LN2, 0.0), mask=is_row)
    tl.store(places + 6 * size, num_positive.to(tl.float32), mask=is_row)
    tl.store(places + 7 * size, num_negative.to(tl.float32), mask=is_row)
    tl.store(places + 8 * size, plain_positive * LN2, mask=is_row)
    tl.store(places + 9 * size, plain_negative * LN2, mask=is_row)


@triton.jit(do_not_specialize=["N", "M"])
def observation_kernel(
    X, Y, A, C, ROW_BIAS, COLUMN_BIAS, START, END, ROW_NAMES, COLUMN_NAMES, ORDER, SCALE, OBSERVED, N, M,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    SELF: tl.constexpr, CLUSTERS: tl.constexpr, IDS: tl.constexpr, NORMED: tl.constexpr, BIAS: tl.constexpr,
    PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """OBSERVED [10, N], as `observed` describes. A row block a program."""
    scale = tl.load(SCALE) * LOG2E
    i0 = tl.program_id(0) * BLOCK_M
    i = i0 + tl.arange(0, BLOCK_M)
    is_row = i < N
    a = load_or(A, i, is_row, 0.0)
    row_bias = load_or(ROW_BIAS, i, is_row, 0.0)
    row_names = load_names(ROW_NAMES, i, is_row, IDS)
    start = tl.zeros([BLOCK_M], tl.int32)
    end = start
    if CLUSTERS:
        start = tl.load(START + i, mask=is_row, other=0)
        end = tl.load(END + i, mask=is_row, other=0)
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

    for j0 in range(0, M, BLOCK_N):
        j = j0 + tl.arange(0, BLOCK_N)
        _, _, column_bias, column_names, similarity, t = masked_logits(
            X, Y, C, COLUMN_BIAS, COLUMN_NAMES, x, a, row_bias, scale, i0, j0, N, M,
            D, BLOCK_M, BLOCK_N, BLOCK_K, IDS, NORMED, BIAS, PRECISION, INTERPRETED,
        )  # fmt: skip
        pairs = admissible_pairs(i, j, N, M, row_names, column_names, row_bias, column_bias, SELF, IDS, BIAS)
        before = tl.maximum(max_negative, max_positive)
        positives = pairs
        if CLUSTERS:
            positives = in_cluster(j, start, end)
        (
            max_positive, max_negative, sum_positive, sum_negative, plain_positive, plain_negative,
            num_positive, num_negative, mass, moment,
        ) = observed_tile(
            t, similarity, scale, before, pairs, positives,
            max_positive, max_negative, sum_positive, sum_negative, plain_positive, plain_negative,
            num_positive, num_negative, mass, moment,
            CLUSTERS, BIAS,
        )  # fmt: skip
    store_observed(
        OBSERVED, ORDER, i, is_row, N,
        max_positive, max_negative, sum_positive, sum_negative, plain_positive, plain_negative,
        num_positive, num_negative, mass, moment, BIAS,
    )  # fmt: skip
