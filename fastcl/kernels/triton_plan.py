"""Tile shapes of the Triton kernels: a static table by architecture, dtype and dimension.

Compiler-chosen, unmeasured: each entry is a shape that compiles without spills and within the chip's shared memory
(`tests/test_triton_compiled.py`), the largest of those that were tried; none has been timed. `FASTCL_TRITON_AUTOTUNE=1`
measures a few shapes at the first call of each problem instead.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

WHOLE = 256  # rows of at most so many numbers are held whole by a tile; longer ones are streamed and split
KINDS = ("forward", "two_way", "weighted", "backward")
# 16-bit rows; any float32 products. Below sm_90 an entry of sm_80 is used, above sm_100 that of sm_100.
ARCHITECTURES = (80, 90, 100)


class Tile(NamedTuple):
    block_m: int
    block_n: int
    block_k: int  # of D, in the product of rows and columns
    block_d: int  # of D, in the product with the gradient's tile; 0 in the forward
    warps: int
    stages: int


def padded(d: int, interpreted: bool = False) -> int:
    """D as rows are stored for the kernels: the tile's width, or a multiple of the widths in which it is cut."""
    whole = 128 if interpreted else WHOLE
    if d <= whole:
        return max(16, 1 << (d - 1).bit_length())
    step = whole // 2
    return -(-d // step) * step


def tile(kind: str, architecture: int, dtype: torch.dtype, d: int, interpreted: bool = False) -> Tile:
    """The shape for a kind of kernel on rows of `d` numbers, a result of `padded`."""
    if interpreted:
        part = d if d <= 128 else 64
        return Tile(64, 64, part, part if kind in ("weighted", "backward") else 0, 4, 1)
    return _HALF[kind](d) if dtype.itemsize == 2 else _SINGLE[kind](d)


def finish_tile(d: int, interpreted: bool = False) -> Tile:
    """Of the kernel that reads and writes each row once: `block_m` rows, `block_d` numbers at a time."""
    return Tile(16, 0, 0, min(d & -d, 64 if interpreted else 128), 4, 1)


def _half_forward(d: int) -> Tile:
    return Tile(128, 128, d, 0, 8, 2) if d <= WHOLE else Tile(128, 128, 64, 0, 8, 3)


def _half_backward(d: int) -> Tile:
    if d <= 128:
        return Tile(128, 64, d, d, 8, 2)
    return Tile(64, 64, d, d, 8, 2) if d <= WHOLE else Tile(64, 64, 64, 128, 8, 2)


def _single_forward(d: int) -> Tile:
    return Tile(64, 64, d, 0, 8, 1) if d <= 64 else Tile(64, 64, 32, 0, 8, 2)


def _single_backward(d: int) -> Tile:
    return Tile(64, 32, d, d, 8, 1) if d <= 64 else Tile(64, 32, 32, 64, 8, 1)


_HALF = {"forward": _half_forward, "two_way": _half_forward, "weighted": _half_backward, "backward": _half_backward}
_SINGLE = {
    "forward": _single_forward,
    "two_way": _single_forward,
    "weighted": _single_backward,
    "backward": _single_backward,
}
