"""Autocast makes no product or sum of any loss run in half precision, neither forward nor backward."""

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import fastcl
from fastcl.ops.products import product
from tests.support.strategies import generator

N, M, D, K = 90, 33, 20, 17


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=generator(seed))


def scores(n: int, k: int) -> list[Tensor]:
    return [random(n, k, seed=seed) for seed in (0, 1)]


def memories() -> tuple[fastcl.MemoryQueue, fastcl.MemoryBank]:
    queue, bank = fastcl.MemoryQueue(M, D), fastcl.MemoryBank(M, D)
    queue.enqueue(random(M, D, seed=3))
    bank.update(torch.arange(M), random(M, D, seed=4))
    return queue, bank


QUEUE, BANK = memories()
LABELS, NEGATIVES = torch.arange(N) % 7, (torch.arange(5 * N) % M).view(N, 5)
ASSIGNED = torch.rand(N, 5, generator=generator(5))
CALLS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "SwAVLoss": lambda x, y, p: fastcl.SwAVLoss()([x, y]),
    "SwAVLoss, no iterations": lambda x, y, p: fastcl.SwAVLoss(n_iters=0, epsilon=0.5)([x, y], [x], [y, x]),
    "MSNLoss": lambda x, y, p: fastcl.MSNLoss()(x, y, p),
    "MSNLoss, no iterations": lambda x, y, p: fastcl.MSNLoss(n_iters=0, kl="prior_mean")(x, y, p),
    "PMSNLoss": lambda x, y, p: fastcl.PMSNLoss()(x, y, p),
    "SampledNCELoss": lambda x, y, p: fastcl.SampledNCELoss(0.5, log_normalizer=3.0)(
        x, torch.arange(N) % M, BANK, negatives=NEGATIVES, positives=y
    ),
    "sampled_similarity": lambda x, y, p: fastcl.sampled_similarity(x, y, NEGATIVES).square().sum(),
    "alignment": lambda x, y, p: fastcl.alignment(x, y, 1.0),
    "uniformity": lambda x, y, p: fastcl.uniformity(x),
    "MoCoLoss": lambda x, y, p: fastcl.MoCoLoss()(x, y, QUEUE),
    "HardNegativeLoss": lambda x, y, p: fastcl.HardNegativeLoss()(torch.stack((x, y), 1)),
    "ClusterInfoNCE, inside": lambda x, y, p: fastcl.ClusterInfoNCE(form="inside", margin=0.1)(x, LABELS),
    "ClusterInfoNCE, assignments": lambda x, y, p: fastcl.ClusterInfoNCE()(x, contrasts=y, assignments=ASSIGNED),
    "ClusterInfoNCE, a list": lambda x, y, p: fastcl.ClusterInfoNCE()(
        x, LABELS, contrasts=[y, BANK], contrast_clusters=LABELS
    ),
    "sinkhorn": lambda x, y, p: fastcl.sinkhorn(x, epsilon=0.5).transport_cost,
    "knn_predict": lambda x, y, p: fastcl.knn_predict(x, y, LABELS, k=9).square().sum() + 0 * x.sum(),
}


def value_and_gradients(call: Callable[..., Tensor]) -> list[Tensor]:
    leaves = [random(n, D, seed=seed).requires_grad_() for seed, n in enumerate((N, N, K))]
    value = call(*leaves)
    return [value, *torch.autograd.grad(value, leaves, materialize_grads=True)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", CALLS)
def test_changes_nothing(name: str, dtype: torch.dtype) -> None:
    """Results are the same to the bit, also with the backward inside autocast."""
    expected = value_and_gradients(CALLS[name])
    with torch.autocast("cpu", dtype):
        got = value_and_gradients(CALLS[name])
    for one, other in zip(got, expected, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


def test_sums_stay_in_range() -> None:
    """Half precision's sums would be infinite."""
    high = scores(9000, 300)
    with torch.autocast("cpu", torch.float16):
        assert torch.equal(fastcl.SwAVLoss()(high), _outside(lambda: fastcl.SwAVLoss()(high)))


def _outside(call: Callable[[], Tensor]) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return call()


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo's own
@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("name", ["SwAVLoss", "MSNLoss"])
def test_compiled(name: str, inside: bool) -> None:
    """The compiler makes autocast part of the compiled backward, wherever that runs."""
    torch.compiler.reset()
    call = CALLS[name]
    modules = {"SwAVLoss": fastcl.SwAVLoss(), "MSNLoss": fastcl.MSNLoss()}
    module = modules[name]
    compiled = torch.compile(
        (lambda x, y, p: module([x, y])) if name == "SwAVLoss" else module, fullgraph=True, backend="aot_eager"
    )
    leaves = [random(n, D, seed=seed).requires_grad_() for seed, n in enumerate((N, N, K))]
    with torch.autocast("cpu", torch.bfloat16):
        value = compiled(*leaves)
        if inside:
            gradients = torch.autograd.grad(value, leaves, materialize_grads=True)
    if not inside:
        gradients = torch.autograd.grad(value, leaves, materialize_grads=True)
    for one, other in zip((value, *gradients), value_and_gradients(call), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_autocast_of_another_device() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that there is no GPU
        context = torch.autocast("cuda", torch.float16)
    expected = value_and_gradients(CALLS["MSNLoss"])
    with context:
        got = value_and_gradients(CALLS["MSNLoss"])
    assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))


def test_products_have_derivatives_of_any_order() -> None:
    left, right = (torch.randn(n, 3, dtype=torch.float64, generator=generator(n)).requires_grad_() for n in (4, 2))
    assert torch.equal(product(left, right), left @ right.T)
    assert torch.autograd.gradcheck(product, (left, right))
    assert torch.autograd.gradgradcheck(product, (left, right))
