"""The Triton kernel of top-k: compares tiles of inner products with each row's k best so far.

Value and place are packed into one int64 (`chunked.packed`). No two packed numbers are equal, so results do not depend
on the order of comparisons. The kernel keeps the k best as an unsorted set and its minimum; the caller sorts. A tile
without a better candidate costs only a maximum of floats; otherwise its best candidates are inserted one by one.

    BEST  [N, parts, SLOTS]  the best of a part of the columns, unsorted; unused slots hold numbers below EMPTY + SLOTS
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..backends.triton_kernels import INF, inner_products, load_names, load_rows

EMPTY = tl.constexpr(-(2**63))
FULL = tl.constexpr(2**63 - 1)
LOW = tl.constexpr(2**32 - 1)


@triton.jit
def packed(values, j):
    """int64 [BLOCK_M, BLOCK_N] of float32 values and columns j; larger is better: NaN, greater values, then lower j."""
    bits = (values + 0.0).to(tl.int32, bitcast=True)  # -0 + 0 is 0
    bits = tl.where(values != values, 0x7FC00000, bits)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.to(tl.int64) << 32) | (-j.to(tl.int64) + LOW)[None, :]


@triton.jit
def value_of(best):
    """The float32 values of packed numbers; NaN where there is none yet."""
    ordered = (best >> 32).to(tl.int32)
    return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def topk_kernel(
    X, Y, ROW_NAMES, COLUMN_NAMES, BEST, N, M, SPAN, K,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SLOTS: tl.constexpr,
    IDS: tl.constexpr, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Finds the best of the columns [part * SPAN, (part + 1) * SPAN) for a block of rows."""
    i0 = tl.program_id(0) * BLOCK_M
    part = tl.program_id(1)
    i = i0 + tl.arange(0, BLOCK_M)
    is_row = i < N
    slot = tl.arange(0, SLOTS)
    names_i = load_names(ROW_NAMES, i, is_row, IDS)
    x = 0.0
    if BLOCK_K == D:
        x = load_rows(X, i0, 0, N, D, BLOCK_M, BLOCK_K, True, PRECISION, INTERPRETED)
    # Distinct numbers, so that a row's minimum is in exactly one slot. Slots beyond K are never the minimum.
    empty = tl.where(slot < K, slot.to(tl.int64) + EMPTY, FULL)
    best = tl.zeros([BLOCK_M, SLOTS], tl.int64) + empty[None, :]
    least = tl.min(best, 1)
    for j0 in range(part * SPAN, tl.minimum((part + 1) * SPAN, M), BLOCK_N):
        j = j0 + tl.arange(0, BLOCK_N)
        y = 0.0
        if BLOCK_K == D:
            y = load_rows(Y, j0, 0, M, D, BLOCK_N, BLOCK_K, True, PRECISION, INTERPRETED)
        dots = inner_products(X, Y, x, y, i0, j0, N, M, D, BLOCK_M, BLOCK_N, BLOCK_K, True, PRECISION, INTERPRETED)
        admissible = is_row[:, None] & (j < M)[None, :]
        if IDS:
            names_j = load_names(COLUMN_NAMES, j, j < M, IDS)
            admissible = admissible & ((names_i[:, None] != names_j[None, :]) | (names_i < 0)[:, None])
        # Most tiles have no better candidate. The float numbers say so, unless two are equal; NaN is the best.
        largest = tl.max(tl.where(admissible, tl.where(dots == dots, dots, INF), -INF), 1)
        if tl.max((~(largest < value_of(least))).to(tl.int32), 0) > 0:
            candidates = tl.where(admissible, packed(dots, j), EMPTY)
            first = tl.max(candidates, 1)
            while tl.max((first > least).to(tl.int32), 0) > 0:
                goes = (best == least[:, None]) & (first > least)[:, None]
                best = tl.where(goes, first[:, None], best)
                least = tl.min(best, 1)
                candidates = tl.where(candidates == first[:, None], EMPTY, candidates)
                first = tl.max(candidates, 1)
    places = (i.to(tl.int64)[:, None] * tl.num_programs(1) + part) * SLOTS + slot[None, :]
    best = tl.where((slot < K)[None, :], best, EMPTY)
    tl.store(BEST + places, best, mask=is_row[:, None])
