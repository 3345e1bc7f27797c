"""Backend ``triton``: the forward of self-contrast that forms the logits of each two blocks of rows once.

The kernels are in `triangle_kernels.py`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...backends import triton_launch
from ...backends.triton_launch import INTERPRETED, architecture, blocks, programs
from ...backends.triton_tiles import Tile, square_tile, triangle_tile
from .rows import Launch

# With fewer rows, three launches more would take longer than what they save.
FEWEST_ROWS = 1 << 14

# A program meets blocks at this many offsets at least: then loading its own block does not matter.
FEWEST_OFFSETS = 64
# More groups of offsets would make the partial sums of many rows longer, not shorter.
MOST_GROUPS = 8


def shape_of(rows: Launch) -> tuple[Tile, int] | None:
    """The tile and the number of programs on a multiprocessor; None if `statistics_kernel` does all tiles."""
    flags = rows.flags
    if rows.size < FEWEST_ROWS or not flags["SELF"] or flags["IDS"] or flags["BIAS"] != 0 or rows.ruled:
        return None
    values = rows.rows.rows
    return triangle_tile(architecture(values.device), values.dtype, values.shape[1], INTERPRETED)


def sweep(rows: Launch, scalars: dict[str, Any], statistics: Tensor, shape: Tile, at_once: int) -> None:
    """Fills in the statistics [7, n], where one shift keeps the sums in range."""
    block, n = shape.block_n, rows.size
    full = n // block
    number = at_once * programs(statistics.device)
    groups = max(1, min(MOST_GROUPS, number, full // 2 // FEWEST_OFFSETS))
    number -= number % groups
    span = blocks(full // 2, groups)
    most = blocks(full * span, number // groups)  # meetings of a program
    held = (most + span - 2) // span + 1  # the most blocks that they belong to
    width = (2 * held + span) * block
    sums = statistics.new_zeros(number, width)
    shared: dict[str, Any] = {"PARTIAL_SUMS": sums, "WIDTH": width, "GROUPS": groups, "HELD": held}
    rows.run("triangle_kernel", shape, (number,), scalars | shared)
    if left := n % block:
        rows.run("remainder_kernel", shape, (number, blocks(left, shape.block_m)), scalars | shared)
    square = square_tile(shape)
    arguments = scalars | {"STATISTICS": statistics, "MIXED_ONLY": True, "SPLIT": False}
    rows.run("statistics_kernel", square, rows.row_blocks(square), arguments)
    given = scalars | shared | {"ORDER": rows.rows.order, "TOTAL": statistics[1], "PROGRAMS": number, "N": n}
    given |= {"BLOCK_N": block, "BLOCK": min(block, 64)}
    triton_launch.launch("triangle_total_kernel", shape, (blocks(n, min(block, 64)),), given)
