"""VICReg and Barlow Twins of few rows on a CPU, with both views in one tensor: see `ops.at_once`.

The formulas are those of `redundancy`. `vicreg` and `barlow_twins` return None for a call that takes the usual way:
one that is unusual, large or wrong. further: the usual way, for second derivatives.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..ops.at_once import Gradients, are_few, at_once, wide
from ..ops.small import are_floats


def vicreg(
    z_a: Any, z_b: Any, weights: tuple[Any, Any, Any], eps: Any, further: Callable[..., Tensor]
) -> Tensor | None:
    """weights: of invariance, variance and covariance."""
    if not (are_few(z_a, z_b) and len(z_a) > 1 and are_floats(*weights) and are_floats(eps, positive=True)):
        return None
    return at_once(partial(_vicreg, *weights, eps), further, z_a, z_b)


def barlow_twins(
    z_a: Any, z_b: Any, lambda_param: Any, scale: Any, eps: float, further: Callable[..., Tensor]
) -> Tensor | None:
    """eps: added to variances."""
    if not (are_few(z_a, z_b) and len(z_a) > 1 and are_floats(lambda_param, scale)):
        return None
    return at_once(partial(_barlow_twins, lambda_param, scale, eps), further, z_a, z_b)


def _vicreg(
    lam: float, mu: float, nu: float, eps: float, needs: Sequence[bool], z_a: Tensor, z_b: Tensor
) -> tuple[Tensor, Gradients]:
    views = wide(torch.stack((z_a, z_b)))  # [2, N, D]
    _, n, d = views.shape
    apart = views[0] - views[1]
    centred = views - views.mean(1, keepdim=True)
    squares = centred.square().sum(1)
    spread = (squares / (n - 1)).add_(eps).sqrt_()
    short = (1 - spread).relu_()
    # |XᵀX|² = |XXᵀ|²: the smaller products.
    if few := n < d:
        products = torch.bmm(centred, centred.mT)
        covariance = products.square().sum() - squares.square().sum()
    else:
        products = torch.bmm(centred.mT, centred)
        products.diagonal(dim1=1, dim2=2).zero_()
        covariance = products.square().sum()
    loss = apart.square().sum().mul_(lam / (n * d))
    loss.add_(short.sum(), alpha=mu / (2 * d)).add_(covariance, alpha=nu / (d * (n - 1) ** 2))
    if not (needs[0] or needs[1]):
        return loss, (None, None)
    of_spread = (short > 0).to(spread.dtype).div_(spread).mul_(-mu / (2 * d * (n - 1)))
    of_products = 4 * nu / (d * (n - 1) ** 2)
    if few:
        of_squares = of_spread.sub_(squares, alpha=of_products).unsqueeze_(1)
        grad = torch.baddbmm(centred * of_squares, products, centred, alpha=of_products)
    else:
        products.mul_(of_products).diagonal(dim1=1, dim2=2).copy_(of_spread)
        grad = torch.bmm(centred, products)
    grad.sub_(grad.mean(1, keepdim=True))
    step = 2 * lam / (n * d)
    return loss, (
        torch.add(grad[0], apart, alpha=step) if needs[0] else None,
        torch.sub(grad[1], apart, alpha=step) if needs[1] else None,
    )


def _barlow_twins(
    lam: float, scale: float, eps: float, needs: Sequence[bool], z_a: Tensor, z_b: Tensor
) -> tuple[Tensor, Gradients]:
    views = wide(torch.stack((z_a, z_b)))  # [2, N, D]
    n, d = z_a.shape
    centred = views - views.mean(1, keepdim=True)
    inverse = centred.square().mean(1, keepdim=True).add_(eps).rsqrt_()
    unit = centred * inverse
    left, right = unit.unbind(0)
    diagonal = (left * right).sum(0)
    if few := n < d:
        products = torch.bmm(unit, unit.mT)  # [2, N, N]
        redundancy = (products[0] * products[1]).sum() - diagonal.square().sum()
    else:
        products = left.T @ right  # [D, D]
        products.diagonal().zero_()
        redundancy = products.square().sum()
    short = (diagonal / n).sub_(1)
    loss = short.square().sum().add_(redundancy, alpha=lam / n**2).mul_(scale)
    if not (needs[0] or needs[1]):
        return loss, (None, None)
    of_products, of_diagonal = 2 * scale * lam / n**2, short.mul_(2 * scale / n)
    # With respect to each view's unit features, then through the division by the deviation and the mean.
    if few:
        of_diagonal.sub_(diagonal, alpha=of_products)
        grad = torch.baddbmm(unit.flip(0).mul_(of_diagonal), products.flip(0), unit, alpha=of_products)
    else:
        products.mul_(of_products).diagonal().copy_(of_diagonal)
        grad = torch.stack((right @ products.T, left @ products))
    grad.addcmul_(unit, (grad * unit).mean(1, keepdim=True), value=-1)
    grad.sub_(grad.mean(1, keepdim=True))
    found = [grad[k] * inverse[k] if needs[k] else None for k in range(2)]
    return loss, found
