"""What torch and its tools require: registration, compilation, autocast, memory, backends."""

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from itertools import cycle, product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

import fastcl
from fastcl.functional import cluster_infonce
from fastcl.ops.backends import choose
from fastcl.ops.contrastive import direct
from tests.support.backends import BACKENDS, VARIANTS
from tests.support.pairs import pairs
from tests.support.strategies import FIELDS, cluster_ids, generator

ROOT = Path(__file__).parents[2]
FORWARD = torch.ops.fastcl.contrastive_stats_fwd.default
BACKWARD = torch.ops.fastcl.contrastive_stats_bwd.default


def x(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=generator(seed)).to(dtype)


class Calls(TorchDispatchMode):
    """Records the calls of fastcl's operators in this thread, as (name, arguments by name)."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fastcl":
            names = [argument.name for argument in func._schema.arguments]
            self.calls.append((func.name(), dict(zip(names, args, strict=False)) | (kwargs or {})))
        return func(*args, **(kwargs or {}))

    @property
    def backends(self) -> list[str]:
        return [arguments["backend"] for _, arguments in self.calls]


def backend_in_use() -> str:
    with Calls() as calls:
        fastcl.contrastive_stats(torch.ones(2, 2))
    (name,) = calls.backends
    return name


# Registration

DIFFERENTIABLE = ("anchor_values", "contrast_values", "logit_scale", "contrast_bias", "positives")

SIMPLE = {
    **{argument.name: None for argument in FORWARD._schema.arguments},
    "logit_scale": torch.tensor([2.0]),
    "anchor_normalize": False,
    "contrast_normalize": False,
    "want": ["lse_all", "sum_pos"],
    "both": False,
    "anchors_only": False,
    "observe": False,
}


def op_arguments(case: str, backend: str, dtype: torch.dtype, grad: bool) -> tuple[Any, ...]:
    """Arguments of the forward operator."""
    arguments: dict[str, Any] = SIMPLE | {"anchor_values": x(5, 3, dtype=dtype)}
    if dtype == torch.float64 and backend not in choose.FLOAT64:
        backend = "chunked"
    accumulation = torch.float64 if dtype == torch.float64 else torch.float32
    if case == "self-contrast":
        arguments |= {
            "anchor_clusters": torch.tensor([0, 0, 1, 1, -1]),
            "anchor_normalize": True,
            "anchor_bias": x(5),
            "want": list(FIELDS),
        }
    if case == "queue":
        arguments |= {
            "contrast_values": x(9, 3, seed=1, dtype=dtype),
            "positives": x(5, 3, seed=3, dtype=dtype),
            "anchor_normalize": True,
            "want": ["lse_all", "lse_neg"],
            "anchors_only": True,
            "observe": True,
        }
    if case == "everything":
        arguments |= {
            "contrast_values": x(7, 3, seed=1, dtype=dtype),
            "positives": x(5, 3, seed=3, dtype=dtype),
            "anchor_clusters": torch.tensor([0, 0, 1, 1, -1]),
            "contrast_clusters": torch.tensor([0, 1, 2, 1, 0, -1, -1]),
            "logit_scale": torch.tensor([2.0, 0.5]),
            "contrast_bias": x(7, seed=2),
            "anchor_ids": torch.tensor([0, 1, 2, 3, -1]),
            "contrast_ids": torch.tensor([0, -1, -1, 2, -1, 1, 5]),
            "anchor_normalize": True,
            "contrast_normalize": True,
            "want": list(FIELDS),
            "both": True,
            "observe": True,
        }
    for name in ("logit_scale", "anchor_bias", "contrast_bias"):
        if arguments[name] is not None:
            arguments[name] = arguments[name].to(accumulation)
    if grad:
        for name in ("anchor_values", "positives") if arguments["anchors_only"] else (*DIFFERENTIABLE, "anchor_bias"):
            if arguments[name] is not None:
                arguments[name] = arguments[name].detach().clone().requires_grad_()
    arguments["backend"] = backend
    return tuple(arguments[argument.name] for argument in FORWARD._schema.arguments)


CASES = ("required", "self-contrast", "queue", "everything")
DTYPES = (torch.float32, torch.bfloat16, torch.float64)


@pairs(case=CASES, backend=VARIANTS, dtype=DTYPES, grad=[False, True])
def test_opcheck_of_the_forward(case, grad, dtype, backend) -> None:
    torch.library.opcheck(FORWARD, op_arguments(case, backend, dtype, grad))


@pytest.mark.parametrize(
    ("name", "backend"), list(zip(DIFFERENTIABLE, cycle(VARIANTS), strict=False)), indirect=["backend"]
)
def test_opcheck_where_one_input_needs_a_gradient(name, backend) -> None:
    names = [argument.name for argument in FORWARD._schema.arguments]
    arguments = list(op_arguments("everything", backend, torch.float32, False))
    arguments[names.index(name)].requires_grad_()
    torch.library.opcheck(FORWARD, tuple(arguments))


def backward_arguments(case: str, backend: str, dtype: torch.dtype, needs: list[bool]) -> tuple[Any, ...]:
    arguments = op_arguments(case, backend, dtype, False)
    fields, counts, parts, contrast_fields, contrast_counts, contrast_parts, *norms, _ = FORWARD(*arguments)
    saved = (counts, parts, contrast_counts, contrast_parts, *norms)
    gradients = (torch.ones_like(fields), torch.ones_like(contrast_fields))
    return (*arguments, *saved, *gradients, needs)


@pairs(case=CASES, backend=VARIANTS, dtype=DTYPES, needed=range(3))
def test_opcheck_of_the_backward(case, dtype, needed, backend) -> None:
    whole = case == "everything"
    present = [True, whole, True, case != "required", whole, *[False] * 3]
    needs = (present, [True, *[False] * 7], [False, False, True, False, whole, *[False] * 3])[needed]
    torch.library.opcheck(BACKWARD, backward_arguments(case, backend, dtype, needs))


def test_opcheck_of_the_backward_with_inputs_that_need_gradients(backend) -> None:
    """All checks but the derivative, which raises (below)."""
    arguments = list(backward_arguments("everything", backend, torch.float32, [True] * 5 + [False] * 3))
    arguments[0].requires_grad_()
    torch.library.opcheck(
        BACKWARD, tuple(arguments), test_utils=("test_schema", "test_autograd_registration", "test_faketensor")
    )


def test_gradients_have_the_strides_that_tracing_is_told(backend) -> None:
    """Compiled code reads gradients by the strides of the fake ones."""
    names = [argument.name for argument in FORWARD._schema.arguments]
    arguments = list(op_arguments("everything", backend, torch.float32, False))
    for name in ("anchor_values", "contrast_values", "positives"):
        index = names.index(name)
        arguments[index] = arguments[index].T.contiguous().T
        assert not arguments[index].is_contiguous()
    fields, counts, parts, contrast_fields, contrast_counts, contrast_parts, *norms, _ = outputs = FORWARD(*arguments)
    saved = (counts, parts, contrast_counts, contrast_parts, *norms)
    gradients = (torch.ones_like(fields), torch.ones_like(contrast_fields))
    for output in (*outputs, *BACKWARD(*arguments, *saved, *gradients, [True] * 5 + [False] * 3)):
        assert output.is_contiguous()


# Second derivatives


def test_second_derivatives_raise(backend) -> None:
    z = x(6, 2, 3).requires_grad_()
    temperature = torch.tensor(0.2, requires_grad=True)
    loss = cluster_infonce(z, temperature=temperature)
    for first in torch.autograd.grad(loss, [z, temperature], create_graph=True):
        with pytest.raises(RuntimeError, match="second derivatives are not supported"):
            first.square().sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives are not supported"):
        torch.autograd.functional.hessian(lambda z: cluster_infonce(z), z)


@pytest.mark.parametrize("name", ["anchors", "contrasts", "logit_scale", "contrast_bias"])
def test_second_derivatives_raise_in_each_argument(name, backend) -> None:
    arguments = {"anchors": x(4, 3), "contrasts": x(5, 3), "logit_scale": torch.tensor(2.0), "contrast_bias": x(5)}
    leaf = arguments[name].requires_grad_()
    (first,) = torch.autograd.grad(fastcl.contrastive_stats(**arguments).lse_all.sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives are not supported"):
        first.sum().backward()


def test_first_derivatives_may_be_taken_more_than_once(backend) -> None:
    z = x(6, 2, 3).requires_grad_()
    loss = cluster_infonce(z)
    (first,) = torch.autograd.grad(loss, z, retain_graph=True)
    (again,) = torch.autograd.grad(loss, z)
    assert torch.equal(first, again)


def test_inputs_changed_in_place_before_the_backward_are_noticed(backend) -> None:
    z = x(6, 3).requires_grad_()
    rows = z * 1
    loss = fastcl.contrastive_stats(rows, want=("lse_all",)).lse_all.sum()
    rows.data.add_(0)  # autograd does not notice
    loss.backward(retain_graph=True)
    with torch.no_grad():
        rows.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# torch.compile


def self_contrast(z: Tensor, clusters: Tensor, temperature: Tensor) -> Tensor:
    return cluster_infonce(z, clusters, temperature=temperature)


def two_sets(z: Tensor, clusters: Tensor, temperature: Tensor) -> Tensor:
    """Many options at once; contrasts are the rows in another order."""
    flat = z.flatten(0, 1)
    return cluster_infonce(
        z,
        clusters,
        contrasts=[flat.roll(1, 0), flat[:3].detach()],
        positives=z.flip(1),
        ids=clusters.abs(),
        contrast_ids=torch.arange(flat.shape[0] + 3) - 4,
        contrast_bias=flat.sum(1).new_zeros(flat.shape[0] + 3),
        weights=z.detach().abs().sum((1, 2)),
        form="inside",
        denominator="negatives",
        margin=0.1,
        symmetric=True,
        temperature=temperature,
    )


def own_formula(z: Tensor, clusters: Tensor, temperature: Tensor) -> Tensor:
    s = fastcl.contrastive_stats(
        z[:, 0], anchor_clusters=clusters, logit_scale=1 / temperature, normalize_anchors=True, want=FIELDS
    )
    return torch.where(s.valid, s.lse_all - s.sum_pos / s.num_pos + s.lse_neg - s.lse_pos, 0).sum() / s.valid.sum()


def with_gradients(function: Callable[..., Tensor], n: int) -> list[Tensor]:
    z = x(n, 2, 5, seed=n).requires_grad_()
    temperature = torch.tensor(0.3, requires_grad=True)
    loss = function(z, cluster_ids("negatives", n, generator(n)), temperature)
    return [loss.detach(), *torch.autograd.grad(loss, (z, temperature))]


# Inductor's own imports in the first compilation.
# Warnings from torch 2.13's inductor and from torch 2.6's.
inductor = pytest.mark.filterwarnings(
    "ignore:`torch.jit.script_method` is deprecated:DeprecationWarning",
    "ignore:Skipping serialization of skipfiles_inline_module_allowlist:UserWarning",
)


@pytest.fixture
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.slow
@inductor
@pytest.mark.usefixtures("_fresh_dynamo")
def test_compile() -> None:
    """fullgraph: no graph break; through inductor. Self-contrast: with dynamic shapes, below."""
    compiled = torch.compile(two_sets, fullgraph=True, dynamic=False)
    torch.testing.assert_close(with_gradients(compiled, 12), with_gradients(two_sets, 12))


@pytest.mark.slow
@inductor
@pytest.mark.usefixtures("_fresh_dynamo")
def test_compile_of_transposed_rows() -> None:
    """The layout of features from a convolution."""

    def function(w: Tensor, y: Tensor, p: Tensor) -> Tensor:
        return cluster_infonce(w.t(), contrasts=y.t(), positives=p.t(), symmetric=True)

    leaves = [x(3, 8, seed=i).requires_grad_() for i in range(3)]
    compiled = torch.compile(function, fullgraph=True)
    got, expected = (torch.autograd.grad(f(*leaves), leaves) for f in (compiled, function))
    torch.testing.assert_close(got, expected)


@pytest.mark.slow
@inductor
@pytest.mark.usefixtures("_fresh_dynamo")
def test_compile_with_dynamic_shapes() -> None:
    """One graph for every N."""
    compiled = torch.compile(self_contrast, fullgraph=True, dynamic=True)
    for n in (12, 7, 30):
        torch.testing.assert_close(with_gradients(compiled, n), with_gradients(self_contrast, n))
    torch._dynamo.reset()
    graphs: list[Any] = []
    counted = torch.compile(self_contrast, fullgraph=True, dynamic=True, backend=counting(graphs))
    for n in (12, 7, 30):
        with_gradients(counted, n)
    assert len(graphs) == 1


def counting(graphs: list[Any]) -> Callable[..., Any]:
    """A dynamo backend that runs the graph and appends it to `graphs`."""

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    return backend


@pytest.mark.usefixtures("_fresh_dynamo")
@pytest.mark.parametrize(
    ("function", "dynamic", "backend"),
    [(*call, b) for call, b in zip(product([self_contrast, two_sets, own_formula], [False, True]), cycle(BACKENDS))],
)
def test_trace_without_graph_break(function, dynamic, backend) -> None:
    """By AOTAutograd without generated code."""
    with fastcl.use_backend(backend):
        compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
        for n in (12, 7) if dynamic else (12,):
            torch.testing.assert_close(with_gradients(compiled, n), with_gradients(function, n))


@pytest.mark.usefixtures("_fresh_dynamo")
def test_compiled_module_learns_its_temperature() -> None:
    module = fastcl.ClusterInfoNCE(torch.nn.Parameter(torch.tensor(0.3)))
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    z = x(6, 2, 3)
    compiled(z).backward()
    got, module.temperature.grad = module.temperature.grad, None
    module(z).backward()
    torch.testing.assert_close(got, module.temperature.grad)


# Autocast


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
def test_autocast_leaves_float32_rows_alone(autocast, backend) -> None:
    def run():
        z = x(8, 2, 16).requires_grad_()
        temperature = torch.tensor(0.1, requires_grad=True)
        loss = cluster_infonce(z, temperature=temperature, contrasts=x(20, 16, seed=1), positives=x(8, 2, 16, seed=2))
        return loss, *torch.autograd.grad(loss, (z, temperature))

    expected = run()
    with torch.autocast("cpu", dtype=autocast):
        got = run()
    assert got[0].dtype == torch.float32
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


@pairs(backend=VARIANTS, autocast=[False, True], normalize=[False, True], dtype=[torch.bfloat16, torch.float16])
def test_half_precision_rows_stay_so_into_the_op(autocast, normalize, dtype, backend) -> None:
    z = x(8, 2, 16).to(dtype).requires_grad_()
    queue = x(20, 16, seed=1).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        with Calls() as calls:
            loss = cluster_infonce(z, contrasts=queue, normalize=normalize)
        (gradient,) = torch.autograd.grad(loss, z)
    ((_, arguments),) = calls.calls
    assert arguments["anchor_values"].dtype == dtype
    assert arguments["contrast_values"].dtype == dtype
    assert loss.dtype == torch.float32
    assert gradient.dtype == dtype
    plain = cluster_infonce(z, contrasts=queue, normalize=normalize)
    # Triton's mean is a kernel unless intercepted.
    assert torch.allclose(loss, plain, 1e-6 * (backend == "triton"), 0)
    assert torch.equal(gradient, torch.autograd.grad(plain, z)[0])


def test_backward_outside_autocast(backend) -> None:
    z = x(8, 2, 16).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = cluster_infonce(z)
    (gradient,) = torch.autograd.grad(loss, z)
    assert torch.equal(gradient, torch.autograd.grad(cluster_infonce(z), z)[0])


def test_training_under_autocast(backend) -> None:
    """The projector's output is bfloat16, and its weights get a gradient."""
    layer = torch.nn.Linear(6, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16), Calls() as calls:
        loss = cluster_infonce(layer(x(10, 2, 6)))
    assert calls.calls[0][1]["anchor_values"].dtype == torch.bfloat16
    loss.backward()
    assert layer.weight.grad.dtype == torch.float32
    assert layer.weight.grad.abs().sum() > 0


# Memory


def allocated(run: Callable[[], object]) -> tuple[int, int]:
    """Largest CPU allocation, and the peak of all, in bytes above the start."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    sizes = [event.nbytes() for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    assert sizes, "the profiler saw no allocation"
    now = peak = 0
    for size in sizes:
        now += size
        peak = max(peak, now)
    return max(sizes), peak


def forward_and_backward(n: int, d: int, m: int | None = None, **options: Any) -> Callable[[], None]:
    z = x(n, d).requires_grad_()
    contrasts = None if m is None else x(m, d, seed=1).requires_grad_()
    clusters = torch.arange(n) // 4

    def run() -> None:
        if contrasts is None:
            cluster_infonce(z, clusters, **options).backward()
        else:
            owners = torch.arange(m) // 4
            cluster_infonce(z, clusters, contrasts=contrasts, contrast_clusters=owners, **options).backward()

    return run


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"form": "inside", "denominator": "negatives", "margin": 0.1}])
def test_chunked_never_holds_all_logits(options) -> None:
    n, d = 8192, 16
    with fastcl.use_backend("chunked"):
        largest, peak = allocated(forward_and_backward(n, d, **options))
    assert largest < n * n // 4  # not even a mask of a quarter of the pairs
    assert peak < n * n  # bytes; the logits would take four times that


def test_chunked_never_holds_all_logits_of_two_sets() -> None:
    n, m, d = 2048, 6144, 16
    with fastcl.use_backend("chunked"):
        largest, peak = allocated(forward_and_backward(n, d, m, symmetric=True))
    assert largest < n * m
    assert peak < 4 * n * m


def test_the_default_backend_never_holds_all_logits() -> None:
    n = 4096
    largest, _ = allocated(forward_and_backward(n, 16))
    assert largest < n * n


def test_the_probe_of_memory_sees_the_reference() -> None:
    n = 1024
    with fastcl.use_backend("reference"):
        largest, peak = allocated(forward_and_backward(n, 16))
    assert largest >= 4 * n * n
    assert peak >= 4 * n * n


# Backends


@pytest.fixture
def _no_environment(monkeypatch):
    monkeypatch.delenv("FASTCL_BACKEND", raising=False)


@pytest.mark.usefixtures("_no_environment")
def test_use_backend_nests_and_restores() -> None:
    default = backend_in_use()
    assert default == ("cpu" if "cpu" in BACKENDS else "chunked")
    with fastcl.use_backend("reference"):
        assert backend_in_use() == "reference"
        with fastcl.use_backend("chunked"):
            assert backend_in_use() == "chunked"
        assert backend_in_use() == "reference"
        with pytest.raises(KeyError), fastcl.use_backend("chunked"):
            raise KeyError
        assert backend_in_use() == "reference"
        with pytest.raises(ValueError, match="nonsense"), fastcl.use_backend("nonsense"):
            pass
        assert backend_in_use() == "reference"
    assert backend_in_use() == default


@pytest.mark.usefixtures("_no_environment")
def test_use_backend_is_of_one_thread() -> None:
    """One thread inside a block for each backend at the same time, and one outside."""
    meet = threading.Barrier(len(BACKENDS) + 1, timeout=30)
    seen: dict[str, list[str]] = {}

    def work(name: str) -> None:
        with fastcl.use_backend(name):
            meet.wait()
            seen[name] = [backend_in_use()]
            meet.wait()
            seen[name].append(backend_in_use())
            meet.wait()

    threads = [threading.Thread(target=work, args=(name,)) for name in BACKENDS]
    for thread in threads:
        thread.start()
    meet.wait()
    mine = [backend_in_use()]
    meet.wait()
    meet.wait()
    mine.append(backend_in_use())
    for thread in threads:
        thread.join()
    assert seen == {name: [name, name] for name in BACKENDS}
    assert mine == ["cpu" if "cpu" in BACKENDS else "chunked"] * 2


@pytest.mark.parametrize("forward", BACKENDS)
@pytest.mark.parametrize("backward", BACKENDS)
def test_backward_under_another_backend(forward, backward, monkeypatch) -> None:
    monkeypatch.setattr(direct, "AT_ONCE", 0)  # otherwise a small batch already has its gradient
    z = x(9, 2, 4).requires_grad_()
    with fastcl.use_backend(forward):
        loss = cluster_infonce(z)
        (expected,) = torch.autograd.grad(loss, z, retain_graph=True)
    with fastcl.use_backend(backward), Calls() as calls:
        (got,) = torch.autograd.grad(loss, z)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-7)
    # Under the mode `Calls` the native engine's mean loss runs the operators, forward included.
    assert calls.backends == [forward] * (2 if loss.grad_fn.native else 1)


@pytest.mark.parametrize("name", BACKENDS)
def test_environment_chooses_the_backend(name, monkeypatch) -> None:
    monkeypatch.setenv("FASTCL_BACKEND", name)
    assert backend_in_use() == name
    other = BACKENDS[1 - BACKENDS.index(name)]
    with fastcl.use_backend(other):
        assert backend_in_use() == other
    assert backend_in_use() == name


def test_environment_names_an_unknown_backend(monkeypatch) -> None:
    monkeypatch.setenv("FASTCL_BACKEND", "nonsense")
    with pytest.raises(ValueError, match=r"FASTCL_BACKEND.*nonsense"):
        fastcl.contrastive_stats(torch.ones(2, 2))


def test_environment_of_a_new_process() -> None:
    code = "import torch, fastcl; fastcl.contrastive_stats(torch.ones(2, 2)); print('fine')"
    for name, outcome in (("reference", "fine"), ("nonsense", "ValueError: FASTCL_BACKEND")):
        result = subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"FASTCL_BACKEND": name},
            capture_output=True,
            text=True,
            check=False,
        )
        assert outcome in result.stdout + result.stderr
        assert (result.returncode == 0) == (outcome == "fine")


def test_threads_at_the_same_time_give_the_same_numbers(backend) -> None:
    """Backwards run on the thread that asks."""
    n = 20 if backend == "triton" else 50
    expected = with_gradients(self_contrast, n)
    results: list[list[Tensor]] = []

    def work() -> None:
        with fastcl.use_backend(backend):
            results.append(with_gradients(self_contrast, n))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    for result in results:
        torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-7)


# Import


def test_importing_and_using_fastcl_does_not_import_the_compiler() -> None:
    """Nor SymPy."""
    code = (
        "import sys, torch, fastcl; fastcl.ClusterInfoNCE()(torch.ones(2, 2, 2, requires_grad=True)).backward(); "
        "print({'torch._dynamo', 'sympy'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_gradients_in_a_batch(backend) -> None:
    """Tensors under vmap look plain to Python: the operator must still get them."""
    q = torch.randn(8, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    lse = fastcl.contrastive_stats(q, want=("lse_all",)).lse_all
    one_by_one = [torch.autograd.grad(lse, q, row, retain_graph=True)[0] for row in torch.eye(8)[:3]]
    (batched,) = torch.autograd.grad(lse, q, torch.eye(8)[:3], is_grads_batched=True)
    torch.testing.assert_close(batched, torch.stack(one_by_one))


def test_tensors_without_data() -> None:
    stats = fastcl.contrastive_stats(torch.randn(4, 8, device="meta"), want=("lse_all",))
    assert stats.lse_all.device.type == "meta"
    assert stats.lse_all.shape == (4,)


def test_default_device_does_not_matter(backend) -> None:
    rows = torch.randn(6, 4)
    clusters, bias = torch.arange(6) // 2, torch.randn(6)
    with torch.device("meta"):
        stats = fastcl.contrastive_stats(rows, anchor_clusters=clusters, contrast_bias=bias)
    assert torch.equal(
        stats.lse_all, fastcl.contrastive_stats(rows, anchor_clusters=clusters, contrast_bias=bias).lse_all
    )
