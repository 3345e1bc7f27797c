"""The largest inner products on backend ``cuda``: a kernel over row blocks and parts of the keys, then a merge.

Rows have any strides. If all rows have the same 16-bit dtype, they are multiplied on tensor cores, otherwise in
float32. Not yet measured on a GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import cuda_runtime
from ..backends.ids import places_of_ids
from ..backends.native import address, describe_rows
from . import chunked

LEAST = 16  # smallest number of slots for a query's best keys
ROWS, TILE = 64, 64  # queries of a block, as a rule; keys of a tile
WAVES = 4  # blocks per multiprocessor
TILES = 16  # smallest number of tiles per block


def topk(
    queries: Tensor, keys: Tensor, k: int, query_ids: Tensor | None, key_ids: Tensor | None
) -> tuple[Tensor, Tensor]:
    (n, d), m = queries.shape, keys.shape[0]
    where = cuda_runtime.where(queries.device)
    slots = max(LEAST, 1 << (k - 1).bit_length())
    blocks = WAVES * cuda_runtime.kernels().processors(where[0])
    parts = max(1, min(blocks // max(-(-n // ROWS), 1), -(-m // (TILES * TILE))))
    span = -(-m // parts)
    parts = -(-m // span)
    best = torch.empty((n, parts, slots), dtype=torch.int64, device=queries.device)
    queries, keys = queries.resolve_neg(), keys.resolve_neg()
    names = places_of_ids(query_ids, key_ids)
    if n:
        call = (
            *(*describe_rows(queries), *describe_rows(keys), d),
            *map(address, names),
            *(slots, span, parts, best.data_ptr()),
        )
        cuda_runtime.run("topk", queries.device, call)
    return chunked.unpacked(torch.topk(best.flatten(1), k).values)
