"""Tile shapes of the Triton kernels: a static table by kernel, architecture, dtype and dimension.

Chosen by compiling, not by timing: each entry is among the largest shapes that compile for its architecture without
spills and fit into its shared memory. `tests/backends/test_triton_compiled.py` compiles them all.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

WHOLE = 256  # a tile holds whole rows of at most this many numbers; longer rows are streamed, and their gradients split
LONG = 512  # on sm_90, 16-bit rows of so many numbers are held whole too, and their gradients split in two
KINDS = ("forward", "running", "two_way", "weighted", "backward")
# Kernels with rules about pairs, and the kernel whose shape each takes, with eight warps. The kernel that observes
# pairs without rules takes the shape of that with rules.
RULED = {"ruled_forward": "running", "ruled_observation": "running", "ruled_backward": "backward"}
# A device between two of these architectures uses the older one's shapes, a newer device the last one's.
ARCHITECTURES = (80, 90, 100)
OLD = (3, 6)  # Triton before this version keeps more numbers in registers, and has shapes of its own


class Tile(NamedTuple):
    block_m: int
    block_n: int
    block_k: int  # slice of D in the product of rows and columns
    block_d: int  # slice of D in the product of the gradient's tile with columns; D if there is no such product
    warps: int
    stages: int
    registers: int = 0  # the most per thread; 0: the compiler's choice, which spills some to run more programs at once

    @property
    def options(self) -> dict[str, int]:
        """The compiler's options."""
        options = {"num_warps": self.warps, "num_stages": self.stages}
        return options | ({"maxnreg": self.registers} if self.registers else {})


def padded(d: int, interpreted: bool = False) -> int:
    """The padded D of the kernels' rows: a power of two if a tile holds whole rows, else a multiple of the slice."""
    whole = WHOLE // 2 if interpreted else WHOLE
    if d <= whole:
        return max(32, 1 << (d - 1).bit_length())
    part = whole // 2
    return -(-d // part) * part


def tile(
    kind: str,
    architecture: int,
    dtype: torch.dtype,
    d: int,
    careful: bool = False,
    tf32: bool = False,
    interpreted: bool = False,
    split: bool = False,
    old: bool = False,
) -> Tile:
    """The shape for a kind of kernel on rows of `d` numbers, a result of `padded`.

    careful: whether there are sample ids or a bias, whose masks and loads need registers. tf32: whether float32 rows
    are multiplied as TF32. split: or as three products in TF32, which on sm_80 are for kernels that are not careful.
    old: whether Triton is older than `OLD`.
    """
    if kind in RULED:
        found = tile(RULED[kind], architecture, dtype, d, True, tf32, interpreted, split)
        return found if interpreted else _ruled(kind, found, architecture, dtype, d, tf32)
    sums = kind in ("weighted", "backward")
    if interpreted:
        part = d if d <= WHOLE // 2 else min(d & -d, 512)
        return Tile(64, 64, part, part if sums else d, 4, 1)
    known = max((a for a in ARCHITECTURES if a <= architecture), default=ARCHITECTURES[0])
    if dtype.itemsize > 2 and split:
        return _split(kind, known, d, careful)
    if dtype.itemsize > 2:
        return _single_sums(known, d, careful, tf32) if sums else _single(kind, known, d, careful)
    found = _half_sums(known, d, careful) if sums else _half(kind, known, d, careful)
    return _half_of_old(kind, found, d) if old and known == 90 and not careful else found


def triangle_tile(architecture: int, dtype: torch.dtype, d: int, interpreted: bool = False) -> tuple[Tile, int] | None:
    """The shape for the forward in which two blocks of rows meet once, and its programs on a multiprocessor.

    None where another is used: only on sm_90 does the machine code predict that a step takes a tenth less time.
    `block_n` rows stay with a program and `block_m` rows pass by, so `block_n` decides how often rows are read.
    """
    if d > WHOLE or d & (d - 1) or dtype.itemsize > 2:
        return None
    if interpreted:
        return Tile(32, 64, d, d, 4, 1), 1
    if not 90 <= architecture < 100:
        return None
    if d > 128:  # 128 rows and a second copy of the 64 would leave no room for two programs
        return Tile(64, 128, d, d, 4, 1), 2
    return Tile(64, 128, d, d, 4, 2 if d == 128 else 3, 168), 3


def square_tile(shape: Tile) -> Tile:
    """The shape for the tiles that the forward of `triangle_tile` leaves to another kernel."""
    return Tile(shape.block_n, shape.block_n, shape.block_k, shape.block_d, 8, 1)


def for_variant(shape: Tile, given: dict[str, Any], triton: tuple[int, ...]) -> Tile:
    """The shape for a kernel with these arguments, compiled by this version of Triton.

    Two exponentials of long rows would spill with more columns. Where float32 rows are multiplied as three products in
    TF32 and their gradient is the only sum, there are registers for more columns and a second stage.
    """
    if shape == SPLIT_SUMS and "GRADIENT" in given:
        alone = given.get("SIMILARITY_SUMS") is None and given.get("SUMS") is None
        return shape._replace(block_n=32, stages=2) if alone and triton >= OLD else shape  # 3.2 would spill
    if not (given.get("OWN") and given.get("OTHERS")) or given.get("ONE_EXPONENTIAL", 1):
        return shape
    if shape.block_k == LONG:
        return shape._replace(block_n=min(shape.block_n, 16))
    if triton < OLD and shape.block_k == WHOLE:
        return shape._replace(warps=8)
    return shape._replace(block_n=min(shape.block_n, 32)) if triton < OLD and shape.block_k == 128 else shape


def guide_width(dtype: torch.dtype) -> int:
    """How many of a guide row's numbers one step of its product takes."""
    return 64 if dtype.itemsize == 2 else 32


def neighbours(shape: Tile) -> list[Tile]:
    """Shapes to time against a shape of the table: rows, columns, warps and stages together, as the best shape of one
    need not be near that of another.

    They round logits in the same way: D is split in the same way, and they keep enough rows for the same multiply
    instruction. Warps have 16 rows or half as many each, as tensor cores take them.
    """
    rows = (64, 128) if shape.block_m >= 64 else (shape.block_m,)
    tried = [
        shape._replace(block_m=m, block_n=n, warps=warps, stages=stages, registers=registers)
        for m in rows
        for n in (shape.block_n // 2, shape.block_n, shape.block_n * 2)
        for warps in ((4, 8) if m < 128 else (8,))
        for stages in sorted({shape.stages, 2, 3})
        for registers in sorted({shape.registers, 0})
    ]
    return [tile for tile in dict.fromkeys(tried) if tile != shape and 16 <= tile.block_n <= 256]


def row_tile(d: int, interpreted: bool = False) -> Tile:
    """The shape for kernels that visit each row once: `block_m` rows, `block_d` of their numbers at a time."""
    return Tile(64 if interpreted else 16, 0, 0, min(d & -d, 512 if interpreted else 128), 4, 1)


def arranging_tile(architecture: int, dtype: torch.dtype, d: int, interpreted: bool = False) -> Tile:
    """The shape for the kernel that arranges rows."""
    shape = row_tile(d, interpreted)
    # Triton 3.6 would keep to 40 registers and spill.
    few = architecture >= 100 and dtype.itemsize == 2 and d > WHOLE and not interpreted
    return shape._replace(registers=64) if few else shape


# The shape for kernels that visit each row once and read a few numbers of each.
ROWS_AT_ONCE = Tile(1024, 0, 0, 0, 4, 1)
# The shape for kernels that compare each row with all.
COMPARED = Tile(64, 64, 0, 0, 4, 1)
# From sm_90 on, the shape for gradients of float32 rows as three products in TF32. It spills with more columns, or with
# two stages, which copy the next slice of the columns during a product, if there are sums besides the gradient.
SPLIT_SUMS = Tile(64, 16, 32, 128, 4, 1)


def _half(kind: str, architecture: int, d: int, careful: bool) -> Tile:
    if careful or (architecture == 80 and kind == "two_way" and d > WHOLE):
        return Tile(64, 32, min(d, 64), d, 4, 2)
    if d == LONG and architecture == 90:
        return Tile(128, 32, d, d, 8, 3)
    if d > WHOLE:
        columns = 128 if kind == "forward" and architecture == 90 else 64
        return Tile(128, columns, 64, d, 8, 2 if kind == "running" and architecture == 80 else 3)
    if architecture == 80 and kind != "two_way":
        return Tile(64, 64, d, d, 4, 2)
    if architecture == 90 and kind == "forward":  # two programs on a multiprocessor
        return Tile(128, 64, d, d, 8, 3, 128) if d <= 128 else Tile(128, 32, d, d, 8, 3)
    if architecture == 100 and kind == "forward" and d == 128:  # more rows would spill
        return Tile(64, 64, d, d, 4, 2)
    return Tile(128, 64, d, d, 8, 2)


def _half_of_old(kind: str, shape: Tile, d: int) -> Tile:
    """The same for an old Triton on sm_90."""
    if kind in ("forward", "two_way") and d <= 128:
        return shape._replace(block_n=32)
    if kind == "backward" and d == WHOLE:
        return shape._replace(block_n=16)
    return shape._replace(block_m=64) if kind in ("weighted", "backward") and d == LONG else shape


def _half_sums(architecture: int, d: int, careful: bool) -> Tile:
    if careful:
        return Tile(64, 32, min(d, 64), min(d, 128), 8, 1)
    if d == LONG and architecture == 90:
        return Tile(128, 32, d, 256, 8, 2)
    if d > WHOLE:
        return Tile(128, 32, 64, 128, 8, 2)
    if architecture == 90:  # two programs on a multiprocessor
        return Tile(64, 64 if d <= 128 else 32, d, d, 4, 3)
    return Tile(64, 64, d, d, 8, 2)


def _ruled(kind: str, shape: Tile, architecture: int, dtype: torch.dtype, d: int, tf32: bool) -> Tile:
    # Every tile is masked. Compiling showed which shapes spill: most with four warps, and most backwards with more than
    # 1024 pairs in a tile. From sm_90 on tensor cores take 64 rows at once.
    fits = architecture >= 100 and dtype.itemsize == 2 and d > 64  # with fewer columns it would spill
    if kind == "ruled_backward" and shape.block_m > 32 and not fits:
        shape = shape._replace(block_m=32) if architecture < 90 else shape._replace(block_n=16)
    four = kind != "ruled_backward" and architecture < 90 and dtype.itemsize > 2 and d == 64 and not tf32
    if kind == "ruled_observation" and four:
        shape = shape._replace(stages=1, registers=255)  # left to itself, Triton 3.6 would keep to 168 and spill
    return shape._replace(warps=4 if four else 8)


def _single(kind: str, architecture: int, d: int, careful: bool) -> Tile:
    # Compiling showed which shapes spill with four warps and which with eight.
    if careful:
        eight = d > 64 or (architecture == 80 if kind == "two_way" else d == 64)
    else:
        eight = d > 64 and kind == "running" and architecture == 80
    stages = 1 if d == 64 and kind == "running" and architecture == 80 and not careful else 2
    return Tile(64 if d > 64 else 32, 32, min(d, 32), d, 8 if eight else 4, stages)


def _single_sums(architecture: int, d: int, careful: bool, tf32: bool) -> Tile:
    # The number of rows decides which tensor-core instruction multiplies; logits must round as in `_single`.
    rows = 64 if tf32 and d > 64 and architecture > 80 else 32
    stages = 2 if rows == 64 and architecture == 100 else 1
    return Tile(rows, 32, min(d, 32), min(d, 64), 8 if d > (64 if careful and not tf32 else 32) else 4, stages)


def _split(kind: str, architecture: int, d: int, careful: bool) -> Tile:
    if architecture == 80:  # more columns would spill: mma.sync takes its operands from registers
        if kind == "backward" and d == 128:
            return Tile(64, 16, 32, d, 8, 1)
        return Tile(64, 32, 32, min(d, 128), 8, 1) if kind in ("weighted", "backward") else Tile(64, 32, 32, d, 4, 2)
    if kind == "backward" and not careful and d >= SPLIT_SUMS.block_d:
        return SPLIT_SUMS
    if kind in ("weighted", "backward"):
        if kind == "backward" and careful and d == 32 and architecture == 100:
            return Tile(64, 32, 32, d, 8, 1, 240)  # left to itself, Triton 3.6 would keep to 128 registers and spill
        return Tile(64, 32, 32, min(d, 64 if careful else 128), 4, 1)
    return Tile(
        64, 64 if kind == "forward" and not careful else 32, 32, d, 8 if kind == "two_way" and careful else 4, 2
    )
