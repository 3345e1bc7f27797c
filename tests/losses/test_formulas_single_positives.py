"""A single positive's loss is log(1 + neg / pos): loss and gradient keep their digits however small they become."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

import fastcl
from fastcl.functional import cluster_infonce
from tests.support.backends import VARIANTS
from tests.support.emulated import on
from tests.support.tolerances import HALF_ROWS, RELATIVE_FLOOR, half_ulp

BACKENDS = (*VARIANTS, "cuda")
TEMPERATURES = (0.02, 0.05, 0.1, 0.5)
DTYPES = (torch.float64, torch.float32, torch.bfloat16)


def pairs(n: int, dtype: torch.dtype, spread: float = 1e-3) -> Tensor:
    """[n, 2, 48]: two views that nearly agree."""
    g = torch.Generator().manual_seed(n)
    z = torch.randn(n, 1, 48, generator=g, dtype=torch.float64)
    return (z + spread * torch.randn(n, 2, 48, generator=g, dtype=torch.float64)).to(dtype)


def log1p_ratio(s: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
    """Of logits [N, M] with one positive each."""
    log_ratio = s.masked_fill(~negative, -torch.inf).logsumexp(1) - (s * positive).sum(1)
    return torch.logaddexp(log_ratio, torch.zeros_like(log_ratio))


def both_views(z: Tensor, scale: Tensor, margin: float = 0.0) -> Tensor:
    x = normalize(z.flatten(0, 1), dim=1)
    own = torch.arange(len(x))
    positive = own[:, None] == (own ^ 1)
    s = (x @ x.T - margin * positive.to(x.dtype)) * scale
    return log1p_ratio(s, positive, ~positive & ~torch.eye(len(x), dtype=torch.bool))


def one_way(z: Tensor, scale: Tensor) -> Tensor:
    x, y = normalize(z, dim=2).unbind(1)
    own = torch.eye(len(z), dtype=torch.bool)
    return log1p_ratio(x @ y.T * scale, own, ~own)


def two_ways(z: Tensor, scale: Tensor) -> Tensor:
    return (one_way(z, scale).mean() + one_way(z.flip(1), scale).mean()) / 2


def beside_a_queue(z: Tensor, scale: Tensor) -> Tensor:
    (x, y), queue = normalize(z, dim=2).unbind(1), normalize(QUEUE.to(z.dtype), dim=1)
    s = torch.cat([(x * y).sum(1, keepdim=True), x @ queue.T], 1) * scale
    positive = torch.zeros_like(s, dtype=torch.bool)
    positive[:, 0] = True
    return log1p_ratio(s, positive, ~positive).mean()


QUEUE = pairs(20, torch.bfloat16).flatten(0, 1).float()
NO_CLUSTER = torch.full((len(QUEUE),), -1)
WEIGHTS = torch.linspace(0.5, 1.5, 40)
Call = Callable[[Tensor, Tensor], Tensor]
# What is called, and the formula; of rows and the scale.
CALLS: dict[str, tuple[Call, Call]] = {
    "mean": (lambda z, t: cluster_infonce(z, temperature=t), lambda z, s: both_views(z, s).mean()),
    "each row": (
        lambda z, t: (cluster_infonce(z, temperature=t, reduction="none").mean(1) * WEIGHTS).sum(),
        lambda z, s: (both_views(z, s).view(-1, 2).mean(1) * WEIGHTS).sum(),
    ),
    "a margin": (
        lambda z, t: cluster_infonce(z, temperature=t, margin=0.1),
        lambda z, s: both_views(z, s, 0.1).mean(),
    ),
    "inside": (
        lambda z, t: cluster_infonce(z, temperature=t, form="inside"),
        lambda z, s: both_views(z, s).mean(),
    ),
    "debiased": (
        lambda z, t: fastcl.DebiasedLoss(t, 0.0)(z),
        lambda z, s: both_views(z, s).mean(),
    ),
    "both directions": (
        lambda z, t: cluster_infonce(z[:, 0], contrasts=z[:, 1], temperature=t, symmetric=True),
        two_ways,
    ),
    "a positive of its own": (
        lambda z, t: cluster_infonce(
            z[:, 0], positives=z[:, 1], contrasts=QUEUE.to(z.dtype), contrast_clusters=NO_CLUSTER, temperature=t
        ),
        beside_a_queue,
    ),
}  # fmt: skip


def differentiated(call: Call, z: Tensor, of_temperature: Tensor) -> tuple[Tensor, list[Tensor]]:
    leaves = [z.detach().clone().requires_grad_(), of_temperature.detach().clone().requires_grad_()]
    loss = call(*leaves)
    return loss.detach(), list(torch.autograd.grad(loss, leaves))


def off(got: Tensor, truth: Tensor) -> float:
    """The norm of the error, but for one rounding to the dtype of the result, by that of the truth."""
    error = (got.double() - truth).norm() - half_ulp(truth, got.dtype).norm()
    return (error.clamp(min=0) / truth.norm()).item()


def takes(backend: str, dtype: torch.dtype) -> bool:
    return dtype != torch.float64 or backend not in ("triton", "cuda")


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize(("backend", "dtype"), [(b, dtype) for b in BACKENDS for dtype in DTYPES if takes(b, dtype)])
def test_loss_and_gradients_of_converged_rows(name, backend, dtype) -> None:
    """Of rows and temperature."""
    call, formula = CALLS[name]
    z = pairs(40, dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    floor = RELATIVE_FLOOR[wide]
    for temperature in TEMPERATURES:
        t = torch.tensor(temperature, dtype=wide)
        truth, (true_rows, of_temperature) = differentiated(lambda z, t: formula(z, 1 / t), z.double(), t.double())
        with on(backend):
            loss, (rows, got_of_temperature) = differentiated(call, z, t)
        assert off(loss, truth) <= floor, f"{temperature}: loss {loss.item():.9g}, expected {truth.item():.9g}"
        assert off(rows, true_rows) <= floor + HALF_ROWS.get(dtype, 0.0), f"{temperature}: gradient"
        assert off(got_of_temperature, of_temperature) <= floor, f"{temperature}: gradient of the temperature"


@pytest.mark.parametrize("scale", [100.0, 300.0, 1000.0])
@pytest.mark.parametrize("backend", BACKENDS)
def test_large_logits_all_alike(scale, backend) -> None:
    """Samples that occur several times: a loss near log 4 beside logits of 1000, which round at 3e-5 in float32."""
    x = normalize(torch.randn(10, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64), dim=1)
    x = (x * torch.linspace(0.9, 1.1, 10)[:, None]).repeat(4, 1).to(torch.float32)
    own = torch.eye(len(x), dtype=torch.bool)
    truth = log1p_ratio(scale * x.double() @ x.double().T, own, ~own).mean()
    with on(backend):
        loss = fastcl.ClipLoss()(x, x, torch.tensor(scale))
    assert abs(loss.double() - truth) <= 3e-6 * truth


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_infinite_logits_make_no_loss_of_zero(backend, reduction) -> None:
    z = pairs(4, torch.float32)
    z[0] = torch.inf
    with on(backend):
        loss = cluster_infonce(z, temperature=1.0, normalize=False, reduction=reduction)
    assert not loss.isfinite()
