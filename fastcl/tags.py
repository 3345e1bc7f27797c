"""Tags in place of clusters: a bool matrix, of which rows that share a column are positives."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .checks import check_device, check_tensor, values_visible

WORD = 64  # tags in a number


def are_tags(clusters: Any) -> bool:
    return isinstance(clusters, Tensor) and clusters.dtype == torch.bool and clusters.dim() == 2


def check_tags(name: str, value: Any, count: int, device: torch.device, like: Tensor | None = None) -> None:
    """Expects a bool tensor [count, T], with T of `like`."""
    check_tensor(name, value)
    if value.dtype != torch.bool:
        raise TypeError(f"{name}: expected a bool tensor of tags, as clusters, got {value.dtype}")
    shape = [count, "T" if like is None else like.shape[1]]
    if value.dim() != 2 or len(value) != count or (like is not None and value.shape[1] != like.shape[1]):
        raise ValueError(f"{name}: expected shape {shape}, got {list(value.shape)}".replace("'", ""))
    check_device(name, value, device)


def packed(tags: Tensor) -> Tensor:
    """Bool [N, T] -> int64 [N, W], 64 tags to a number, at least one."""
    n, count = tags.shape
    words = max(1, -(-count // WORD))
    bits = torch.nn.functional.pad(tags, (0, words * WORD - count)).view(n, words * 8, 8)
    weights = torch.tensor([1 << k for k in range(8)], dtype=torch.uint8, device=tags.device)
    return (bits * weights).sum(-1, dtype=torch.uint8).view(torch.int64)


def shared_tags(own: Tensor, other: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The columns of tags that two rows of the call share: others make no positives. Elsewhere than on the CPU all of
    them, as their number would be read from the device."""
    if not values_visible(own):
        return own, other
    kept = own.sum(0) > 1 if other is None else own.any(0) & other.any(0)
    return own[:, kept], None if other is None else other[:, kept]
