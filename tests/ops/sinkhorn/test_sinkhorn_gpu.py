"""`sinkhorn` on a CUDA device, against float64 on the CPU; ``pytest -m gpu`` runs these among others."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import fastcl
from fastcl.ops.backends import choose, cuda_runtime, triton_launch
from fastcl.ops.sinkhorn import cuda as sinkhorn_cuda
from fastcl.ops.sinkhorn import triton as sinkhorn_triton
from tests.support.smoke import marked, named
from tests.support.strategies import generator

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

smoke = pytest.mark.smoke
DEVICE = "cuda"
HERE = "triton" if "triton" in choose.AVAILABLE and not triton_launch.INTERPRETED else "chunked"
ALLOWED = {torch.float64: 1e-10, torch.float32: 2e-5, torch.float16: 2**-10, torch.bfloat16: 2**-7}
CUDA = ("cuda",) if "cuda" in choose.AVAILABLE and not cuda_runtime.kernels().emulated else ()
# One column; several rows in one step; the tiles' sizes and one more; rows held whole, and longer ones.
SIZES = [(7, 1), (300, 20), (513, 1024), (131, 1025), (70, 3000), (40, sinkhorn_triton.WHOLE), (40, 10_001)]


@pytest.fixture(params=["triton", "cuda"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Without Triton its tests run on what replaces it."""
    name = HERE if request.param == "triton" else request.param
    if name not in (HERE, *CUDA):
        pytest.skip(f"backend {name}: " + choose.MISSING.get(name, "not on the device"))
    with fastcl.use_backend(name):
        yield name


@smoke
def test_the_fastest_is_the_default() -> None:
    assert choose.choose_backend(torch.device("cuda", 0), torch.float32, "sinkhorn") == HERE
    assert choose.choose_backend(torch.device("cuda", 0), torch.float64, "sinkhorn") == "chunked"


def solved(scores: Tensor, device: str, dtype: torch.dtype, **options: Any) -> list[Tensor]:
    """Assignments, potentials, and the gradients of a weighted sum of them."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    n, k = scores.shape[-2:]
    g = generator(1)
    prior, marginal = (torch.rand(size, generator=g) + 0.1 for size in (k, n))
    prior[k // 2] *= k == 1
    weights = [torch.randn(shape, generator=g) for shape in (scores.shape, (n,), (k,))]
    leaf = scores.to(device, dtype).requires_grad_()
    leaves = [leaf, *(value.to(device, wide).requires_grad_() for value in (torch.tensor(0.1), prior, marginal))]
    result = fastcl.sinkhorn(leaf, epsilon=leaves[1], prior=leaves[2], row_marginal=leaves[3], **options)
    outputs = [result.assignments, result.row_potential, result.col_potential]
    total = sum(
        torch.where(output.isfinite(), output * weight.to(output), 0).sum()
        for output, weight in zip(outputs, weights, strict=True)
    )
    gradients = torch.autograd.grad(total, leaves)
    return [value.detach().double().cpu() for value in (*outputs, *gradients)]


# Sizes differ in their kernels; in float16 and float64 a few show that the dtype is handled.
PROBLEMS = [
    pytest.param(n, k, tol, dtype, id=f"{n} x {k}-{'tolerance' if tol else 'fixed'}-{named(dtype)}")
    for n, k in SIZES
    for tol in (None, 1e-5)
    for dtype in ALLOWED
    if dtype in (torch.float32, torch.bfloat16) or (n == 513 and tol is None)
]


@pytest.mark.parametrize(
    ("n", "k", "tol", "dtype"), marked(PROBLEMS, ["300 x 20-fixed-float32", "70 x 3000-fixed-bfloat16"])
)
def test_values_and_gradients_are_those_of_float64_on_the_cpu(backend, n, k, tol, dtype) -> None:
    scores = torch.randn(n, k, generator=generator(0)).mul(0.3).to(dtype)
    options = {"n_iters": 500 if tol else 3, "tol": tol}
    with fastcl.use_backend("reference"):
        expected = solved(scores, "cpu", torch.float64, **options)
    for got, truth in zip(solved(scores, DEVICE, dtype, **options), expected, strict=True):
        known = truth.isfinite()
        assert torch.equal(got[~known], truth[~known])
        assert (got - truth)[known].norm() <= (ALLOWED[dtype] + 10 * (tol or 0)) * truth[known].norm() + 1e-6


@pytest.mark.parametrize("k", [100, 10_001])
def test_the_same_bits_from_run_to_run(backend, k) -> None:
    scores = torch.randn(2000, k, generator=generator(0))
    runs = [solved(scores, "cuda", torch.float32, n_iters=4) for _ in range(3)]
    for run in runs[1:]:
        assert all(torch.equal(one, other) for one, other in zip(runs[0], run, strict=True))


@pytest.mark.parametrize("k", [100, 5000])
def test_strides_and_batches(backend, k) -> None:
    """Columns far apart use another tile; batches are more than 2**31 bytes apart."""
    scores = torch.randn(2, 90, k, generator=generator(0)).cuda()
    far = torch.empty(2, 1 << 31, dtype=torch.uint8, device="cuda").view(torch.float32)
    spread = far[:, : k * 90].view(2, k, 90).transpose(1, 2).copy_(scores)
    one, other = (fastcl.sinkhorn(values, epsilon=0.3).assignments for values in (scores, spread))
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_small_epsilon_and_large_scores(backend) -> None:
    scores = 1e4 * torch.rand(200, 150, generator=generator(0))
    got = fastcl.sinkhorn(scores.cuda(), epsilon=0.001, n_iters=5).assignments
    with fastcl.use_backend("reference"):
        expected = fastcl.sinkhorn(scores.double(), epsilon=0.001, n_iters=5).assignments
    torch.testing.assert_close(got.double().cpu(), expected, rtol=1e-3, atol=1e-5)


def test_bit_identical_on_a_side_stream(backend) -> None:
    scores = torch.randn(3000, 700, generator=generator(0)).cuda()
    first = fastcl.sinkhorn(scores, n_iters=5).assignments
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        busy = torch.randn(4096, 4096, device="cuda")
        later = scores * 1 + 0 * (busy @ busy).sum()  # ready when the stream reaches it
        other = fastcl.sinkhorn(later, n_iters=5).assignments
    stream.synchronize()
    assert torch.equal(first, other)


@pytest.mark.parametrize(("n", "k"), [(300, 100), (20_000, 3000), (40, 8193)])
def test_a_graph_replays_with_other_scores(backend, n, k) -> None:
    """Scores that stay on the chip, that are read in each iteration, and that use the passes."""
    if backend == "chunked":
        pytest.skip("plain PyTorch")
    scores = torch.randn(n, k, generator=generator(0)).cuda()
    epsilon = torch.tensor(0.1, device="cuda")
    fastcl.sinkhorn(scores, epsilon=epsilon, n_iters=3)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        assignments = fastcl.sinkhorn(scores, epsilon=epsilon, n_iters=3).assignments
    scores.copy_(torch.randn(n, k, generator=generator(1)))
    epsilon.fill_(0.3)
    graph.replay()
    expected = fastcl.sinkhorn(scores, epsilon=epsilon, n_iters=3).assignments
    assert torch.equal(assignments, expected)


@pytest.mark.skipif(not CUDA, reason="no CUDA C++ kernels here")
@pytest.mark.parametrize("tol", [None, 1e-3], ids=["fixed", "tolerance"])
def test_one_launch_is_the_passes_one_after_another(tol, monkeypatch) -> None:
    with fastcl.use_backend("cuda"):
        for n, k in ((4096, 300), (2000, 8192), (60_000, 1000)):
            scores = torch.randn(n, k, generator=generator(0)).cuda()
            at_once = fastcl.sinkhorn(scores, n_iters=40 if tol else 4, tol=tol)
            with monkeypatch.context() as patch:
                patch.setattr(sinkhorn_cuda, "iterate", lambda *_: None)
                one_by_one = fastcl.sinkhorn(scores, n_iters=40 if tol else 4, tol=tol)
            assert int(at_once.n_iters) == int(one_by_one.n_iters)
            torch.testing.assert_close(at_once.assignments, one_by_one.assignments, rtol=1e-4, atol=1e-7)
