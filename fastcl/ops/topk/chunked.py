"""The largest inner products in plain PyTorch, on any device; stores one block of queries and keys at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends.rows import CPU_BLOCK, FEWEST_ROWS, GPU_BLOCK, accumulation_dtype
from .reference import equal, largest

NOTHING = torch.iinfo(torch.int64).min  # an inadmissible place, packed: smaller than every admissible one
_LOW = (1 << 32) - 1
KEYS = 1 << 14  # smallest number of keys of a block


def topk(
    queries: Tensor, keys: Tensor, k: int, query_ids: Tensor | None, key_ids: Tensor | None
) -> tuple[Tensor, Tensor]:
    n, m, dtype = queries.shape[0], keys.shape[0], accumulation_dtype(queries, keys)
    width = min(m, max(KEYS, 4 * k))
    block = CPU_BLOCK if queries.device.type == "cpu" else GPU_BLOCK
    height = max(block // max(width, 1), FEWEST_ROWS)
    values = torch.empty((n, k), dtype=dtype, device=queries.device)
    indices = torch.empty((n, k), dtype=torch.int64, device=queries.device)
    for row in range(0, n, height):
        rows = slice(row, row + height)
        x, ids = queries[rows].to(dtype), None if query_ids is None else query_ids[rows]
        best: tuple[Tensor, ...] | None = None
        for column in range(0, m, width):
            columns = slice(column, min(column + width, m))
            similarity = x @ keys[columns].to(dtype).T
            places = torch.arange(column, columns.stop, device=keys.device)
            outside = equal(ids, None if key_ids is None else key_ids[columns])
            best = _better(best, similarity, places, k, outside)
        assert best is not None
        values[rows], indices[rows] = best if len(best) == 2 else unpacked(best[0])
    return values, indices


def _better(
    best: tuple[Tensor, ...] | None, similarity: Tensor, places: Tensor, k: int, outside: Tensor | None
) -> tuple[Tensor, ...]:
    """The k best of `best` and of a block of later keys: a packed tensor, or for float64 (values, indices)."""
    if similarity.dtype != torch.float64:
        block = _packed_best(similarity, places, k, outside)
        if best is not None:
            block = torch.cat((best[0], block), dim=1)
        return (torch.topk(block, min(k, block.shape[1])).values,)
    places = places.expand(similarity.shape)
    if outside is not None:
        similarity, places = similarity.masked_fill(outside, -torch.inf), places.masked_fill(outside, -1)
    if best is not None:
        similarity, places = torch.cat((best[0], similarity), dim=1), torch.cat((best[1], places), dim=1)
    return largest(similarity, places, k, None if outside is None else places == -1)


def _packed_best(similarity: Tensor, places: Tensor, k: int, outside: Tensor | None) -> Tensor:
    """At most k packed places [B, k] of a block [B, C].

    torch.topk is ten times faster on floats than on packed numbers, but breaks ties arbitrarily. If the last selected
    value equals the first one that is not selected, the row is searched again by packed numbers.
    """

    def exactly(rows: Tensor | slice) -> Tensor:
        block = packed(similarity[rows], places)
        if outside is not None:
            block.masked_fill_(outside[rows], NOTHING)
        return torch.topk(block, min(k, block.shape[1])).values

    if similarity.shape[1] <= k:
        return exactly(slice(None))
    values, order = torch.topk(
        similarity if outside is None else similarity.masked_fill(outside, -torch.inf), k + 1, sorted=True
    )
    block = packed(values[:, :k], places[order[:, :k]])
    if outside is not None:
        block.masked_fill_(outside.gather(1, order[:, :k]), NOTHING)
    tied = (~(values[:, k - 1] > values[:, k])).nonzero()[:, 0]  # or a NaN
    if len(tied):
        block[tied] = exactly(tied)
    return block


def packed(values: Tensor, places: Tensor) -> Tensor:
    """int64 in the order of results: larger float32 values are larger, NaN largest; among equals the lower place.

    Places are below 2^32.
    """
    bits = torch.where(values.isnan(), torch.nan, values + 0.0).view(torch.int32)  # -0 + 0 is 0
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.to(torch.int64) << 32) | (_LOW - places)


def unpacked(both: Tensor) -> tuple[Tensor, Tensor]:
    """(values, places) of packed numbers; (-inf, -1) for NOTHING and all numbers below those of float32 values."""
    ordered = (both >> 32).to(torch.int32)
    nothing = ordered == torch.iinfo(torch.int32).min
    values = (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).view(torch.float32)
    return values.masked_fill(nothing, -torch.inf), (_LOW - (both & _LOW)).masked_fill(nothing, -1)
