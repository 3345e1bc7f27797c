"""Triton kernels that visit each row once: what comes before, between and after the sweeps over tiles.

Each does in one launch what would take PyTorch a dozen: at a few thousand rows, launches take longer than sweeps.

    labels_kernel     ids as small numbers
    rows_kernel       rows in the order of their clusters, padded, with what belongs to each
    fields_kernel     the wanted statistics, of a forward's sums
    weights_kernel    what the gradients of the statistics make of each sum
    side_kernel       the same as the gradient's sweep reads it
    finish_kernel     the gradient off the normalised rows, in the caller's order and dtype
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...backends.triton_kernels import INF, LEFT_OUT, LN2, LOG2E, load_rows, rounded

# G is lifted until its largest number lies near 2^LARGEST: float16 ends at 2^16, and would flush a share of 1 / N^2.
LARGEST = tl.constexpr(11.0)
# 2^FITS, and sums of some, are in float32's range.
FITS = tl.constexpr(100.0)
# Norms beyond which rows are stored near 1, by powers of two: products and gradients of two such rows leave the range.
FAR = tl.constexpr(2.0**40)


# Ids and rows.


@triton.jit
def places_in(SORTED, size, values, mask, steps, RIGHT: tl.constexpr):
    """How many of SORTED [size], ascending and fewer than 2^steps, are less than each value; RIGHT: or equal."""
    low = tl.zeros(values.shape, tl.int32)
    high = tl.where(mask, low + size, low)
    for _ in range(0, steps):
        middle = low + (high - low) // 2
        open_ = middle < high
        other = tl.load(SORTED + middle, mask=open_, other=0)
        if RIGHT:
            before = other <= values
        else:
            before = other < values
        low = tl.where(open_ & before, middle + 1, low)
        high = tl.where(open_ & ~before, middle, high)
    return low


@triton.jit(do_not_specialize=["N", "M", "STEPS"])
def labels_kernel(
    VALUES, SORTED, ORDER, LABELS, N, M, STEPS, OWN: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """LABELS [N] int32 of ids VALUES [N]: where each is found among SORTED [M]. -1 equals nothing.

    With ORDER [M], the number of the row that has the id first; OWN: those without an id then get their own row's, else
    M. Without it, 1 + the place in SORTED, or 0.
    """
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_row = i < N
    ids = tl.load(VALUES + i, mask=is_row, other=-1)
    place = places_in(SORTED, M, ids, is_row, STEPS, False)
    there = is_row & (place < M)
    there = there & (tl.load(SORTED + place, mask=there, other=-1) == ids) & (ids != -1)
    if ORDER is not None:
        labels = tl.load(ORDER + place, mask=there, other=0).to(tl.int32)
        if OWN:
            labels = tl.where(there, labels, i)
        else:
            labels = tl.where(there, labels, M)
    else:
        labels = tl.where(there, place + 1, 0)
    tl.store(LABELS + i, labels, mask=is_row)


@triton.jit(
    do_not_specialize=["N", "M", "STEPS", "CHECKED"],
    do_not_specialize_on_alignment=["ORDER", "NUMBERS", "OTHER_NUMBERS", "SOURCE_NAMES"],
)
def rows_kernel(
    SOURCE, ORDER, NUMBERS, OTHER_NUMBERS, SOURCE_NAMES, SOURCE_BIAS,
    ROWS, NORMS, ROW_NORMS, LENGTHS, START, END, ROW_NAMES, ROW_BIAS, N, M, WIDTH, ROW_STRIDE, COLUMN_STRIDE, STEPS,
    CHECKED,
    NORMALIZE: tl.constexpr, SCALED: tl.constexpr, LEAVE_OUT: tl.constexpr, FLOOR: tl.constexpr, D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Of SOURCE [N, WIDTH], in ORDER: ROWS [N, D], zeros behind; and of each row, where there is such an argument,

    NORMS      1 / max(|x|, FLOOR), in the caller's order; 0 for a row of zeros
    ROW_NORMS  the same for the row as it is stored in ROWS; 1 for rows that are taken as they are
    LENGTHS    |x|, of rows that are not normalised; if CHECKED is 1, one with an infinite number is stored as NaN
    START, END the range of OTHER_NUMBERS [M] that equals NUMBERS [N]
    ROW_NAMES, ROW_BIAS  SOURCE_NAMES and SOURCE_BIAS log2(e), of -inf LEFT_OUT

    Normalised rows whose norm exceeds FAR are stored with norms near 1, multiplied by powers of two.
    SCALED: all rows are stored with norms of 1/2 to 1, multiplied by powers of two. Inverse norms are then of one size:
    that of a tiny row would take the numbers that others' products are made of below the range of float16. The power
    is exact but for numbers that it takes below 2^-14, which lose less than 2^-24 of the row's norm.
    LEAVE_OUT: rows whose bias is -inf are read as zeros, whatever they hold.
    """
    i = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    is_row = i < N
    row = i.to(tl.int64)
    if ORDER is not None:
        row = tl.load(ORDER + i, mask=is_row, other=0)
    from_ = SOURCE + row * ROW_STRIDE
    stride = tl.cast(COLUMN_STRIDE, tl.int64)
    is_read = is_row
    if LEAVE_OUT:
        is_read = is_row & (tl.load(SOURCE_BIAS + row, mask=is_row, other=0.0) != -INF)
    inverse = tl.full([BLOCK_M], 1.0, tl.float32)
    factor = tl.full([BLOCK_M], 1.0, tl.float32)
    row_inverse = inverse
    if NORMALIZE:
        squares = tl.zeros([BLOCK_M], tl.float32)
        for d0 in range(0, D, BLOCK_D):
            d = d0 + tl.arange(0, BLOCK_D)
            x = tl.load(from_[:, None] + d[None, :] * stride, mask=is_read[:, None] & (d < WIDTH)[None, :], other=0.0)
            x = x.to(tl.float32)
            squares += tl.sum(x * x, 1)
        norm = tl.sqrt_rn(squares)
        inverse = tl.div_rn(factor, tl.where(norm < FLOOR, FLOOR, norm))
        inverse = tl.where(norm == 0.0, 0.0, inverse)
        row_inverse = inverse
        is_far = norm > FAR
        if tl.max((is_row & (is_far | (norm == 0.0))).to(tl.int32), 0) != 0:  # hardly ever
            largest = tl.zeros([BLOCK_M], tl.float32)
            for d0 in range(0, D, BLOCK_D):
                d = d0 + tl.arange(0, BLOCK_D)
                there = is_read[:, None] & (d < WIDTH)[None, :]
                x = tl.load(from_[:, None] + d[None, :] * stride, mask=there, other=0.0)
                largest = tl.maximum(largest, tl.max(tl.abs(x.to(tl.float32)), 1))
            exponent = tl.maximum(253 - (largest.to(tl.int32, bitcast=True) >> 23), 1)
            factor = tl.where(is_far, (exponent << 23).to(tl.float32, bitcast=True), factor)
            squares = tl.zeros([BLOCK_M], tl.float32)
            for d0 in range(0, D, BLOCK_D):
                d = d0 + tl.arange(0, BLOCK_D)
                there = is_read[:, None] & (d < WIDTH)[None, :]
                x = tl.load(from_[:, None] + d[None, :] * stride, mask=there, other=0.0)
                x = x.to(tl.float32) * factor[:, None]
                squares += tl.sum(x * x, 1)
            one = tl.full([BLOCK_M], 1.0, tl.float32)
            tiny = tl.where((norm == 0.0) & (largest > 0.0), tl.div_rn(one, one * FLOOR), inverse)
            row_inverse = tl.where(is_far, tl.div_rn(one, tl.sqrt_rn(squares)), tiny)
            inverse = row_inverse * factor
        if NORMS is not None:
            tl.store(NORMS + row, inverse, mask=is_row)
        if SCALED:
            power = (inverse.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
            factor = tl.where((inverse > 0.0) & (inverse < INF), power, 1.0)
            row_inverse = inverse / factor
    if LENGTHS is not None:
        squares = tl.zeros([BLOCK_M], tl.float32)
        infinite = tl.zeros([BLOCK_M], tl.int32)
        for d0 in range(0, D, BLOCK_D):
            d = d0 + tl.arange(0, BLOCK_D)
            x = tl.load(from_[:, None] + d[None, :] * stride, mask=is_read[:, None] & (d < WIDTH)[None, :], other=0.0)
            x = x.to(tl.float32)
            squares += tl.sum(x * x, 1)
            infinite = tl.maximum(infinite, tl.max((tl.abs(x) == INF).to(tl.int32), 1))
        factor = tl.where((infinite != 0) & (CHECKED != 0), float("nan"), factor)
        tl.store(LENGTHS + i, tl.sqrt_rn(squares) * factor, mask=is_row)
    if ROW_NORMS is not None:
        tl.store(ROW_NORMS + i, row_inverse, mask=is_row)
    if ROWS is not None:
        dtype: tl.constexpr = ROWS.dtype.element_ty
        for d0 in range(0, D, BLOCK_D):
            d = d0 + tl.arange(0, BLOCK_D)
            x = tl.load(from_[:, None] + d[None, :] * stride, mask=is_read[:, None] & (d < WIDTH)[None, :], other=0.0)
            if NORMALIZE or LENGTHS is not None:
                x = x.to(tl.float32) * factor[:, None]
            places = ROWS + i.to(tl.int64)[:, None] * D + d[None, :]
            tl.store(places, rounded(x, dtype, "ieee", INTERPRETED), mask=is_row[:, None])
    if START is not None:
        own = tl.load(NUMBERS + i, mask=is_row, other=0)
        tl.store(START + i, places_in(OTHER_NUMBERS, M, own, is_row, STEPS, False), mask=is_row)
        tl.store(END + i, places_in(OTHER_NUMBERS, M, own, is_row, STEPS, True), mask=is_row)
    if ROW_NAMES is not None:
        tl.store(ROW_NAMES + i, tl.load(SOURCE_NAMES + row, mask=is_row, other=0), mask=is_row)
    if ROW_BIAS is not None:
        bias = tl.load(SOURCE_BIAS + row, mask=is_row, other=0.0)
        bias = tl.where(bias == -INF, LEFT_OUT, tl.where(bias == INF, float("nan"), bias * LOG2E))
        tl.store(ROW_BIAS + i, bias, mask=is_row)


# The forward's end.


@triton.jit(do_not_specialize=["N", "PAIRS"], do_not_specialize_on_alignment=["BASES"])
def fields_kernel(
    STATISTICS, FIELDS, COUNTS, PARTS, BASES, N, PAIRS,
    ALL: tl.constexpr, POS: tl.constexpr, NEG: tl.constexpr, SUM: tl.constexpr, LOG_SUMS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One side's fields [W, S, N], counts [2, N] and parts [2, LOG_SUMS, S, N]; the bases [3, S, N] of its sums over
    all, negatives and positives, to base 2. STATISTICS [S, 7, N] are the sweep's, PAIRS the columns that it met.

    ALL, POS, NEG, SUM: each field's place, in that order; -1 where it is not wanted. A program: rows of one scale.
    """
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_row = i < N
    k = tl.program_id(1)
    size = tl.cast(N, tl.int64)
    own = STATISTICS + 7 * k * size + i
    base = tl.load(own, mask=is_row, other=0.0)
    negative = tl.load(own + size, mask=is_row, other=0.0)
    positive_base = tl.load(own + 2 * size, mask=is_row, other=0.0)
    positive = tl.load(own + 3 * size, mask=is_row, other=0.0)
    # An empty sum says nothing about the base. (A sum that is NaN does.)
    both_base = tl.where(positive == 0, base, tl.maximum(base, positive_base))
    both_base = tl.where(negative == 0, positive_base, both_base)
    everything = negative * tl.exp2(tl.minimum(base - both_base, 0.0))
    everything += positive * tl.exp2(tl.minimum(positive_base - both_base, 0.0))
    every = tl.num_programs(1) * size  # the numbers of a field
    places = k * size + i
    store_log_sum(FIELDS, PARTS, both_base, everything, places, every, is_row, ALL, LOG_SUMS)
    store_log_sum(FIELDS, PARTS, positive_base, positive, places, every, is_row, POS, LOG_SUMS)
    store_log_sum(FIELDS, PARTS, base, negative, places, every, is_row, NEG, LOG_SUMS)
    if SUM >= 0:
        tl.store(FIELDS + SUM * every + places, tl.load(own + 4 * size, mask=is_row, other=0.0), mask=is_row)
    tl.store(BASES + places, both_base, mask=is_row)
    tl.store(BASES + every + places, base, mask=is_row)
    tl.store(BASES + 2 * every + places, positive_base, mask=is_row)
    if k == 0:
        num_positive = tl.load(own + 5 * size, mask=is_row, other=0.0)
        inadmissible = tl.load(own + 6 * size, mask=is_row, other=0.0)
        tl.store(COUNTS + i, num_positive, mask=is_row)
        tl.store(COUNTS + size + i, PAIRS - inadmissible - num_positive, mask=is_row)


@triton.jit
def store_log_sum(
    FIELDS, PARTS, base, total, places, every, mask, FIELD: tl.constexpr, LOG_SUMS: tl.constexpr
):  # fmt: skip
    if FIELD >= 0:
        shift = base * LN2
        tl.store(FIELDS + FIELD * every + places, shift + tl.log(total), mask=mask)
        tl.store(PARTS + FIELD * every + places, shift, mask=mask)
        tl.store(PARTS + (LOG_SUMS + FIELD) * every + places, total, mask=mask)


# The backward's beginning.


@triton.jit
def weight_of(
    GRAD, PARTS, base, present, places, every, mask, FIELD: tl.constexpr, LOG_SUMS: tl.constexpr
):  # fmt: skip
    """Of a log-sum: its gradient, that divided by the sum (over terms 2^(t - base)), and the log-sum to base 2.

    The log-sum of an empty set is NaN, its gradient 0: a user's formula may well divide by a count of zero in a row
    that it masks out, and send NaN back.
    """
    grad = tl.zeros(places.shape, tl.float32)
    weight = grad
    log_sum = tl.full(places.shape, float("nan"), tl.float32)
    if FIELD >= 0:
        grad = tl.load(GRAD + FIELD * every + places, mask=mask & present, other=0.0)
        shift = tl.load(PARTS + FIELD * every + places, mask=mask, other=0.0)
        total = tl.load(PARTS + (LOG_SUMS + FIELD) * every + places, mask=mask, other=0.0)
        # The sum may since have been joined by another term, and its base have been raised. That of an empty sum may
        # have fallen: there is nothing to weight then, and nothing to overflow.
        weight = tl.where(total == 0.0, 0.0, grad / total) * tl.exp(tl.minimum(base * LN2 - shift, 0.0))
        log_sum = tl.where(total > 0.0, shift * LOG2E + tl.log2(total), log_sum)
    return grad, weight, log_sum


@triton.jit(do_not_specialize=["N"], do_not_specialize_on_alignment=["ORDER", "BASES"])
def weights_kernel(
    GRAD, COUNTS, PARTS, BASES, ORDER, WEIGHTS, EXTREMES, N,
    ALL: tl.constexpr, POS: tl.constexpr, NEG: tl.constexpr, SUM: tl.constexpr, LOG_SUMS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """WEIGHTS [S, 7, N], in ORDER: the bases of the sums over all, negatives and positives, what a term 2^(t - base) of
    each gets, and what a positive's logit gets on top. A program: rows of one scale.

    EXTREMES [4, S, blocks]: of a block of rows the smallest and the largest log-sum (to base 2) of those that have a
    gradient, the largest gradient that a logit can get, and the largest log-sum of all.
    """
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_row = i < N
    k = tl.program_id(1)
    size = tl.cast(N, tl.int64)
    every = tl.num_programs(1) * size
    row = i.to(tl.int64)
    if ORDER is not None:
        row = tl.load(ORDER + i, mask=is_row, other=0)
    positives = tl.load(COUNTS + row, mask=is_row, other=0.0) > 0
    negatives = tl.load(COUNTS + size + row, mask=is_row, other=0.0) > 0
    places = k * size + row
    both_base = tl.load(BASES + places, mask=is_row, other=0.0)
    base = tl.load(BASES + every + places, mask=is_row, other=0.0)
    positive_base = tl.load(BASES + 2 * every + places, mask=is_row, other=0.0)
    grad, everything, log_all = weight_of(
        GRAD, PARTS, both_base, positives | negatives, places, every, is_row, ALL, LOG_SUMS
    )
    peak = tl.abs(grad)
    used_all = used(log_all, grad)
    grad, positive, log_pos = weight_of(GRAD, PARTS, positive_base, positives, places, every, is_row, POS, LOG_SUMS)
    peak += tl.abs(grad)
    used_pos = used(log_pos, grad)
    grad, negative, log_neg = weight_of(GRAD, PARTS, base, negatives, places, every, is_row, NEG, LOG_SUMS)
    peak += tl.abs(grad)
    used_neg = used(log_neg, grad)
    extra = tl.zeros([BLOCK], tl.float32)
    if SUM >= 0:
        extra = tl.load(GRAD + SUM * every + places, mask=is_row & positives, other=0.0)
    peak += tl.abs(extra)
    out = WEIGHTS + 7 * k * size + i
    tl.store(out, both_base, mask=is_row)
    tl.store(out + size, base, mask=is_row)
    tl.store(out + 2 * size, positive_base, mask=is_row)
    tl.store(out + 3 * size, everything, mask=is_row)
    tl.store(out + 4 * size, negative, mask=is_row)
    tl.store(out + 5 * size, positive, mask=is_row)
    tl.store(out + 6 * size, extra, mask=is_row)
    lowest = tl.minimum(finite_or(used_all, INF), tl.minimum(finite_or(used_pos, INF), finite_or(used_neg, INF)))
    blocks = tl.num_programs(0)
    block = EXTREMES + k * blocks + tl.program_id(0)
    tl.store(block, tl.min(lowest, 0))
    tl.store(block + tl.num_programs(1) * blocks, tl.max(highest_of(used_all, used_pos, used_neg), 0))
    tl.store(block + 2 * tl.num_programs(1) * blocks, tl.max(peak, 0))
    tl.store(block + 3 * tl.num_programs(1) * blocks, tl.max(highest_of(log_all, log_pos, log_neg), 0))


@triton.jit
def used(log_sum, grad):
    """The log-sum where it has a gradient, else NaN."""
    return tl.where(grad == 0.0, float("nan"), log_sum)


@triton.jit
def highest_of(a, b, c):
    """-INF where none is a number."""
    return tl.maximum(finite_or(a, -INF), tl.maximum(finite_or(b, -INF), finite_or(c, -INF)))


@triton.jit
def finite_or(x, default):
    """x, default where it is not a number."""
    return tl.where(x == x, x, default)


@triton.jit
def extreme(EXTREMES, size, LARGEST_OF: tl.constexpr, BLOCK: tl.constexpr):
    """The largest of so many numbers, or the smallest."""
    found = tl.full([BLOCK], -INF if LARGEST_OF else INF, tl.float32)
    for start in range(0, size, BLOCK):
        i = start + tl.arange(0, BLOCK)
        if LARGEST_OF:
            found = tl.maximum(found, tl.load(EXTREMES + i, mask=i < size, other=-INF))
        else:
            found = tl.minimum(found, tl.load(EXTREMES + i, mask=i < size, other=INF))
    return tl.max(found, 0) if LARGEST_OF else tl.min(found, 0)


@triton.jit
def shifted(weight, exponent):
    """weight 2^exponent, by halves: the result may be in float32's range where the power is not."""
    half = tl.exp2(exponent * 0.5)
    return tl.where(weight == 0.0, weight, weight * half * half)


@triton.jit(do_not_specialize=["N", "COUNT", "OTHER_COUNT", "TWO_SIDES"])
def side_kernel(
    WEIGHTS, EXTREMES, OTHER_EXTREMES, SCALE, SIDE, ONE, MIDDLE, LIFT, FACTOR, N, COUNT, OTHER_COUNT, TWO_SIDES,
    CLOSE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """SIDE [S, 5, N], as `gradient_kernel` reads it, of one side's WEIGHTS; and of each scale [S]

    ONE     1 where one exponential serves both sides, whose log-sums then differ by less than CLOSE, but for those that
            have no gradient: as single positives' of large logits, whose weight is 0
    MIDDLE  the one base, in the middle of these log-sums (to base 2): no logit exceeds the log-sum of a set that it is
            in, and the highest log-sum of all is less than FITS above, so none overflows
    LIFT    the power of two that brings the largest gradient of a logit near 2^LARGEST
    FACTOR  what the lifted sums of gradients are multiplied by: SCALE / LIFT

    EXTREMES [4, S, COUNT] and OTHER_EXTREMES [4, S, OTHER_COUNT] are of `weights_kernel`. OTHER_COUNT is 0 where the
    other side is the same or has no weights. TWO_SIDES, 1 or 0: whether one exponential may serve both sides. The other
    side's launch finds the same numbers of each scale, so one compiled kernel does for all.
    """
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_row = i < N
    k = tl.program_id(1)
    scales = tl.num_programs(1)
    low = extreme(EXTREMES + k * COUNT, COUNT, False, BLOCK)
    high = extreme(EXTREMES + (scales + k) * COUNT, COUNT, True, BLOCK)
    peak = extreme(EXTREMES + 2 * scales * COUNT, scales * COUNT, True, BLOCK)
    most = extreme(EXTREMES + (3 * scales + k) * COUNT, COUNT, True, BLOCK)
    low = tl.minimum(low, extreme(OTHER_EXTREMES + k * OTHER_COUNT, OTHER_COUNT, False, BLOCK))
    high = tl.maximum(high, extreme(OTHER_EXTREMES + (scales + k) * OTHER_COUNT, OTHER_COUNT, True, BLOCK))
    other_peak = extreme(OTHER_EXTREMES + 2 * scales * OTHER_COUNT, scales * OTHER_COUNT, True, BLOCK)
    peak += tl.where(OTHER_COUNT > 0, other_peak, 0.0)
    most = tl.maximum(most, extreme(OTHER_EXTREMES + (3 * scales + k) * OTHER_COUNT, OTHER_COUNT, True, BLOCK))
    lift = LARGEST - tl.log2(tl.maximum(peak, 1e-30))
    lift = tl.exp2(tl.minimum(tl.maximum(tl.floor(lift), -100.0), 100.0))
    lift = tl.where(peak < INF, lift, 1.0)
    middle = tl.where(high >= low, (high + low) * 0.5, 0.0)
    one = (high - low < CLOSE) & (most - middle < FITS) & (TWO_SIDES != 0)
    middle = tl.where(one, middle, 0.0)
    own = WEIGHTS + 7 * k * tl.cast(N, tl.int64) + i
    both_base = tl.load(own, mask=is_row, other=0.0)
    base = tl.load(own + N, mask=is_row, other=0.0)
    positive_base = tl.load(own + 2 * tl.cast(N, tl.int64), mask=is_row, other=0.0)
    everything = tl.load(own + 3 * tl.cast(N, tl.int64), mask=is_row, other=0.0)
    negative = tl.load(own + 4 * tl.cast(N, tl.int64), mask=is_row, other=0.0)
    positive = tl.load(own + 5 * tl.cast(N, tl.int64), mask=is_row, other=0.0)
    extra = tl.load(own + 6 * tl.cast(N, tl.int64), mask=is_row, other=0.0)
    # Both ways, without a branch, which Triton 3.2 does not compile here.
    shared = shifted(everything, middle - both_base)
    negative_apart = negative + everything * tl.exp2(tl.minimum(base - both_base, 0.0))
    positive_apart = positive + everything * tl.exp2(tl.minimum(positive_base - both_base, 0.0))
    negative = tl.where(one, shared + shifted(negative, middle - base), negative_apart)
    positive = tl.where(one, shared + shifted(positive, middle - positive_base), positive_apart)
    out = SIDE + 5 * k * tl.cast(N, tl.int64) + i
    tl.store(out, base, mask=is_row)
    tl.store(out + N, negative * lift, mask=is_row)
    tl.store(out + 2 * tl.cast(N, tl.int64), positive_base, mask=is_row)
    tl.store(out + 3 * tl.cast(N, tl.int64), positive * lift, mask=is_row)
    tl.store(out + 4 * tl.cast(N, tl.int64), extra * lift, mask=is_row)
    if tl.program_id(0) == 0:
        tl.store(ONE + k, one.to(tl.int32))
        tl.store(MIDDLE + k, middle)
        tl.store(LIFT + k, lift)
        tl.store(FACTOR + k, tl.load(SCALE + k) / lift)


# The gradient's end.


@triton.jit(do_not_specialize=["N", "NORMALIZED"], do_not_specialize_on_alignment=["NORMS", "ORDER", "FACTOR"])
def finish_kernel(
    GRADIENT, X, NORMS, ORDER, FACTOR, OUT, N, WIDTH, NORMALIZED,
    LARGEST_INVERSE: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """OUT [N, WIDTH]: the gradient [N, D] times FACTOR [1], off the rows if they were NORMALIZED (1), in the caller's
    order and dtype. Below the floor of the norm a row was divided by a constant, and there is nothing to project.

    NORMS: the inverse norms of the caller's rows, in its order; X may hold them times powers of two. Without NORMALIZED
    neither is read.
    A kernel of its own, because in the one before it the rows would take the registers of the accumulators.
    """
    i0 = tl.program_id(0) * BLOCK_M
    i = i0 + tl.arange(0, BLOCK_M)
    is_row = i < N
    row = i.to(tl.int64)
    if ORDER is not None:
        row = tl.load(ORDER + i, mask=is_row, other=0)
    factor = tl.load(FACTOR) + tl.zeros([BLOCK_M], tl.float32)
    along = tl.zeros([BLOCK_M], tl.float32)
    if NORMALIZED != 0:
        squares = tl.zeros([BLOCK_M], tl.float32)
        for d0 in range(0, D, BLOCK_D):
            x = load_rows(X, i0, d0, N, D, BLOCK_M, BLOCK_D, True, "ieee", INTERPRETED).to(tl.float32)
            g = load_rows(GRADIENT, i0, d0, N, D, BLOCK_M, BLOCK_D, True, "ieee", INTERPRETED)
            along += tl.sum(x * g, 1)
            squares += tl.sum(x * x, 1)
        inverse = tl.load(NORMS + row, mask=is_row, other=0.0)
        linear = (inverse == 0.0) | (inverse >= LARGEST_INVERSE)
        along = tl.where(linear, 0.0, along / tl.where(linear, 1.0, squares))
        factor = factor * inverse
    for d0 in range(0, D, BLOCK_D):
        g = load_rows(GRADIENT, i0, d0, N, D, BLOCK_M, BLOCK_D, True, "ieee", INTERPRETED)
        if NORMALIZED != 0:
            x = load_rows(X, i0, d0, N, D, BLOCK_M, BLOCK_D, True, "ieee", INTERPRETED).to(tl.float32)
            g = g - along[:, None] * x
        d = d0 + tl.arange(0, BLOCK_D)
        g = rounded(g * factor[:, None], OUT.dtype.element_ty, "ieee", INTERPRETED)
        places = OUT + row[:, None] * WIDTH + d[None, :]
        tl.store(places, g, mask=is_row[:, None] & (d < WIDTH)[None, :])
