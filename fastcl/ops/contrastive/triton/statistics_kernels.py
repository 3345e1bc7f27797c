"""Triton kernels of the forward: statistics of each row over the columns, and of both over each other in one sweep.

A program owns rows. Negatives and positives are summed apart, so that every field is a combination of

    STATISTICS  [7, N]  base and sum of 2^(t - base) over the negatives, the same over the positives, sum of the
                        positives' logits, number of positives, number of inadmissible pairs

with t = s log2(e). Two ways to keep the sums in range:

- `statistics_kernel` and `two_way_kernel` subtract one fixed shift from all logits. It follows from a bound on them.
- `running_kernel`, and `weighted_kernel` for columns that need no gradient, keep running maxima. The former does row
  blocks again that have a sum so small that terms below 2^-126, which are flushed to zero, could matter, or that the
  shift has rounded their exponents; and all of them where the bound is so wide that this would be the rule.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...backends.triton_kernels import (
    AS_THE_KERNEL,
    INF,
    LEFT_OUT,
    LN2,
    LOG2E,
    LOWEST,
    admissible_pairs,
    base2_logits,
    column_walk,
    fixed_shift,
    in_cluster,
    inner_products,
    interior_tile,
    load_names,
    load_or,
    load_rows,
    masked_logits,
    mixed_tile,
    product,
    rounded,
    share_of,
    similarities,
)

# Terms below 2^-126 are lost: together they must stay below 2^-24 of a sum of so many terms.
TINY = tl.constexpr(2.0**-102)
# A difference of so many bits is no rougher than 2^-20.
ROUGH = tl.constexpr(16.0)
# Of exponentials, at most 1, times inverse norms, below 2 in float16, which ends at 2^16 and flushes below 2^-24.
LIFT = tl.constexpr(2.0**14)


@triton.jit
def raised(base, t):
    """A base no smaller than the largest of t [BLOCK_M, BLOCK_N], and what sums to the old one are multiplied by."""
    new = tl.maximum(base, tl.max(t, 1))
    return new, tl.exp2(base - new)


@triton.jit
def row_places(ORDER, i, N):
    """Where the rows i of the sorted order belong in the caller's."""
    places = i.to(tl.int64)
    if ORDER is not None:
        places = tl.load(ORDER + i, mask=i < N, other=0)
    return places


@triton.jit
def sweep_rows(
    block, part, parts,
    X, Y, A, C, ROW_BIAS, COLUMN_BIAS, START, END, ROW_NAMES, COLUMN_NAMES, ORDER, scale, shift,
    STATISTICS, COLUMN_SUMS, WEIGHTED, d0, WIDTH, N, M,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    SELF: tl.constexpr, CLUSTERS: tl.constexpr, IDS: tl.constexpr, NORMED: tl.constexpr, BIAS: tl.constexpr,
    RUNNING: tl.constexpr, MIXED_ONLY: tl.constexpr, SPLIT: tl.constexpr,
    PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """The statistics of one row block, where d0 = 0; SPLIT: its sums over one part of the columns (`share_of`).

    COLUMN_SUMS [M], where there are any, gain the negatives' sums by column. WEIGHTED [N, WIDTH], which takes running
    maxima: the numbers [d0, d0 + BLOCK_D) of sum_j 2^(t_ij - base_i) c_j y_j over the negatives.
    """
    i0 = block * BLOCK_M
    i = i0 + tl.arange(0, BLOCK_M)
    is_row = i < N
    a = load_or(A, i, is_row, 0.0)
    row_bias = load_or(ROW_BIAS, i, is_row, 0.0)
    row_names = load_names(ROW_NAMES, i, is_row, IDS)
    interior, mixed, first, hole, last, full = column_walk(START, END, i0, N, M, BLOCK_M, BLOCK_N, SELF, CLUSTERS, IDS)
    bits: tl.constexpr = X.dtype.element_ty.primitive_bitwidth
    x = 0.0
    if BLOCK_K == D:
        x = load_rows(X, i0, 0, N, D, BLOCK_M, BLOCK_K, True, PRECISION, INTERPRETED)
    if RUNNING:
        base = tl.full([BLOCK_M], LOWEST, tl.float32)
    else:
        base = tl.where(is_row, shift, INF)  # there is no row beyond N, whose exponentials would count in a column
    positive_base = base
    negative = tl.zeros([BLOCK_M], tl.float32)
    positive = tl.zeros([BLOCK_M], tl.float32)
    sum_positive = tl.zeros([BLOCK_M], tl.float32)
    num_positive = tl.zeros([BLOCK_M], tl.int32)
    num_inadmissible = tl.zeros([BLOCK_M], tl.int32)
    if WEIGHTED is not None:
        weighted = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    if not MIXED_ONLY:
        from_, to = share_of(interior, part, parts, SPLIT)
        for step in range(from_, to):
            j0 = interior_tile(step, first, hole) * BLOCK_N
            j = j0 + tl.arange(0, BLOCK_N)
            y = 0.0
            if BLOCK_K == D:
                y = load_rows(Y, j0, 0, M, D, BLOCK_N, BLOCK_K, False, PRECISION, INTERPRETED)
            if COLUMN_SUMS is not None:
                before = tl.load(COLUMN_SUMS + j)
            c = 0.0
            if NORMED:
                c = tl.load(C + j)
            column_bias = 0.0
            if BIAS == 1:
                column_bias = tl.load(COLUMN_BIAS + j)
                num_inadmissible += tl.sum((column_bias == LEFT_OUT).to(tl.int32), 0)
            dots = inner_products(X, Y, x, y, i0, j0, N, M, D, BLOCK_M, BLOCK_N, BLOCK_K, False, PRECISION, INTERPRETED)
            t = base2_logits(similarities(dots, a, c, NORMED), scale, row_bias, column_bias, BIAS)
            if RUNNING:
                base, fading = raised(base, t)
                negative = negative * fading
            e = tl.exp2(t - base[:, None])
            negative += tl.sum(e, 1)
            if WEIGHTED is not None:
                weighted = weighted * fading[:, None]
                weighted = add_weighted(
                    weighted, e, c, Y, y, j0, d0, M, D, BLOCK_N, BLOCK_K, BLOCK_D, False, NORMED,
                    PRECISION, INTERPRETED,
                )  # fmt: skip
            if COLUMN_SUMS is not None:
                tl.store(COLUMN_SUMS + j, before + tl.sum(e, 0))

    start = tl.zeros([BLOCK_M], tl.int32)
    end = start
    if CLUSTERS:
        start = tl.load(START + i, mask=is_row, other=0)
        end = tl.load(END + i, mask=is_row, other=0)
    from_, to = share_of(mixed, part, parts, SPLIT)
    # Whole 16-bit rows are copied ahead: on their way through registers they would spill.
    for step in tl.range(from_, to, num_stages=AS_THE_KERNEL if IDS or (BLOCK_K == D and bits == 16) else 1):
        j0 = mixed_tile(step, first, last, full) * BLOCK_N
        j = j0 + tl.arange(0, BLOCK_N)
        is_column = j < M
        y, c, column_bias, column_names, _, t = masked_logits(
            X, Y, C, COLUMN_BIAS, COLUMN_NAMES, x, a, row_bias, scale, i0, j0, N, M,
            D, BLOCK_M, BLOCK_N, BLOCK_K, IDS, NORMED, BIAS, PRECISION, INTERPRETED,
        )  # fmt: skip
        members = admissible_pairs(i, j, N, M, row_names, column_names, row_bias, column_bias, SELF, IDS, BIAS)
        if IDS or BIAS == 1:
            num_inadmissible += tl.sum((is_column[None, :] & ~members).to(tl.int32), 1)
        if CLUSTERS:
            pairs = members & in_cluster(j, start, end)
            members = members & ~pairs
            if IDS or BIAS != 0:
                num_positive += tl.sum(pairs.to(tl.int32), 1)
            sum_positive += tl.sum(tl.where(pairs, t, 0.0), 1)
            if RUNNING:
                positive_base, fading = raised(positive_base, tl.where(pairs, t, -INF))
                positive = positive * fading
            positive += tl.sum(tl.where(pairs, tl.exp2(t - positive_base[:, None]), 0.0), 1)
        if RUNNING:
            base, fading = raised(base, tl.where(members, t, -INF))
            negative = negative * fading
        e = tl.where(members, tl.exp2(t - base[:, None]), 0.0)
        negative += tl.sum(e, 1)
        if WEIGHTED is not None:
            weighted = weighted * fading[:, None]
            weighted = add_weighted(
                weighted, e, c, Y, y, j0, d0, M, D, BLOCK_N, BLOCK_K, BLOCK_D, True, NORMED,
                PRECISION, INTERPRETED,
            )  # fmt: skip
        if COLUMN_SUMS is not None:
            before = tl.load(COLUMN_SUMS + j, mask=is_column, other=0.0)
            tl.store(COLUMN_SUMS + j, before + tl.sum(e, 0), mask=is_column)

    if BIAS == 2:
        num_inadmissible = tl.where(row_bias == LEFT_OUT, M, num_inadmissible)
    if (CLUSTERS and not IDS) and BIAS == 0:
        # Loaded again, as rows are stored: kept through the loop over mixed tiles, they would spill.
        again = i
        if WEIGHTED is not None:
            again = i.to(tl.uint32).to(tl.int64)  # other addresses to the compiler, which would keep these too
        num_positive = tl.load(END + again, mask=is_row, other=0, volatile=True)
        num_positive -= tl.load(START + again, mask=is_row, other=0, volatile=True)
        if SELF:
            num_positive -= 1  # a row lies in its own range
    if RUNNING:
        base = tl.where(base > LOWEST, base, 0.0)
        positive_base = tl.where(positive_base > LOWEST, positive_base, 0.0)
    if d0 == 0:
        if SELF:
            num_inadmissible += 1
        if SPLIT:  # what follows from ranges and biases alone counts once
            if part > 0:
                if (CLUSTERS and not IDS) and BIAS == 0:
                    num_positive = tl.zeros([BLOCK_M], tl.int32)
                if SELF:
                    num_inadmissible -= 1
                if BIAS == 2:
                    num_inadmissible = tl.where(row_bias == LEFT_OUT, 0, num_inadmissible)
        places = STATISTICS + row_places(ORDER, i, N)
        size = tl.cast(N, tl.int64)
        tl.store(places, base, mask=is_row)
        tl.store(places + size, negative, mask=is_row)
        tl.store(places + 2 * size, positive_base, mask=is_row)
        tl.store(places + 3 * size, positive, mask=is_row)
        tl.store(places + 4 * size, sum_positive * LN2, mask=is_row)
        tl.store(places + 5 * size, num_positive.to(tl.float32), mask=is_row)
        tl.store(places + 6 * size, num_inadmissible.to(tl.float32), mask=is_row)
    if WEIGHTED is not None:
        d = d0 + tl.arange(0, BLOCK_D)
        r = tl.arange(0, BLOCK_M)
        weights = WEIGHTED + tl.cast(i0, tl.int64) * WIDTH + (r[:, None] * WIDTH + d[None, :])
        # Not `is_row`: the compiler would keep what it compared for the load of x, and spill it.
        tl.store(weights, weighted / LIFT, mask=(r < N - i0)[:, None] & (d < WIDTH)[None, :])


@triton.jit
def add_weighted(
    weighted, e, c, Y, y, j0, d0, M,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    MASKED: tl.constexpr, NORMED: tl.constexpr, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """weighted + sum_j e_ij c_j y_j, times LIFT."""
    dtype: tl.constexpr = Y.dtype.element_ty
    if NORMED:
        e = e * (c * LIFT)[None, :]
    else:
        e = e * LIFT
    if BLOCK_D == D and BLOCK_K == D:
        columns = y
    else:
        columns = load_rows(Y, j0, d0, M, D, BLOCK_N, BLOCK_D, MASKED, PRECISION, INTERPRETED)
    return product(rounded(e, dtype, PRECISION, INTERPRETED), columns, weighted, PRECISION, INTERPRETED)


@triton.jit(do_not_specialize=["N", "M"])
def statistics_kernel(
    X, Y, A, C, ROW_BIAS, COLUMN_BIAS, START, END, ROW_NAMES, COLUMN_NAMES, ORDER, SCALE,
    LONGEST, LARGEST_BIAS, STATISTICS, N, M,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    SELF: tl.constexpr, CLUSTERS: tl.constexpr, IDS: tl.constexpr, NORMED: tl.constexpr, BIAS: tl.constexpr,
    MIXED_ONLY: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """A row block a program, or, if SPLIT, one part of its columns: STATISTICS [parts, 7, N] for `join_kernel`.

    MIXED_ONLY: of the negatives only those in mixed tiles, for who has their sums already.
    """
    scale = tl.load(SCALE) * LOG2E
    shift, narrow = fixed_shift(scale, LONGEST, LARGEST_BIAS)
    if narrow:
        part = tl.program_id(1)
        own = STATISTICS
        if SPLIT:
            own += part.to(tl.int64) * 7 * N
        sweep_rows(
            tl.program_id(0), part, tl.num_programs(1),
            X, Y, A, C, ROW_BIAS, COLUMN_BIAS, START, END, ROW_NAMES, COLUMN_NAMES, ORDER,
            scale, shift, own, None, None, 0, 0, N, M,
            D, BLOCK_M, BLOCK_N, BLOCK_K, D, SELF, CLUSTERS, IDS, NORMED, BIAS,
            False, MIXED_ONLY, SPLIT, PRECISION, INTERPRETED,
        )  # fmt: skip


@triton.jit(do_not_specialize=["N", "M"])
def two_way_kernel(
    X, Y, A, C, COLUMN_BIAS, START, END, ROW_NAMES, COLUMN_NAMES, ORDER, SCALE,
    LONGEST, LARGEST_BIAS, STATISTICS, PARTIAL_SUMS, N, M,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    CLUSTERS: tl.constexpr, IDS: tl.constexpr, NORMED: tl.constexpr, BIAS: tl.constexpr,
    PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """PARTIAL_SUMS [programs, M], zeroed: each program's share of the columns' sums over their negatives.

    A program visits every so many-th row block in order, and only it writes to its row: no atomics, and a fixed order
    of additions.
    """
    scale = tl.load(SCALE) * LOG2E
    shift, narrow = fixed_shift(scale, LONGEST, LARGEST_BIAS)
    if narrow:
        own = PARTIAL_SUMS + tl.program_id(0).to(tl.int64) * M
        for block in range(tl.program_id(0), tl.cdiv(N, BLOCK_M), tl.num_programs(0)):
            sweep_rows(
                block, 0, 1,
                X, Y, A, C, None, COLUMN_BIAS, START, END, ROW_NAMES, COLUMN_NAMES, ORDER,
                scale, shift, STATISTICS, own, None, 0, 0, N, M,
                D, BLOCK_M, BLOCK_N, BLOCK_K, D, False, CLUSTERS, IDS, NORMED, BIAS,
                False, False, False, PRECISION, INTERPRETED,
            )  # fmt: skip
            tl.debug_barrier()  # what one thread has stored, another may load in the next block


@triton.jit(do_not_specialize=["N", "M"])
def running_kernel(
    X, Y, A, C, ROW_BIAS, COLUMN_BIAS, START, END, ROW_NAMES, COLUMN_NAMES, ORDER, SCALE,
    LONGEST, LARGEST_BIAS, STATISTICS, N, M,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    SELF: tl.constexpr, CLUSTERS: tl.constexpr, IDS: tl.constexpr, NORMED: tl.constexpr, BIAS: tl.constexpr,
    APART: tl.constexpr, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """A row block a program, where the fixed shift was of no use.

    APART: the sums over negatives and over positives are wanted each, not only that over both.
    """
    scale = tl.load(SCALE) * LOG2E
    shift, narrow = fixed_shift(scale, LONGEST, LARGEST_BIAS)
    needed = 1 - narrow.to(tl.int32)
    if narrow:
        i = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
        is_row = i < N
        places = STATISTICS + row_places(ORDER, i, N)
        size = tl.cast(N, tl.int64)
        negative = tl.load(places + size, mask=is_row, other=0.0)
        positive = tl.load(places + 3 * size, mask=is_row, other=0.0)
        num_positive = tl.load(places + 5 * size, mask=is_row, other=0.0)
        num_negative = M - tl.load(places + 6 * size, mask=is_row, other=0.0) - num_positive
        # A shift far above a row's log-sum rounds its exponents more coarsely than its logits are.
        enough = tl.maximum(M * TINY, tl.where(shift > ROUGH, tl.exp2((shift + ROUGH) * -0.5), 0.0))
        if APART:
            poor = ((num_negative > 0) & (negative < enough)) | ((num_positive > 0) & (positive < enough))
        else:
            poor = (num_negative + num_positive > 0) & (negative + positive < enough)
        needed = tl.max((poor & is_row).to(tl.int32), 0)
    if needed != 0:
        sweep_rows(
            tl.program_id(0), 0, 1,
            X, Y, A, C, ROW_BIAS, COLUMN_BIAS, START, END, ROW_NAMES, COLUMN_NAMES, ORDER,
            scale, 0.0, STATISTICS, None, None, 0, 0, N, M,
            D, BLOCK_M, BLOCK_N, BLOCK_K, D, SELF, CLUSTERS, IDS, NORMED, BIAS,
            True, False, False, PRECISION, INTERPRETED,
        )  # fmt: skip


@triton.jit(do_not_specialize=["N", "M"])
def weighted_kernel(
    X, Y, A, C, START, END, ROW_NAMES, COLUMN_NAMES, ORDER, SCALE, STATISTICS, WEIGHTED, WIDTH, N, M,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    CLUSTERS: tl.constexpr, IDS: tl.constexpr, NORMED: tl.constexpr, SPLIT: tl.constexpr,
    PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Statistics, with running maxima, and the softmax-weighted sums of columns, of which the rows' gradient is made.

    A program: a row block, and BLOCK_D numbers of the sums; if SPLIT, one part of the columns: STATISTICS
    [parts, 7, N] and WEIGHTED [parts, N, WIDTH] for `join_kernel`.
    """
    part = tl.program_id(2)
    statistics = STATISTICS
    weighted = WEIGHTED
    if SPLIT:
        statistics += part.to(tl.int64) * 7 * N
        weighted += part.to(tl.int64) * N * WIDTH
    sweep_rows(
        tl.program_id(0), part, tl.num_programs(2),
        X, Y, A, C, None, None, START, END, ROW_NAMES, COLUMN_NAMES, ORDER, tl.load(SCALE) * LOG2E, 0.0,
        statistics, None, weighted, tl.program_id(1) * BLOCK_D, WIDTH, N, M,
        D, BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_D,
        False, CLUSTERS, IDS, NORMED, 0, True, False, SPLIT, PRECISION, INTERPRETED,
    )  # fmt: skip


@triton.jit
def joined(PARTS, places, size, parts, mask, K: tl.constexpr):
    """(base, sum) of the parts' sums in row K + 1 of [parts, 7, N], which belong to the bases in row K."""
    base = tl.full(places.shape, LOWEST, tl.float32)
    for part in range(0, parts):
        own = PARTS + (7 * part + K) * size + places
        some = tl.load(own + size, mask=mask, other=0.0) != 0.0  # an empty sum says nothing about the base
        base = tl.maximum(base, tl.where(some, tl.load(own, mask=mask, other=0.0), LOWEST))
    base = tl.where(base > LOWEST, base, tl.load(PARTS + K * size + places, mask=mask, other=0.0))
    total = tl.zeros(places.shape, tl.float32)
    for part in range(0, parts):
        own = PARTS + (7 * part + K) * size + places
        sum_ = tl.load(own + size, mask=mask, other=0.0)
        fading = tl.exp2(tl.minimum(tl.load(own, mask=mask, other=0.0) - base, 0.0))
        total += tl.where(sum_ != 0.0, sum_ * fading, 0.0)
    return base, total


@triton.jit(do_not_specialize=["N", "COUNT"])
def join_kernel(
    PARTS, WEIGHTED_PARTS, ORDER, STATISTICS, WEIGHTED, N, WIDTH, COUNT, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """STATISTICS [7, N] and, where there is any, WEIGHTED [N, WIDTH], from COUNT parts of the columns, in order.

    A program: a row block, and BLOCK_D numbers of the weighted sums.
    """
    i = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    is_row = i < N
    places = row_places(ORDER, i, N)
    size = tl.cast(N, tl.int64)
    base, negative = joined(PARTS, places, size, COUNT, is_row, 0)
    if tl.program_id(1) == 0:
        positive_base, positive = joined(PARTS, places, size, COUNT, is_row, 2)
        tl.store(STATISTICS + places, base, mask=is_row)
        tl.store(STATISTICS + size + places, negative, mask=is_row)
        tl.store(STATISTICS + 2 * size + places, positive_base, mask=is_row)
        tl.store(STATISTICS + 3 * size + places, positive, mask=is_row)
        for k in range(4, 7):
            total = tl.zeros([BLOCK_M], tl.float32)
            for part in range(0, COUNT):
                total += tl.load(PARTS + (7 * part + k) * size + places, mask=is_row, other=0.0)
            tl.store(STATISTICS + k * size + places, total, mask=is_row)
    if WEIGHTED is not None:
        d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        there = is_row[:, None] & (d < WIDTH)[None, :]
        numbers = i.to(tl.int64)[:, None] * WIDTH + d[None, :]
        total = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        for part in range(0, COUNT):
            own = PARTS + 7 * part * size + places
            some = tl.load(own + size, mask=is_row, other=0.0) != 0.0
            fading = tl.exp2(tl.minimum(tl.load(own, mask=is_row, other=0.0) - base, 0.0))
            weighted = tl.load(WEIGHTED_PARTS + part * size * WIDTH + numbers, mask=there, other=0.0)
            total += tl.where(some[:, None], weighted * fading[:, None], 0.0)
        tl.store(WEIGHTED + numbers, total, mask=there)
