"""The largest inner products on backend ``triton``: a kernel over row blocks and parts of the columns, then a merge."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import triton_launch
from ..backends.ids import places_of_ids
from ..backends.triton_launch import INTERPRETED, architecture, blocks, on_device, precision_of, programs
from ..backends.triton_tiles import WHOLE, Tile, padded
from . import chunked

WAVES = 4  # programs per multiprocessor
TILES = 16  # smallest number of tiles of columns per program


def shape(architecture: int, dtype: torch.dtype, d: int, slots: int, interpreted: bool = False) -> Tile:
    """The tile, chosen by compiling and not yet timed: no spills on any architecture of `triton_tiles`."""
    if interpreted:
        return Tile(32, 64, d if d <= 128 else d & -d, d, 4, 1)
    few = slots <= 64
    if dtype.itemsize > 2:
        return Tile(32 if few else 16, 32, min(d, 32), d, 4, 2)
    if few and architecture == 90 and d == WHOLE:
        return Tile(128, 64, d, d, 8, 3)
    if few:
        return Tile(64, 128, d if d <= 128 else 64, d, 8, 2)
    return Tile(16, 32 if architecture == 100 and d > WHOLE else 64, d if d <= 128 else 64, d, 8, 2)


def topk(
    queries: Tensor, keys: Tensor, k: int, query_ids: Tensor | None, key_ids: Tensor | None
) -> tuple[Tensor, Tensor]:
    (n, d), m = queries.shape, keys.shape[0]
    device, dtype = queries.device, torch.promote_types(queries.dtype, keys.dtype)
    width = padded(d, INTERPRETED)
    slots = max(16, 1 << (k - 1).bit_length())
    tile = shape(architecture(device), dtype, width, slots, INTERPRETED)
    rows = blocks(n, tile.block_m)
    parts = max(1, min(WAVES * programs(device) // max(rows, 1), blocks(m, TILES * tile.block_n)))
    span = blocks(blocks(m, parts), tile.block_n) * tile.block_n
    parts = blocks(m, span)
    best = torch.empty((n, parts, slots), dtype=torch.int64, device=device)
    row_names, column_names = places_of_ids(query_ids, key_ids)
    arguments = {
        "X": _packed(queries, dtype, width),
        "Y": _packed(keys, dtype, width),
        "ROW_NAMES": row_names,
        "COLUMN_NAMES": column_names,
        "BEST": best,
        "N": n,
        "M": m,
        "SPAN": span,
        "K": k,
        "D": width,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "SLOTS": slots,
        "IDS": row_names is not None,
        "PRECISION": precision_of(dtype),
        "INTERPRETED": INTERPRETED,
    }
    if n:
        with on_device(device):
            triton_launch.launch("topk_kernel", tile, (rows, parts), arguments)
    return chunked.unpacked(torch.topk(best.flatten(1), k).values)


def _packed(rows: Tensor, dtype: torch.dtype, width: int) -> Tensor:
    """Rows as contiguous [n, width], padded with zeros."""
    rows = rows.resolve_neg().to(dtype)
    if width == rows.shape[1]:
        return rows.contiguous()
    result = rows.new_zeros(rows.shape[0], width)
    result[:, : rows.shape[1]] = rows
    return result
