"""Products of rows in the dtype of their arguments, also under autocast, in the forward and in the backward.

`a @ b` obeys autocast in its forward, in a backward inside the autocast context, and in a compiled backward anywhere.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .library import without_autocast


def product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right.T [N, K] for left [N, D] and right [K, D] of the same dtype."""
    differentiated = torch.is_grad_enabled() and (left.requires_grad or right.requires_grad)
    result: Tensor = (_Product.apply if differentiated else _product)(left, right)
    return result


def _product(left: Tensor, right: Tensor) -> Tensor:
    with without_autocast(left.device):
        result: Tensor = left @ right.T
    return result


def inner_products(left: Tensor, right: Tensor) -> Tensor:
    """Inner products over the last dimension. Their derivatives are elementwise, so autocast cannot round them."""
    with without_autocast(left.device):
        found: Tensor = torch.linalg.vecdot(left, right)
    return found


class _Product(torch.autograd.Function):
    """Its derivatives are calls of `product`, so it has derivatives of any order."""

    @staticmethod
    def forward(ctx: Any, left: Tensor, right: Tensor) -> Tensor:
        ctx.save_for_backward(left, right)
        return _product(left, right)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        left, right = ctx.saved_tensors
        return (
            product(grad, right.T) if ctx.needs_input_grad[0] else None,
            product(grad.T, left.T) if ctx.needs_input_grad[1] else None,
        )
