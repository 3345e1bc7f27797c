"""Shared by both GPU backends: what a forward keeps for its backward, and bounds of the logits."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from .records import Problem, largest_bias

Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]  # dtype and shape, by name


def sums_are_kept(p: Problem) -> bool:
    """Whether the forward keeps sums of contrasts times exponentials for each anchor, to save the backward a sweep."""
    plain = p.contrasts is not None and p.contrasts.bias is None and not p.ruled
    return p.anchors_only and plain and p.sizes[0] == 1 and not p.both


class Store(NamedTuple):
    """Several tensors, one after the other in one float32 tensor."""

    layout: Callable[[Problem], Layout]

    def size(self, p: Problem) -> int:
        """The length of the float32 tensor."""
        return sum(_places(*entry) for entry in self.layout(p).values())

    def parts(self, p: Problem, saved: Tensor) -> dict[str, Tensor]:
        """The tensors by name, as views of `saved` [size]."""
        parts, start, views = {}, 0, {saved.dtype: saved}
        for name, (dtype, shape) in self.layout(p).items():
            if dtype not in views:
                views[dtype] = saved.view(dtype)
            strides = [prod(shape[k + 1 :]) for k in range(len(shape))]
            offset = views[dtype].storage_offset() + start * saved.itemsize // dtype.itemsize
            parts[name] = views[dtype].as_strided(shape, strides, offset)
            start += _places(dtype, shape)
        return parts

    def planes(self, p: Problem, saved: Tensor) -> tuple[Tensor, Tensor]:
        """The bases of both sides' sums, which depend on the block of contrasts."""
        parts = self.parts(p, saved)
        bases = parts["bases"]
        return bases, parts["contrast_bases"] if p.both else bases[..., :0]


def plane_count(p: Problem) -> int:
    return 3


def logit_bounds(p: Problem) -> tuple[Tensor | None, Tensor | None]:
    """Bounds of |similarity| and |bias|, [1] each: the product of both sides' largest norms, and the largest |bias|.

    The first is None if both sides are normalised, the second without a bias.
    """

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
    """The float32 numbers that a tensor takes, rounded up to 16 bytes: Triton compiles another kernel for memory that
    is not aligned to them."""
    return -(-prod(shape) * (dtype.itemsize // 4) // 4) * 4
