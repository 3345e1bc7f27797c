"""What the wrappers of both GPU backends share: what a forward keeps for its backward, and what bounds the logits."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from .records import Problem, largest_bias

Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]  # dtype and shape, by name


def sums_are_kept(p: Problem) -> bool:
    """Whether the forward leaves the anchors' weighted sums of contrasts, of which their gradient is made."""
    return p.anchors_only and p.contrasts is not None and p.contrasts.bias is None and p.sizes[0] == 1 and not p.both


class Store(NamedTuple):
    """Several tensors in one, float32, one behind the other."""

    layout: Callable[[Problem], Layout]

    def size(self, p: Problem) -> int:
        """In numbers of float32."""
        return sum(_places(*entry) for entry in self.layout(p).values())

    def parts(self, p: Problem, saved: Tensor) -> dict[str, Tensor]:
        """`saved` [size], taken apart."""
        parts, start = {}, 0
        for name, (dtype, shape) in self.layout(p).items():
            size = _places(dtype, shape)
            parts[name] = saved[start : start + size].view(dtype)[: prod(shape)].view(shape)
            start += size
        return parts

    def planes(self, p: Problem, saved: Tensor) -> tuple[Tensor, Tensor]:
        """The bases of the sums, of both sides: they hold for a block of contrasts only, until blocks are merged."""
        parts = self.parts(p, saved)
        bases = parts["bases"]
        return bases, parts["contrast_bases"] if p.both else bases[..., :0]


def plane_count(p: Problem) -> int:
    return 3


def logit_bounds(p: Problem) -> tuple[Tensor | None, Tensor | None]:
    """What bounds the logits, besides the scale: the product of both sides' longest rows, and the largest bias."""

    def longest(rows: Tensor, normalized: bool) -> Tensor | None:
        return None if normalized else torch.linalg.vector_norm(rows, dim=1, dtype=torch.float32).amax().reshape(1)

    product = longest(p.anchors.values, p.anchors.normalize)
    if p.contrasts is not None:
        other = longest(p.contrasts.values, p.contrasts.normalize)
        product = other if product is None else product if other is None else product * other
    elif product is not None:
        product = product * product
    return product, None if p.others.bias is None else largest_bias(p.others.bias)


def _places(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    """Rounded up to 16 bytes: Triton compiles a kernel apart for memory that begins elsewhere."""
    return -(-prod(shape) * (dtype.itemsize // 4) // 4) * 4
