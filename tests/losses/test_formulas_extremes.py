"""Arguments at the ends of float32's range: computed, or rejected by name."""

from typing import Any

import pytest
import torch
from torch import Tensor

import fastcl
from fastcl.functional import cluster_infonce
from tests.support.strategies import generator

N, D = 12, 8
LABELS = torch.arange(N) % 3
SHAPE = torch.linspace(0.1, 1, N, dtype=torch.float64)


def rows(seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(N, D, generator=generator(seed), dtype=torch.float64).to(dtype)


def weighted(weights: Tensor, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[Tensor, Tensor]:
    x = rows(0, dtype).requires_grad_()
    loss = cluster_infonce(x, LABELS, weights=weights, **options)
    return loss.detach(), torch.autograd.grad(loss, x)[0]


@pytest.mark.parametrize("size", [1e-42, 1e-300, 1e-20, 1e20, 3e38, 1e300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_of_a_mean_have_no_unit(dtype: torch.dtype, size: float) -> None:
    """A mean of numbers does not depend on the weights' size; 1e-42 in float32 has three digits."""
    weights = SHAPE * size
    if 1e-42 <= size <= 3e38:
        weights = weights.float()
    loss, gradient = weighted(weights, dtype)
    unit = weights.double() / weights.double().max()
    expected, expected_gradient = weighted(unit, torch.float64)
    close = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(loss.double(), expected, **close)
    torch.testing.assert_close(gradient.double(), expected_gradient, **close)
    compiled = torch.compile(lambda w: weighted(w, dtype)[0], backend="aot_eager")(weights)  # reads no values
    torch.testing.assert_close(compiled, loss, **close)


def test_gradient_of_small_weights() -> None:
    weights = (SHAPE * 1e-30).float().requires_grad_()
    loss = cluster_infonce(rows(0), LABELS, weights=weights)
    ordinary = (weights.detach().double() * 1e30).requires_grad_()
    expected = cluster_infonce(rows(0, torch.float64), LABELS, weights=ordinary)
    (gradient,) = torch.autograd.grad(loss, weights)
    (expected_gradient,) = torch.autograd.grad(expected, ordinary)
    torch.testing.assert_close(gradient.double() / 1e30, expected_gradient, rtol=1e-4, atol=1e-6)


def test_ordinary_weights_are_not_touched() -> None:
    """The same to the bit as the plain formula of terms and weights; sums work with weights of any size."""
    weights = torch.rand(N, generator=generator(1))
    each = cluster_infonce(rows(0), LABELS, reduction="none")
    assert torch.equal(cluster_infonce(rows(0), LABELS, weights=weights), (each * weights).sum() / weights.sum())
    small = weights * 1e-38
    assert torch.equal(cluster_infonce(rows(0), LABELS, weights=small, reduction="none"), each * small)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_beta_is_refused_where_it_leaves_no_digits(dtype: torch.dtype) -> None:
    views = torch.stack((rows(0, dtype), rows(1, dtype)), 1)
    most = 2.0**22 if dtype == torch.float32 else 2.0**51
    for beta in (1e3, most):
        assert fastcl.HardNegativeLoss(0.5, beta=beta)(views).isfinite()
    for temperature in (0.5, torch.tensor(0.5)):
        for beta in (most * 1.01, 3e38):
            with pytest.raises(ValueError, match=r"beta: expected at most .* got"):
                fastcl.HardNegativeLoss(temperature, beta=beta)(views)


def test_beta_is_refused_where_the_scale_leaves_the_range() -> None:
    views = torch.stack((rows(0), rows(1)), 1)
    with pytest.raises(ValueError, match="beta: expected at most"):
        fastcl.HardNegativeLoss(1e-36, beta=1e3)(views)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prior_weight": 1e38}, r"prior_weight: expected a number >= 0 and at most 1e\+30, got 1e\+38"),
        (
            {"temperature": 1e-20, "sharpening": 1e-20},
            "sharpening: expected at least 1.17549e-18 with",
        ),
    ],
)
def test_prototype_losses_refuse(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fastcl.MSNLoss(**options)


def test_the_largest_prior_weight_has_a_gradient() -> None:
    x = rows(0).requires_grad_()
    for kl in ("mean_prior", "prior_mean"):
        loss = fastcl.MSNLoss(prior_weight=1e30, kl=kl)(x, rows(1), rows(2)[:5])
        (gradient,) = torch.autograd.grad(loss, x)
        (unit,) = torch.autograd.grad(fastcl.MSNLoss(prior_weight=1e10, kl=kl)(x, rows(1), rows(2)[:5]), x)
        torch.testing.assert_close(gradient / 1e30, unit / 1e10, rtol=1e-3, atol=1e-5)
