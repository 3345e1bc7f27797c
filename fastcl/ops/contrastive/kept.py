"""What a forward keeps for its backward in one tensor: several, one behind the other."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from .records import Problem

Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]  # dtype and shape, by name


def sums_are_kept(p: Problem) -> bool:
    """Whether the forward leaves the anchors' weighted sums of contrasts, of which their gradient is made."""
    return p.anchors_only and p.contrasts is not None and p.contrast_bias is None and p.sizes[0] == 1 and not p.both


def layout_size(layout: Layout) -> int:
    """In numbers of float32."""
    return sum(_places(*entry) for entry in layout.values())


def by_name(layout: Layout, saved: Tensor) -> dict[str, Tensor]:
    """`saved` [layout_size], float32, taken apart."""
    parts, start = {}, 0
    for name, (dtype, shape) in layout.items():
        size = _places(dtype, shape)
        parts[name] = saved[start : start + size].view(dtype)[: prod(shape)].view(shape)
        start += size
    return parts


def _places(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    """Rounded up to 16 bytes: Triton compiles a kernel apart for memory that begins elsewhere."""
    return -(-prod(shape) * (dtype.itemsize // 4) // 4) * 4
