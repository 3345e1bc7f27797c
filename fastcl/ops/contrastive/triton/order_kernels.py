"""Triton kernels that sort a few thousand rows by cluster, by comparing each with all: two launches.

PyTorch's sorts, and a search between them, take the host longer than these kernels take the device.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["N", "M", "SAME"])
def first_kernel(VALUES, KNOWN, LABELS, N, M, SAME, BLOCK: tl.constexpr):
    """LABELS [N] int32: for each of VALUES [N] the first place in KNOWN [M] that has it, else M. -1 equals nothing.

    SAME, 1 or 0: both are the same; an id of -1 then gets its own place.
    """
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_row = i < N
    ids = tl.load(VALUES + i, mask=is_row, other=-1)
    first = tl.zeros([BLOCK], tl.int32) + M
    for start in range(0, M, BLOCK):
        j = start + tl.arange(0, BLOCK)
        known = tl.load(KNOWN + j, mask=j < M, other=-1)
        first = tl.minimum(first, tl.min(tl.where(ids[:, None] == known[None, :], j[None, :], M), 1))
    none = tl.where(SAME != 0, i, M)
    tl.store(LABELS + i, tl.where(ids == -1, none, first), mask=is_row)


@triton.jit(do_not_specialize=["N"])
def order_kernel(LABELS, NUMBERS, ORDER, N, BLOCK: tl.constexpr):
    """LABELS [N] in ascending order: NUMBERS [N], and where each was: ORDER [N] int64. Equal ones keep their order."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_row = i < N
    label = tl.load(LABELS + i, mask=is_row, other=0)
    place = tl.zeros([BLOCK], tl.int32)
    for start in range(0, N, BLOCK):
        j = start + tl.arange(0, BLOCK)
        other = tl.load(LABELS + j, mask=j < N, other=2147483647)[None, :]
        before = (other < label[:, None]) | ((other == label[:, None]) & (j[None, :] < i[:, None]))
        place += tl.sum(before.to(tl.int32), 1)
    tl.store(NUMBERS + place, label, mask=is_row)
    tl.store(ORDER + place, i.to(tl.int64), mask=is_row)
