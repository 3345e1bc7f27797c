"""The largest inner products, the specification in code: computes all products at once and sorts them."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends.rows import accumulation_dtype


def topk(
    queries: Tensor, keys: Tensor, k: int, query_ids: Tensor | None, key_ids: Tensor | None
) -> tuple[Tensor, Tensor]:
    dtype = accumulation_dtype(queries, keys)
    similarity = queries.to(dtype) @ keys.to(dtype).T
    return largest(similarity, torch.arange(keys.shape[0], device=keys.device), k, equal(query_ids, key_ids))


def equal(left: Tensor | None, right: Tensor | None) -> Tensor | None:
    """Bool [N, M], True for inadmissible pairs; None if there are no ids."""
    if left is None or right is None:
        return None
    return (left[:, None] == right) & (left != -1)[:, None]


def largest(values: Tensor, indices: Tensor, k: int, inadmissible: Tensor | None) -> tuple[Tensor, Tensor]:
    """The k best of values [N, M] in order, with their entries of `indices` [M] or [N, M]. Ties keep their order.

    An inadmissible place gives (-inf, -1) and comes after all admissible ones, even those of -inf.
    """
    indices = indices.expand(values.shape)
    if inadmissible is not None:
        values, indices = values.masked_fill(inadmissible, -torch.inf), indices.masked_fill(inadmissible, -1)
        first = torch.sort((indices == -1).to(torch.uint8), dim=1, stable=True).indices
        values, indices = values.gather(1, first), indices.gather(1, first)
    values, order = torch.sort(values, dim=1, descending=True, stable=True)
    return values[:, :k].contiguous(), indices.gather(1, order[:, :k])
