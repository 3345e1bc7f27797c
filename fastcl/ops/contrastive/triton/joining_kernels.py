"""Triton kernels around the sweeps: bounds of the logits, sums of the programs of a sweep, the scale's gradient."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def largest(LENGTHS, size, BLOCK: tl.constexpr):
    """The largest of LENGTHS [size]; NaN if one is."""
    found = tl.zeros([BLOCK], tl.float32)
    for start in range(0, size, BLOCK):
        i = start + tl.arange(0, BLOCK)
        x = tl.load(LENGTHS + i, mask=i < size, other=0.0)
        found = tl.where((x != x) | (found != found), float("nan"), tl.maximum(found, x))
    nan = tl.max((found != found).to(tl.int32), 0)
    return tl.where(nan != 0, float("nan"), tl.max(tl.where(found == found, found, 0.0), 0))


@triton.jit(do_not_specialize=["N", "M"])
def longest_kernel(LENGTHS, OTHER_LENGTHS, LONGEST, N, M, BLOCK: tl.constexpr):
    """LONGEST []: the product of both sets' largest norms, of LENGTHS [N] and OTHER_LENGTHS [M]; None: 1.

    One program.
    """
    product = tl.full([], 1.0, tl.float32)
    if LENGTHS is not None:
        product *= largest(LENGTHS, N, BLOCK)
    if OTHER_LENGTHS is not None:
        product *= largest(OTHER_LENGTHS, M, BLOCK)
    tl.store(LONGEST, product)


@triton.jit(do_not_specialize=["N", "COUNT"], do_not_specialize_on_alignment=["TOTAL"])
def total_kernel(SUMS, ORDER, TOTAL, N, COUNT, BLOCK: tl.constexpr):
    """TOTAL [N]: SUMS [COUNT, N] added in order, each at its place in ORDER [N], if there is one."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_row = i < N
    total = tl.zeros([BLOCK], tl.float32)
    at = SUMS + i
    for _ in range(0, COUNT):
        total += tl.load(at, mask=is_row, other=0.0)
        at += N
    place = i.to(tl.int64)
    if ORDER is not None:
        place = tl.load(ORDER + i, mask=is_row, other=0)
    tl.store(TOTAL + place, total, mask=is_row)


@triton.jit(do_not_specialize=["N"], do_not_specialize_on_alignment=["LIFT"])
def scale_kernel(SIMILARITY_SUMS, LIFT, GRADIENT, N, HALF: tl.constexpr, BLOCK: tl.constexpr):
    """GRADIENT [1], of the logit scale: the sum of SIMILARITY_SUMS [N] over LIFT [1], HALF of it. One program."""
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, N, BLOCK):
        i = start + tl.arange(0, BLOCK)
        total += tl.load(SIMILARITY_SUMS + i, mask=i < N, other=0.0)
    gradient = tl.sum(total, 0) / tl.load(LIFT)
    if HALF:
        gradient = gradient / 2.0
    tl.store(GRADIENT, gradient)
