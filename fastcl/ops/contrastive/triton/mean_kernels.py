"""Triton kernel of the mean loss: its value and its derivative in the statistics, in one launch.

PyTorch takes some sixty operators for it. Each takes longer to launch than this kernel takes for a few thousand rows.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def log1p(x):
    """log(1 + x) of x in [0, 1], within a few roundings however small x is: 2 artanh(x / (2 + x)) by its series."""
    z = x / (2.0 + x)
    square = z * z
    series = 1.0 / 15.0 + square * (1.0 / 17.0)
    series = 1.0 / 13.0 + square * series
    series = 1.0 / 11.0 + square * series
    series = 1.0 / 9.0 + square * series
    series = 1.0 / 7.0 + square * series
    series = 1.0 / 5.0 + square * series
    series = 1.0 / 3.0 + square * series
    return 2.0 * (z + z * square * series)


@triton.jit(do_not_specialize=["SIZE"])
def scaled_kernel(DERIVATIVES, FACTOR, PRODUCTS, SIZE, BLOCK: tl.constexpr):
    """PRODUCTS [SIZE]: DERIVATIVES [SIZE] times FACTOR []."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(DERIVATIVES + i, mask=i < SIZE, other=0.0)
    tl.store(PRODUCTS + i, values * tl.load(FACTOR), mask=i < SIZE)


@triton.jit(do_not_specialize=["N", "SIDES", "ADD"])
def mean_kernel(
    FIELDS, COUNTS, PARTS, LOSS, DERIVATIVES, N, SIDES, ADD, RATIO: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """LOSS []: the mean over the N rows that count, as `direct.DirectMean` describes it, / SIDES; ADD, 1 or 0: added to
    LOSS. Both are numbers at run time, so that one compiled kernel serves one side and two.

    DERIVATIVES: of that in FIELDS, which are lse_all, lse_neg, sum_pos with RATIO, else lse_neg, sum_pos, [., N]. PARTS
    [2, ., N]: shifts and sums of the log-sums among them. One program.
    """
    size = tl.cast(N, tl.int64)
    places = tl.arange(0, BLOCK)
    found = tl.zeros([BLOCK], tl.int32)
    for start in range(0, N, BLOCK):
        i = start + places
        counted = tl.load(COUNTS + i, mask=i < N, other=0.0) > 0
        if not RATIO:
            counted = counted & (tl.load(COUNTS + size + i, mask=i < N, other=0.0) > 0)
        found += counted.to(tl.int32)
    rows = tl.maximum(tl.sum(found, 0), 1).to(tl.float32) * SIDES
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, N, BLOCK):
        i = start + places
        is_row = i < N
        num_pos = tl.load(COUNTS + i, mask=is_row, other=0.0)
        counted = num_pos > 0
        if not RATIO:
            counted = counted & (tl.load(COUNTS + size + i, mask=is_row, other=0.0) > 0)
        number = tl.where(counted, num_pos, 1.0)
        weight = tl.where(counted, 1.0, 0.0) / rows
        lse = tl.load(FIELDS + i, mask=is_row, other=0.0)
        if RATIO:
            sum_pos = tl.load(FIELDS + 2 * size + i, mask=is_row, other=0.0)
            shift = tl.load(PARTS + size + i, mask=is_row, other=0.0)
            negative = tl.load(PARTS + 3 * size + i, mask=is_row, other=1.0)
            # The logit of a single positive is its log-sum-exp. Shift and logit are subtracted first, as in `direct`.
            ratio = (shift - sum_pos) + tl.log(negative)
            above = ratio > 0
            e = tl.exp(-tl.abs(ratio))
            # 0 * sum_pos makes the loss NaN if the logit is infinite.
            loss_of_single = tl.where(above, ratio, 0.0) + log1p(e) + 0.0 * sum_pos
            share = tl.where(above, 1.0, e) / (1.0 + e) * weight  # of the negatives in the sum
            single = num_pos == 1
            terms = tl.where(single, loss_of_single, lse - sum_pos / number)
            tl.store(DERIVATIVES + i, tl.where(single, 0.0, weight), mask=is_row)
            tl.store(DERIVATIVES + size + i, tl.where(single, share, 0.0), mask=is_row)
            tl.store(DERIVATIVES + 2 * size + i, tl.where(single, -share, -weight / number), mask=is_row)
        else:
            sum_pos = tl.load(FIELDS + size + i, mask=is_row, other=0.0)
            terms = lse - sum_pos / number
            tl.store(DERIVATIVES + i, weight, mask=is_row)
            tl.store(DERIVATIVES + size + i, -weight / number, mask=is_row)
        total += tl.where(counted, terms, 0.0)
    loss = tl.sum(total, 0) / rows
    if ADD != 0:
        loss += tl.load(LOSS)
    tl.store(LOSS, loss)
