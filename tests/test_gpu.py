"""The plain-PyTorch backends on a CUDA device; ``pytest -m gpu`` runs these alone."""

import pytest
import torch
from strategies import DTYPES, cluster_ids, generator, rows

import fastcl
from fastcl.functional import cluster_infonce

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

# Of the gradient's norm. float32 products on a GPU add up in an order of their own, at temperature 0.05.
ALLOWED = {torch.float64: 1e-10, torch.float32: 2e-4, torch.float16: 2**-9, torch.bfloat16: 2**-6}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("two_sets", [False, True])
@pytest.mark.parametrize("kind", ["random", "converged"])
def test_gradients_are_those_of_float64_on_the_cpu(dtype, two_sets, kind, backend) -> None:
    g = generator(0)
    clusters = cluster_ids("pairs", 300, g)
    z = rows(kind, clusters, 40, g, unit=False).to(dtype)

    def gradient(device: str, wide: torch.dtype) -> tuple[float, torch.Tensor]:
        leaf = z.to(device, wide).detach().clone().requires_grad_()
        options = {"contrasts": z.flip(1).to(device, wide), "symmetric": True} if two_sets else {}
        loss = cluster_infonce(leaf, clusters.to(device), temperature=0.05, **options)
        loss.backward()
        return loss.item(), leaf.grad.double().cpu()

    loss, grad = gradient("cuda", dtype)
    true_loss, true_grad = gradient("cpu", torch.float64)
    assert loss == pytest.approx(true_loss, rel=1e-3 if dtype != torch.float64 else 1e-10, abs=1e-5)
    assert (grad - true_grad).norm() <= ALLOWED[dtype] * true_grad.norm()


def test_a_temperature_on_the_cpu_learns_from_rows_on_the_device(backend) -> None:
    temperature = torch.tensor(0.2, requires_grad=True)
    z = torch.randn(20, 2, 8, generator=generator(0))
    cluster_infonce(z.cuda(), temperature=temperature).backward()
    expected = torch.tensor(0.2, requires_grad=True)
    cluster_infonce(z, temperature=expected).backward()
    torch.testing.assert_close(temperature.grad, expected.grad, rtol=1e-4, atol=1e-5)


def test_bit_identical_on_a_side_stream() -> None:
    z = torch.randn(500, 2, 16, generator=generator(0)).cuda()
    first = [cluster_infonce(z)]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        first.append(cluster_infonce(z))
    torch.cuda.synchronize()
    assert torch.equal(*first)


def test_memory_is_not_quadratic() -> None:
    z = torch.randn(65_536, 32, device="cuda", requires_grad=True)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    fastcl.ClusterInfoNCE()(z, torch.arange(len(z), device="cuda") // 2).backward()
    assert torch.cuda.max_memory_allocated() - before < 65_536**2 * 4 / 16


def test_tensors_on_two_devices() -> None:
    with pytest.raises(ValueError, match=r"^contrasts: expected a tensor on cuda:0, got one on cpu"):
        cluster_infonce(torch.ones(2, 3, device="cuda:0"), contrasts=torch.ones(2, 3))
