"""Every backend that runs on a CUDA device: ``pytest -m gpu``, and of these ``-m "gpu and smoke"`` in a minute.

`test_gpu_rehearsed.py` runs some of the tests' bodies where there is no device.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import fastcl
from fastcl.functional import cluster_infonce
from fastcl.ops.backends import choose, cuda_runtime, triton_launch
from fastcl.ops.contrastive.triton import triangle
from tests.support.oracle import CONSTANT_NORMS, TRUTH, differentiate, eager_evaluations
from tests.support.oracle import contrastive_stats as plain_stats
from tests.support.smoke import marked, named
from tests.support.stats_checks import as_dict, objective
from tests.support.strategies import DTYPES, FIELDS, cluster_ids, generator, rows
from tests.support.tolerances import accumulation_dtype, check
from tests.support.waiting import waiting_is_an_error

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
smoke = pytest.mark.smoke
DEVICE = "cuda"

# Backends with kernels of this library on this device.
KERNELS = ("triton", "cuda")
PRETENDED = {
    "triton": triton_launch.INTERPRETED,
    "cuda": "cuda" in choose.AVAILABLE and cuda_runtime.kernels().emulated,
}
HERE = [name for name in KERNELS if name in choose.AVAILABLE and not PRETENDED[name]]
HALF = (torch.bfloat16, torch.float16)

# Relative to the gradient's norm. A GPU adds up float32 products in another order; temperature 0.05.
ALLOWED = {torch.float64: 1e-10, torch.float32: 2e-4, torch.float16: 2**-9, torch.bfloat16: 2**-6}


@contextmanager
def running(name: str) -> Iterator[str]:
    if name in KERNELS and name not in HERE:
        pytest.skip(f"backend {name}: " + choose.MISSING.get(name, "not on the device"))
    with fastcl.use_backend(name):
        yield name


@pytest.fixture(params=["reference", "chunked", *KERNELS])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with running(request.param) as name:
        yield name


@pytest.fixture
def _triton() -> Iterator[None]:
    with running("triton"):
        yield


@pytest.fixture(params=KERNELS)
def _kernels(request: pytest.FixtureRequest) -> Iterator[None]:
    with running(request.param):
        yield


@smoke
def test_the_fastest_is_the_default() -> None:
    expected = "triton" if "triton" in HERE else "chunked"  # so that the fall-back is never tested by mistake
    assert choose.choose_backend(torch.device("cuda", 0), torch.float32) == expected
    assert choose.choose_backend(torch.device("cuda", 0), torch.float64) == "chunked"


PROBLEMS = [
    pytest.param(kind, two_sets, dtype, id=f"{kind}-{'two sets' if two_sets else 'self'}-{named(dtype)}")
    for kind in ("random", "converged")
    for two_sets in (False, True)
    for dtype in DTYPES
]
QUICK = ("random-self-bfloat16", "random-two sets-float32")


@pytest.mark.parametrize(("kind", "two_sets", "dtype"), marked(PROBLEMS, QUICK))
def test_gradients_are_those_of_float64_on_the_cpu(kind, two_sets, dtype, backend) -> None:
    g = generator(0)
    clusters = cluster_ids("pairs", 300, g)
    z = rows(kind, clusters, 40, g, unit=False).to(dtype)

    def gradient(device: str, wide: torch.dtype) -> tuple[float, Tensor]:
        leaf = z.to(device, wide).detach().clone().requires_grad_()
        options = {"contrasts": z.flip(1).to(device, wide), "symmetric": True} if two_sets else {}
        loss = cluster_infonce(leaf, clusters.to(device), temperature=0.05, **options)
        loss.backward()
        return loss.item(), leaf.grad.double().cpu()

    loss, grad = gradient(DEVICE, dtype)
    with fastcl.use_backend("reference"):
        true_loss, true_grad = gradient("cpu", torch.float64)
    assert loss == pytest.approx(true_loss, rel=1e-3 if dtype != torch.float64 else 1e-10, abs=1e-5)
    assert (grad - true_grad).norm() <= ALLOWED[dtype] * true_grad.norm()


# By the error rule, against the float64 formula, with all fields wanted

CALLS: dict[str, dict[str, Any]] = {
    "self-contrast": {},
    "self-contrast, converged": {"kind": "converged", "scale": 20.0, "pattern": "pairs"},
    "self-contrast, long rows": {"d": 700},
    "self-contrast, longest rows": {"d": 4096, "n": 200},
    "self-contrast, one number a row": {"d": 1},
    "self-contrast, bias": {"bias": True},
    "two sets": {"m": 391},
    "two sets, both ways": {"m": 391, "both": True, "kind": "converged", "scale": 20.0, "pattern": "pairs"},
    "two sets, ids and bias": {"m": 391, "both": True, "ids": True, "bias": True},
    "two sets, low temperature": {"m": 391, "both": True, "scale": 200.0},
    "two sets, no clusters": {"m": 391, "pattern": None},
    "two sets, not normalised": {"m": 130, "normalize": False, "scale": 3.0, "both": True},
    "three scales": {"m": 130, "scale": (0.5, 3.0, 30.0)},
    "queue": {"m": 1003, "leaves": ("anchors",), "pattern": None},
    "queue with positives": {"m": 1003, "leaves": ("anchors",), "pattern": "random"},
    "huge cluster": {"pattern": "huge", "n": 513},
}


# Triton compiles each variant of its kernels for seconds. Calls differ in their kernels in bfloat16; in another dtype a
# few show that it is handled. float64 is another backend's, which other tests go through.
IN_FLOAT32 = ("self-contrast", "self-contrast, converged", "self-contrast, long rows", "two sets, both ways",
              "two sets, low temperature", "three scales", "queue with positives")  # fmt: skip
IN_FLOAT16 = ("self-contrast", "two sets, both ways", "two sets, ids and bias")
RULE = [
    pytest.param(name, call, dtype, id=f"{name}-{call}-{named(dtype)}")
    for name in KERNELS
    for call in CALLS
    for dtype in DTYPES
    if dtype == torch.bfloat16
    or (dtype == torch.float64 and call == "two sets, ids and bias")
    or (dtype == torch.float32 and (name == "cuda" or call in IN_FLOAT32))
    or (dtype == torch.float16 and (name == "cuda" or call in IN_FLOAT16))
]
QUICK_RULE = [
    f"{name}-{call}" for name in KERNELS for call in ("self-contrast-bfloat16", "two sets, both ways-float32")
]


@pytest.mark.parametrize(("name", "call", "dtype"), marked(RULE, QUICK_RULE))
def test_obeys_the_error_rule(name, call, dtype) -> None:
    with running(name):
        judge_by_the_error_rule(CALLS[call], dtype)


def judge_by_the_error_rule(call: dict[str, Any], dtype: torch.dtype) -> None:
    o: dict[str, Any] = {"n": 301, "m": None, "d": 72, "kind": "random", "pattern": "random", "scale": 5.0}
    o |= {"both": False, "ids": False, "bias": False, "normalize": True} | call
    g = generator(3)
    n, m = o["n"], o["m"]
    clusters = cluster_ids(o["pattern"] or "pairs", n + (m or 0), g)
    x = rows(o["kind"], clusters, o["d"], g, unit=not o["normalize"]).to(dtype)
    accumulation = accumulation_dtype(dtype)
    arguments: dict[str, Any] = {
        "anchors": x[:n],
        "logit_scale": torch.tensor(o["scale"], dtype=accumulation),
        "normalize_anchors": o["normalize"],
        "normalize_contrasts": o["normalize"] and m is not None,
        "want": FIELDS,
        "both": o["both"],
    }
    if o["pattern"] is not None:
        arguments["anchor_clusters"] = clusters[:n]
    if m is not None:
        arguments["contrasts"] = x[n:]
        if o["pattern"] is not None:
            arguments["contrast_clusters"] = clusters[n:]
        if o["ids"]:
            arguments["anchor_ids"] = torch.randint(-1, 50, (n,), generator=g)
            arguments["contrast_ids"] = torch.randint(-1, 50, (m,), generator=g)
    if o["bias"]:
        arguments["contrast_bias"] = torch.randn(m or n, generator=g).to(accumulation)
    leaves = o.get("leaves") or tuple(
        k for k in ("anchors", "contrasts", "contrast_bias", "logit_scale") if k in arguments
    )

    def evaluate(how: Any) -> Any:
        return differentiate(plain_stats, arguments, leaves, objective, how.dtype, how=how)

    truth, true_gradients = evaluate(TRUTH)
    _, cancelling = evaluate(CONSTANT_NORMS)
    draws = [evaluate(how) for how in eager_evaluations(accumulation)]
    there = {k: v.to(DEVICE) if isinstance(v, Tensor) else v for k, v in arguments.items()}

    def on_the_device(**a: Any) -> dict[str, Tensor]:
        return {k: v.cpu() for k, v in as_dict(fastcl.contrastive_stats(**a)).items()}

    got, gradients = differentiate(on_the_device, there, leaves, objective)
    for name, value in truth.items():
        if "num" in name:
            assert torch.equal(got[name].double(), value), name
        else:
            check(name, got[name], value, [d[name] for d, _ in draws], accumulation=accumulation)
    for name, value in true_gradients.items():
        check(
            f"gradient of {name}",
            gradients[name].cpu(),
            value,
            [d[name] for _, d in draws],
            accumulation=accumulation,
            half_rows=dtype if name in ("anchors", "contrasts") else None,
            magnitude=cancelling[name],
        )


@pytest.mark.parametrize("precision", ["high", "medium"])
@pytest.mark.usefixtures("_kernels")
def test_float32_products_obey_torchs_precision(precision) -> None:
    def gradient() -> Tensor:
        z = torch.randn(500, 64, generator=generator(0)).to(DEVICE).requires_grad_()
        cluster_infonce(z, torch.arange(500, device=DEVICE) // 2, temperature=0.1).backward()
        return z.grad

    before = torch.get_float32_matmul_precision()
    exact = gradient()
    try:
        torch.set_float32_matmul_precision(precision)
        rough = gradient()
    finally:
        torch.set_float32_matmul_precision(before)
    assert not torch.equal(exact, rough)
    assert (exact - rough).norm() < 0.05 * exact.norm()


def test_a_temperature_on_the_cpu_learns_from_rows_on_the_device(backend) -> None:
    temperature = torch.tensor(0.2, requires_grad=True)
    z = torch.randn(20, 2, 8, generator=generator(0))
    cluster_infonce(z.to(DEVICE), temperature=temperature).backward()
    expected = torch.tensor(0.2, requires_grad=True)
    with fastcl.use_backend("reference"):
        cluster_infonce(z, temperature=expected).backward()
    torch.testing.assert_close(temperature.grad, expected.grad, rtol=1e-4, atol=1e-5)


# Devices and streams


def training_step(z: Tensor, y: Tensor, scale: Tensor) -> list[Tensor]:
    """Loss and gradients of self-contrast and of two sets in both directions."""
    leaves = [t.detach().requires_grad_() for t in (z, y, scale)]
    clusters = torch.arange(len(z), device=z.device) // 2
    loss = cluster_infonce(leaves[0], clusters, temperature=1 / leaves[2])
    loss = loss + cluster_infonce(leaves[0], contrasts=leaves[1], symmetric=True, temperature=1 / leaves[2])
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def problem(n: int = 1000, d: int = 64, dtype: torch.dtype = torch.bfloat16, device: str = "") -> list[Tensor]:
    g, device = generator(0), device or DEVICE
    z, y = (torch.randn(n, d, generator=g).to(device, dtype) for _ in range(2))
    return [z, y, torch.tensor(10.0, device=device)]


@smoke
def test_bit_identical_from_run_to_run_and_on_a_side_stream(backend) -> None:
    if backend == "reference":
        pytest.skip("plain PyTorch in one piece: torch's own reductions")
    arguments = problem()
    first, second = training_step(*arguments), training_step(*arguments)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        third = training_step(*arguments)
    torch.cuda.synchronize()
    for a, b, c in zip(first, second, third, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


@smoke
@pytest.mark.usefixtures("_kernels")
def test_never_waits_for_the_device() -> None:
    arguments = problem()
    training_step(*arguments)  # compiles
    with waiting_is_an_error():
        training_step(*arguments)


@smoke
@pytest.mark.usefixtures("_kernels")
def test_a_graph_replays_with_other_rows_and_another_scale() -> None:
    arguments = problem()
    training_step(*arguments)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        training_step(*arguments)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = training_step(*arguments)
    for seed, scale in ((1, 30.0), (2, 150.0), (3, 2.0)):
        g = generator(seed)
        for tensor in arguments[:2]:
            tensor.copy_(torch.randn(tensor.shape, generator=g))
        arguments[2].fill_(scale)
        graph.replay()
        for got, expected in zip(captured, training_step(*arguments), strict=True):
            assert torch.equal(got, expected)


@smoke
@pytest.mark.usefixtures("_triton")
@pytest.mark.parametrize("d", [64, 128, 256])
@pytest.mark.parametrize("left", [0, 77])
def test_each_logit_once_in_the_forward(d, left, monkeypatch) -> None:
    """The same statistics as with each logit twice, up to the order of additions, and the same bits on every run."""
    n, g = triangle.FEWEST_ROWS + left, generator(0)
    clusters = torch.randint(0, n // 3, (n,), generator=g)
    z = torch.randn(n, d, generator=g).to(DEVICE, torch.bfloat16)

    def fields() -> dict[str, Tensor]:
        return as_dict(
            fastcl.contrastive_stats(
                z, anchor_clusters=clusters.to(DEVICE), normalize_anchors=True, logit_scale=20.0, want=FIELDS[:4]
            )
        )

    once, again = fields(), fields()
    monkeypatch.setattr(triangle, "FEWEST_ROWS", n + 1)
    for name, expected in fields().items():
        assert torch.equal(once[name], again[name]), name
        torch.testing.assert_close(once[name], expected, rtol=1e-5, atol=1e-4)


@smoke
@pytest.mark.usefixtures("_kernels")
def test_replays_from_a_tape_give_the_same_bits() -> None:
    """Native launches on memory of their own, on another stream, in a graph, and from autograd's thread."""
    z = torch.randn(64, 2, 32, device="cuda").requires_grad_()

    def step() -> list[torch.Tensor]:
        loss = cluster_infonce(z, temperature=0.2)
        return [loss.detach(), *torch.autograd.grad(loss, z)]

    expected = step()  # without a tape
    found = [step() for _ in range(4)]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found.append(step())
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    for results in (*found, captured):
        for got, value in zip(results, expected, strict=True):
            assert torch.equal(got, value)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
@pytest.mark.usefixtures("_kernels")
def test_on_a_device_that_is_not_the_current_one() -> None:
    first = training_step(*problem())
    with torch.cuda.device(0):
        second = training_step(*problem(device="cuda:1"))
    assert torch.cuda.current_device() == 0
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a.cpu(), b.cpu(), rtol=1e-2, atol=1e-4)


@smoke
def test_tensors_on_two_devices() -> None:
    with pytest.raises(ValueError, match=r"^contrasts: expected a tensor on cuda:0, got one on cpu"):
        cluster_infonce(torch.ones(2, 3, device="cuda:0"), contrasts=torch.ones(2, 3))


@smoke
@pytest.mark.usefixtures("_kernels")
def test_kernels_refuse_tensors_on_the_cpu() -> None:
    with pytest.raises(ValueError, match="takes tensors on a CUDA device"):
        fastcl.contrastive_stats(torch.ones(3, 2))


@pytest.mark.usefixtures("_kernels")
def test_compiled_with_torch() -> None:
    torch.compiler.reset()
    arguments = problem(dtype=torch.float32)
    compiled = torch.compile(lambda z, y: cluster_infonce(z, contrasts=y, symmetric=True), fullgraph=True)

    def gradients(function: Callable[..., Tensor]) -> list[Tensor]:
        leaves = [t.detach().requires_grad_() for t in arguments[:2]]
        loss = function(*leaves)
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    expected = gradients(lambda z, y: cluster_infonce(z, contrasts=y, symmetric=True))
    torch.testing.assert_close(gradients(compiled), expected, rtol=1e-4, atol=1e-6)


# Sizes


@pytest.mark.parametrize("dtype", HALF, ids=named)
@pytest.mark.usefixtures("_kernels")
def test_more_pairs_than_32_bits_count(dtype) -> None:
    n, m, d = 65_536, 40_960, 64
    g = generator(0)
    x, y = (torch.randn(size, d, generator=g).to(dtype) for size in (n, m))
    leaves = [t.cuda().requires_grad_() for t in (x, y)]
    s = fastcl.contrastive_stats(
        *leaves, want=("lse_all",), normalize_anchors=True, normalize_contrasts=True, logit_scale=3.0, both=True
    )
    (s.lse_all.sum() + s.reverse.lse_all.sum()).backward()
    assert torch.equal(s.num_neg.cpu(), torch.full((n,), float(m)))
    some = torch.tensor([0, 1, 40_000, n - 2, n - 1])
    unit = torch.nn.functional.normalize(y.double(), dim=1)
    expected = (3.0 * torch.nn.functional.normalize(x[some].double(), dim=1) @ unit.T).logsumexp(1)
    torch.testing.assert_close(s.lse_all[some.cuda()].double().cpu(), expected, rtol=1e-4, atol=0)
    for leaf in leaves:
        assert leaf.grad.isfinite().all()
        assert leaf.grad[-1].norm() > 0


@pytest.mark.usefixtures("_kernels")
def test_rows_of_more_than_32_bits_of_numbers() -> None:
    """Offsets into the rows themselves exceed 32 bits."""
    n, d = 600_000, 4096
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GB")
    queue = torch.zeros(n, d, dtype=torch.bfloat16, device="cuda")
    queue[-1, :2] = torch.tensor([3.0, 4.0])
    x = torch.zeros(3, d, dtype=torch.bfloat16, device="cuda")
    x[:, 0] = torch.tensor([1.0, 2.0, 4.0])
    x.requires_grad_()
    lse = fastcl.contrastive_stats(x, queue, want=("lse_all",)).lse_all
    lse.sum().backward()
    own = torch.tensor([3.0, 6.0, 12.0], dtype=torch.float64)
    expected = (own.exp() + n - 1).log()
    torch.testing.assert_close(lse.detach().double().cpu(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(x.grad[:, 1].double().cpu(), 4 * (own - expected).exp(), rtol=1e-2, atol=1e-9)


@pytest.mark.parametrize("symmetric", [False, True], ids=["self", "two sets"])
def test_memory_is_not_quadratic(symmetric) -> None:
    n, d = 65_536, 64
    z = torch.randn(n, d, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    y = torch.randn(n, d, device="cuda", dtype=torch.bfloat16, requires_grad=True) if symmetric else None

    def step() -> None:
        z.grad = None
        if y is None:
            cluster_infonce(z, torch.arange(n, device="cuda") // 2).backward()
        else:
            y.grad = None
            cluster_infonce(z, contrasts=y, symmetric=True).backward()

    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    extra = torch.cuda.max_memory_allocated() - before
    assert extra < n * n // 4
    if HERE:
        sets = 2 if symmetric else 1
        columns = 8 * n * torch.cuda.get_device_properties(0).multi_processor_count if symmetric else 0
        assert extra < sets * 16 * n * d + columns + 100 * 4 * n


@pytest.mark.usefixtures("_triton")
def test_ragged_batches_compile_nothing_new() -> None:
    """Kernels are not specialised for N or M."""

    def variants() -> int:
        total = 0
        for name in ("statistics_kernel", "running_kernel", "two_way_kernel", "gradient_kernel", "finish_kernel"):
            kernel = triton_launch.kernel_named(name)
            if hasattr(kernel, "device_caches"):
                total += sum(len(entry[0]) for entry in kernel.device_caches.values())
            else:  # before Triton 3.3
                total += sum(len(entry) for entry in kernel.cache.values())
        return total

    arguments = problem(n=1000)
    training_step(*arguments)
    compiled = variants()
    for n in (2, 16, 34, 128, 998, 1024, 4096):
        training_step(*(t[:n] if t.dim() else t for t in problem(n=n)))
    assert variants() == compiled
    assert compiled < 150


SEARCHES = [
    pytest.param(*sizes, dtype, id="{} x {}, D={}, top {}-".format(*sizes) + named(dtype))
    for sizes in ((70, 3001, 40, 20), (5, 20_000, 128, 200), (129, 900, 300, 1))
    for dtype in DTYPES
]


@pytest.mark.parametrize(("n", "m", "d", "k", "dtype"), marked(SEARCHES, ["70 x 3001, D=40, top 20-bfloat16"]))
def test_topk_is_exact_with_ties(backend, n, m, d, k, dtype) -> None:
    g = generator(0)
    queries, keys = (torch.randint(-2, 3, (size, d), generator=g) for size in (n, m))
    ids = torch.arange(n) % 7, torch.arange(m) % 7
    exact = (queries.double() @ keys.double().T).masked_fill(ids[0][:, None] == ids[1], -torch.inf)
    expected = exact.sort(dim=1, descending=True, stable=True)
    values, indices = fastcl.topk_similarity(
        queries.to(DEVICE, dtype), keys.to(DEVICE, dtype), k, query_ids=ids[0].to(DEVICE), key_ids=ids[1].to(DEVICE)
    )
    assert torch.equal(values.double().cpu(), expected.values[:, :k])
    assert torch.equal(indices.cpu(), expected.indices[:, :k])


def test_queue_and_bank_on_the_device(backend) -> None:
    queue, bank = fastcl.MemoryQueue(50, 8, ids=True).to(DEVICE), fastcl.MemoryBank(40, 8).to(DEVICE)
    z, index = torch.randn(30, 8, device=DEVICE, requires_grad=True), torch.arange(30, device=DEVICE)
    for _ in range(2):
        queue.enqueue(z, ids=index)
        bank.update(index, z)
    assert queue.ids.tolist() == [*range(10, 30), *range(30)]
    assert len(bank) == 30
    loss = fastcl.ClusterInfoNCE()(z, positives=z.flip(0), contrasts=[queue, bank], ids=index)
    loss = loss + fastcl.SampledNCELoss(num_negatives=12)(z, index, bank)
    loss.backward()
    assert loss.isfinite()
    assert z.grad.isfinite().all()
    assert queue.nearest(z).shape == (30, 8)
