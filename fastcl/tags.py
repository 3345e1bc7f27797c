"""Tags in place of clusters: a bool matrix, of which rows that share a column are positives."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .checks import check_device, check_tensor, values_visible

WORD = 64  # tags in a number


def are_tags(clusters: Any) -> bool:
    return isinstance(clusters, Tensor) and clusters.dtype == torch.bool and clusters.dim() == 2


def check_tags(name: str, value: Any, count: int, device: torch.device, width: int | None = None) -> None:
    """Expects a bool tensor [count, T], with T = `width` if that is given."""
    check_tensor(name, value)
    if value.dtype != torch.bool:
        raise TypeError(f"{name}: expected a bool tensor of tags, got {value.dtype}")
    if value.dim() != 2 or len(value) != count or value.shape[1] != (value.shape[1] if width is None else width):
        expected = f"[{count}, {'T' if width is None else width}]"
        raise ValueError(f"{name}: expected shape {expected}, got {list(value.shape)}")
    check_device(name, value, device)


def packed(tags: Tensor) -> Tensor:
    """Bool [N, T] -> int64 [N, W], 64 tags to a number, at least one."""
    n, count = tags.shape
    words = words_for(count)
    bits = torch.nn.functional.pad(tags, (0, words * WORD - count)).view(n, words * 8, 8)
    weights = torch.tensor([1 << k for k in range(8)], dtype=torch.uint8, device=tags.device)
    return (bits * weights).sum(-1, dtype=torch.uint8).view(torch.int64)


def unpacked(words: Tensor, count: int) -> Tensor:
    """The inverse of `packed`, for `count` tags: int64 [N, W] -> bool [N, count]."""
    weights = torch.tensor([1 << k for k in range(8)], dtype=torch.uint8, device=words.device)
    return (words.contiguous().view(torch.uint8)[:, :, None] & weights).flatten(1)[:, :count] != 0


def words_for(count: int) -> int:
    """How many numbers hold `count` tags."""
    return max(1, -(-count // WORD))


def shared_tags(own: Tensor, other: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The columns of tags that two rows of the call share: others make no positives. Elsewhere than on the CPU all of
    them, as their number would be read from the device."""
    if not values_visible(own):
        return own, other
    kept = own.sum(0) > 1 if other is None else own.any(0) & other.any(0)
    return own[:, kept], None if other is None else other[:, kept]


def shared_words(own: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """As `shared_tags`, of packed tags [N, W] and [M, W]: the words in which both sets have a tag."""
    if not values_visible(own):
        return own, other
    kept = (own != 0).any(0) & (other != 0).any(0)
    kept[:1] |= not bool(kept.any())  # there is at least one word
    return own[:, kept], other[:, kept]
