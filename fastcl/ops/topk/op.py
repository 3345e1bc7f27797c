"""The operator of the largest inner products: schema, shape for tracing, and the table of backends.

It has no derivative; its rows are stored or detached.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from ..backends.choose import choose_backend, for_neighbours
from ..backends.rows import accumulation_dtype
from ..library import LIBRARY, without_autocast
from . import chunked, cpu, cuda, reference, triton


class Search(Protocol):
    """The k best keys [M, D] of each query [N, D]: (values [N, k], int64 indices [N, k]).

    Ids are int64 [N] and [M], both or neither; -1 means none.
    """

    def __call__(
        self, queries: Tensor, keys: Tensor, k: int, query_ids: Tensor | None, key_ids: Tensor | None
    ) -> tuple[Tensor, Tensor]: ...


SEARCHES: dict[str, Search] = {
    "reference": reference.topk,
    "chunked": chunked.topk,
    "cpu": cpu.topk,
    "triton": triton.topk,
    "cuda": cuda.topk,
}

LIBRARY.define(
    "topk(Tensor queries, Tensor keys, int k, Tensor? query_ids, Tensor? key_ids, str backend) "
    "-> (Tensor values, Tensor indices)"
)
_op = torch.ops.fastcl.topk


def _impl(queries: Tensor, keys: Tensor, k: int, *others: Any) -> tuple[Tensor, Tensor]:
    *ids, backend = others
    with without_autocast(queries.device):
        return SEARCHES[backend](queries, keys, k, *ids)


def _fake(queries: Tensor, keys: Tensor, k: int, *others: Any) -> tuple[Tensor, Tensor]:
    shape, dtype = (queries.shape[0], k), accumulation_dtype(queries, keys)
    return queries.new_empty(shape, dtype=dtype), queries.new_empty(shape, dtype=torch.int64)


LIBRARY.impl("topk", _impl, "CompositeExplicitAutograd")
torch.library.register_fake("fastcl::topk", _fake, lib=LIBRARY)


def topk(
    queries: Tensor, keys: Tensor, k: int, query_ids: Tensor | None, key_ids: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Runs the operator; the arguments are those of `Search`, already checked."""
    backend = for_neighbours(choose_backend(queries.device, accumulation_dtype(queries, keys), "topk"), k)
    values, indices = _op(queries.detach(), keys.detach(), k, query_ids, key_ids, backend)
    return values, indices
