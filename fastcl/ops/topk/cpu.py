"""The largest inner products on backend ``cpu``: the C++ engines, called with addresses of tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import native
from ..backends.rows import accumulation_dtype

_SMALL = torch.iinfo(torch.int32)


def topk(
    queries: Tensor, keys: Tensor, k: int, query_ids: Tensor | None, key_ids: Tensor | None
) -> tuple[Tensor, Tensor]:
    (n, d), m, dtype = queries.shape, keys.shape[0], accumulation_dtype(queries, keys)
    values = torch.empty((n, k), dtype=dtype, device="cpu")
    indices = torch.empty((n, k), dtype=torch.int64, device="cpu")
    if n == 0:
        return values, indices
    queries, keys = queries.resolve_neg(), keys.resolve_neg()
    names = _names(query_ids, key_ids)
    call = native.native_module().topk(
        native.engine()[0],
        (
            *native.describe_rows(queries),
            *native.describe_rows(keys),
            d,
            k,
            *(native.address(part) for part in names),
            dtype == torch.float64,
            native.threads(n * m * d, native.PRODUCTS),
            values.data_ptr(),
            indices.data_ptr(),
        ),
    )
    native.run(call)
    return values, indices


def _names(query_ids: Tensor | None, key_ids: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """The ids as int32, the width of a lane. A query without an id gets a name that no key has."""
    if query_ids is None or key_ids is None or len(key_ids) == 0:
        return None, None
    query_ids = torch.where(query_ids == -1, -2, query_ids)
    if max(int(query_ids.max()), int(key_ids.max())) > _SMALL.max:
        known, names = torch.unique(key_ids, return_inverse=True)
        place = torch.searchsorted(known, query_ids).clamp(max=len(known) - 1)
        query_ids, key_ids = torch.where(known[place] == query_ids, place, -2), names
    return query_ids.to(torch.int32).contiguous(), key_ids.to(torch.int32).contiguous()
