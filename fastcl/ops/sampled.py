"""The operator of inner products with sampled rows: gathered and multiplied a block at a time.

[N, S, D] of gathered rows would be D times what comes of them. Plain PyTorch on every device, with a derivative of its
own, whose derivative raises; opaque to torch.compile as the other operators are.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .backends.rows import CPU_BLOCK, GPU_BLOCK, accumulation_dtype
from .library import LIBRARY, register, without_autocast

LIBRARY.define("sampled_fwd(Tensor queries, Tensor keys, Tensor indices) -> Tensor")
LIBRARY.define(
    "sampled_bwd(Tensor queries, Tensor keys, Tensor indices, Tensor grad, bool[] needs) "
    "-> (Tensor queries, Tensor keys)"
)
forward_op = torch.ops.fastcl.sampled_fwd
backward_op = torch.ops.fastcl.sampled_bwd


def _blocks(indices: Tensor, d: int) -> Iterator[tuple[slice, slice]]:
    """Of queries and of their samples: as many as make up a block of gathered numbers."""
    n, s = indices.shape
    block = CPU_BLOCK if indices.device.type == "cpu" else GPU_BLOCK
    columns = max(1, min(s, block // d))
    rows = max(1, block // (columns * d))
    for i in range(0, n, rows):
        for j in range(0, s, columns):
            yield slice(i, i + rows), slice(j, j + columns)


def _forward(queries: Tensor, keys: Tensor, indices: Tensor) -> Tensor:
    dtype = accumulation_dtype(queries, keys)
    x = queries.to(dtype)
    result = torch.empty(indices.shape, dtype=dtype, device=indices.device)
    with without_autocast(queries.device):
        for rows, columns in _blocks(indices, keys.shape[1]):
            gathered = keys[indices[rows, columns]].to(dtype)
            result[rows, columns] = torch.bmm(gathered, x[rows, :, None])[..., 0]
    return result


def _backward(queries: Tensor, keys: Tensor, indices: Tensor, grad: Tensor, needs: list[bool]) -> tuple[Tensor, Tensor]:
    dtype = accumulation_dtype(queries, keys)
    x = queries.to(dtype)
    dx = torch.zeros_like(x) if needs[0] else x.new_empty(0)
    dy = torch.zeros(keys.shape, dtype=dtype, device=keys.device) if needs[1] else x.new_empty(0)
    with without_autocast(queries.device):
        for rows, columns in _blocks(indices, keys.shape[1]):
            chosen, g = indices[rows, columns], grad[rows, columns]
            if needs[0]:
                dx[rows] += torch.bmm(g[:, None], keys[chosen].to(dtype))[:, 0]
            if needs[1]:
                dy.index_add_(0, chosen.flatten(), (g[..., None] * x[rows, None]).flatten(0, 1))
    return dx.to(queries.dtype) if needs[0] else dx, dy.to(keys.dtype) if needs[1] else dy


def _forward_fake(queries: Tensor, keys: Tensor, indices: Tensor) -> Tensor:
    return queries.new_empty(indices.shape, dtype=accumulation_dtype(queries, keys))


def _backward_fake(
    queries: Tensor, keys: Tensor, indices: Tensor, grad: Tensor, needs: list[bool]
) -> tuple[Tensor, Tensor]:
    dx, dy = (
        rows.new_empty(rows.shape) if need else grad.new_empty(0)
        for rows, need in zip((queries, keys), needs, strict=True)
    )
    return dx, dy


class _Sampled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            result: Tensor = forward_op(*args)
        ctx.save_for_backward(*args)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        needs = list(ctx.needs_input_grad[:2])
        gradients = backward_op(*ctx.saved_tensors, grad.contiguous(), needs)
        return *(gradient if need else None for gradient, need in zip(gradients, needs, strict=True)), None


register("sampled", _Sampled, (_forward, _forward_fake), (_backward, _backward_fake), "sampled_similarity")
