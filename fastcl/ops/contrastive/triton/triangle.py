"""Backend ``triton``: the forward of self-contrast that forms the logits of each two blocks of rows once.

The kernels are in `triangle_kernels.py`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from ...backends import triton_launch
from ...backends.triton_launch import INTERPRETED, architecture, blocks, programs
from ...backends.triton_tiles import Tile, square_tile, triangle_tile
from .rows import Launch

# With fewer rows, three launches more take as long as what they save.
FEWEST_ROWS = 1 << 14
# A program meets blocks at this many offsets, so that loading its own block hardly counts. More groups of offsets than
# these would make the partial sums of many rows longer, not shorter.
FEWEST_OFFSETS, MOST_GROUPS = 64, 8


class Division(NamedTuple):
    """How programs share the meetings of blocks: see `share_of_circle`."""

    programs: int
    groups: int  # of offsets
    held: int  # blocks that the meetings of one program belong to, at most
    width: int  # of a program's partial sums

    @classmethod
    def of(cls, n: int, block: int, most: int) -> Division:
        """Of at most so many programs. There must be two whole blocks."""
        full = n // block
        groups = max(1, min(MOST_GROUPS, most, full // 2 // FEWEST_OFFSETS))
        number = most // groups * groups
        span = blocks(full // 2, groups)
        meetings = blocks(full * span, number // groups)
        held = (meetings + span - 2) // span + 1
        return cls(number, groups, held, (2 * held + span) * block)


def compiles() -> bool:
    """Whether this version of Triton compiles the kernels without spills."""
    return INTERPRETED or not triton_launch.is_old()


def shape_of(rows: Launch) -> tuple[Tile, int] | None:
    """The tile and the number of programs on a multiprocessor; None if `statistics_kernel` does all tiles."""
    flags = rows.flags
    plain = flags["SELF"] and not flags["IDS"] and flags["BIAS"] == 0 and not rows.ruled
    if rows.size < FEWEST_ROWS or not plain or not compiles():
        return None
    values = rows.rows.rows
    found = triangle_tile(architecture(values.device), values.dtype, values.shape[1], INTERPRETED)
    return None if found is None or rows.size < 2 * found[0].block_n else found


def sweep(rows: Launch, scalars: dict[str, Any], statistics: Tensor, shape: Tile, at_once: int) -> None:
    """Fills in the statistics [7, n], where one shift keeps the sums in range."""
    n, block = rows.size, shape.block_n
    division = Division.of(n, block, at_once * programs(statistics.device))
    number = division.programs
    shared = scalars | {
        "PARTIAL_SUMS": statistics.new_zeros(number, division.width),
        "WIDTH": division.width,
        "GROUPS": division.groups,
        "HELD": division.held,
    }
    rows.run("triangle_kernel", shape, (number,), shared | {"AHEAD": shape.stages == 1})
    if left := n % block:
        rows.run("remainder_kernel", shape, (number, blocks(left, shape.block_m)), shared)
    square = square_tile(shape)
    arguments = scalars | {"STATISTICS": statistics, "MIXED_ONLY": True, "SPLIT": False}
    rows.run("statistics_kernel", square, rows.row_blocks(square), arguments)
    given = shared | {"ORDER": rows.rows.order, "TOTAL": statistics[1], "PROGRAMS": number, "N": n}
    given |= {"BLOCK_N": block, "BLOCK": shape.block_m}
    triton_launch.launch("triangle_total_kernel", shape, (blocks(n, shape.block_m),), given)
