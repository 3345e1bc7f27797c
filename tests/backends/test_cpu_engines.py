"""Backend `cpu`: which engine runs, what its results depend on, and how it coexists with threads and processes."""

import ctypes
import gc
import multiprocessing
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

import fastcl
from fastcl.ops.backends import native
from tests.support.backends import BACKENDS, ENGINES, using_engine
from tests.support.strategies import DTYPES, FIELDS, cluster_ids, generator, rows

pytestmark = pytest.mark.skipif(not ENGINES, reason=native.engine()[1])
THREADS = (1, 2, 3, 5, 8)


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> Iterator[str]:
    with using_engine(request.param), fastcl.use_backend("cpu"):
        yield request.param


@pytest.fixture
def _threads_restored() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=300,
    )


def results(dtype: torch.dtype = torch.float32, m: int | None = None, scale: float = 20.0) -> list[Tensor]:
    """All statistics and gradients of one call; 0 for statistics of empty sets."""
    n = 700
    g = generator(0)
    clusters = cluster_ids("random", n + (m or 0), g)
    x = rows("converged", clusters, 33, g, unit=True).to(dtype)
    arguments: dict[str, Tensor] = {"anchors": x[:n].requires_grad_(), "anchor_clusters": clusters[:n]}
    arguments["logit_scale"] = torch.tensor(scale, requires_grad=True)
    if m is not None:
        arguments |= {"contrasts": x[n:].requires_grad_(), "contrast_clusters": clusters[n:]}
    s = fastcl.contrastive_stats(**arguments, normalize_anchors=True, want=FIELDS, both=m is not None)
    fields = [getattr(side, name) for side in (s, s.reverse) if side is not None for name in FIELDS]
    fields = [torch.where(field.isfinite(), field, 0) for field in fields]
    total = sum((field * torch.linspace(-1, 2, len(field))).sum() for field in fields)
    leaves = [value for value in arguments.values() if value.requires_grad]
    return [field.detach() for field in fields] + list(torch.autograd.grad(total, leaves))


# Which engine


CAPPED = """
import torch, fastcl
from fastcl.ops.backends import native
from fastcl.info import report
print(native.engine()[0])
scores = torch.arange(60.0).reshape(6, 10).sin().requires_grad_()
fastcl.sinkhorn(scores).assignments.square().sum().backward()
print(*scores.grad.flatten().tolist())
print(report())
"""


@pytest.mark.parametrize("cap", ENGINES)
def test_environment_caps_the_instruction_set(cap: str) -> None:
    done = run_python(CAPPED, FASTCL_CPU_ISA=cap)
    used, gradient, *text = done.stdout.splitlines()
    assert used == cap, done.stderr
    assert any(f"used: {cap} (at most {cap})" in line for line in text)
    scores = torch.arange(60.0).reshape(6, 10).sin().requires_grad_()
    with using_engine(cap), fastcl.use_backend("cpu"):  # the result of that engine, to the bit
        fastcl.sinkhorn(scores).assignments.square().sum().backward()
    assert torch.equal(scores.grad.flatten(), torch.tensor([float(x) for x in gradient.split()]))


WRONG_CAP = """
import torch, fastcl
from fastcl.info import report
print(report())
for call in (lambda: fastcl.contrastive_stats(torch.ones(3, 2)), lambda: fastcl.ClusterInfoNCE()(torch.ones(3, 2, 4))):
    for backend in (None, "chunked"):
        try:
            if backend:
                with fastcl.use_backend(backend):
                    call()
            else:
                call()
        except ValueError as error:
            print("raised", error)
"""


def test_an_unknown_instruction_set_is_an_error_of_every_call() -> None:
    done = run_python(WRONG_CAP, FASTCL_CPU_ISA="avx9")
    assert done.returncode == 0, done.stderr
    message = f"FASTCL_CPU_ISA: expected one of {', '.join(native.native_module().built_engines())}, got 'avx9'"
    assert done.stdout.count(f"raised {message}") == 4
    assert f"used: none ({message})" in done.stdout
    assert f"nothing: {message}" in done.stdout


# What results depend on


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [None, 420])
@pytest.mark.usefixtures("_threads_restored")
def test_bit_identical_for_a_number_of_threads_and_near_for_any(engine, dtype, m) -> None:
    for scale in (20.0, 300.0):  # one case with one exponential for row and column, one with running maxima
        torch.set_num_threads(1)
        expected = results(dtype, m=m, scale=scale)
        for threads in THREADS:
            torch.set_num_threads(threads)
            first = results(dtype, m=m, scale=scale)
            for got, again, one_thread in zip(first, results(dtype, m=m, scale=scale), expected, strict=True):
                assert torch.equal(got, again)
                size = one_thread.double().norm()
                # logits of 300 and their exponentials have a larger rounding error
                sums = 1000 * torch.finfo(torch.promote_types(one_thread.dtype, torch.float32)).eps
                stored = torch.finfo(one_thread.dtype).eps
                assert (got.double() - one_thread.double()).norm() <= (sums + stored) * size


@pytest.mark.parametrize(("forward", "backward"), [(1, 3), (3, 1), (2, 5)])
@pytest.mark.usefixtures("_threads_restored")
def test_the_number_of_threads_may_change_before_the_backward(engine, forward, backward) -> None:
    """The backward's sums depend on its own number of threads; what it reads of the forward is by row."""
    g = generator(0)
    x = torch.randn(400, 48, generator=g).requires_grad_()
    y = torch.randn(300, 48, generator=g).requires_grad_()
    scores = torch.randn(400, 300, generator=g).requires_grad_()
    clusters = torch.arange(400) % 50

    def gradients(first: int, second: int) -> list[Tensor]:
        torch.set_num_threads(first)
        s = fastcl.contrastive_stats(x, y, clusters, clusters[:300], normalize_anchors=True, both=True)
        total = fastcl.ClusterInfoNCE(0.1)(x.reshape(200, 2, 48)) + s.lse_all.sum() + s.reverse.sum_pos.sum()
        total = total + fastcl.sinkhorn(scores).assignments.square().sum()
        torch.set_num_threads(second)
        return list(torch.autograd.grad(total, (x, y, scores)))

    assert 2 * native.PRODUCTS <= 400 * 300 * 48
    assert 2 * native.SCORES <= 400 * 300
    got = gradients(forward, backward)
    for one, again, other in zip(got, gradients(forward, backward), gradients(1, 1), strict=True):
        assert torch.equal(one, again)
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * float(other.abs().max()))


@pytest.mark.parametrize(
    ("n", "d", "expected"),
    [
        (16, 64, 1),
        (64, 128, 1),
        (128, 128, 1),
        (255, 64, 1),
        (256, 64, 2),
        (256, 128, 4),
        (512, 128, 16),
        (4096, 128, 16),
    ],
)
@pytest.mark.usefixtures("_threads_restored")
def test_the_number_of_threads_follows_the_work(monkeypatch, n: int, d: int, expected: int) -> None:
    torch.set_num_threads(16)
    assert native.threads(n * n * d, native.PRODUCTS) == expected
    described = []
    monkeypatch.setattr(native.native_module(), "forward", lambda _, problem, *rest: described.append(problem))
    monkeypatch.setattr(native, "run", lambda _: None)
    fastcl.contrastive_stats(torch.ones(n, d))
    assert described[0][-2:] == (expected, 0)  # no rules follow
    torch.set_num_threads(3)
    assert native.threads(n * n * d, native.PRODUCTS) == min(expected, 3)


# The process around it


ONE_RUNTIME = """
import re, torch, fastcl
z = torch.randn(600, 2, 16, requires_grad=True)
torch.set_num_threads(3)
fastcl.ClusterInfoNCE()(z).backward()
(torch.randn(2000, 2000) @ torch.randn(2000, 200)).sum()
maps = open("/proc/self/maps").read()
print(sorted(set(re.findall(r"\\S*/(lib(?:gomp|iomp5|omp)[^/\\s]*)", maps))))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_one_openmp_runtime() -> None:
    done = run_python(ONE_RUNTIME)
    assert done.returncode == 0, done.stderr
    runtimes = re.findall(r"'(lib[^']*)'", done.stdout.splitlines()[0])
    assert len(runtimes) == 1, runtimes


FORKED = """
import multiprocessing, torch, fastcl
from tests.support.backends import using_engine

def loss():
    z = torch.randn(300, 2, 16, generator=torch.Generator().manual_seed(0), requires_grad=True)
    value = fastcl.ClusterInfoNCE()(z)
    value.backward()
    return value.item(), z.grad.sum().item()

def child(queue, engine):
    torch.set_num_threads(1)
    with using_engine(engine):
        queue.put(loss())

torch.set_num_threads(4)
loss()
for engine in {engines}:
    queue = multiprocessing.get_context("fork").SimpleQueue()
    process = multiprocessing.get_context("fork").Process(target=child, args=(queue, engine))
    process.start()
    process.join(60)
    if process.is_alive():
        process.kill()
        raise SystemExit("the child hangs")
    assert process.exitcode == 0
    print(queue.get())
"""


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork here")
def test_forked_child_at_one_thread_does_not_hang() -> None:
    done = run_python(FORKED.replace("{engines}", repr(ENGINES)))
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(done.stdout.splitlines()) == len(ENGINES)


def test_other_threads_run_during_a_call(engine, monkeypatch) -> None:
    """A counting thread makes progress during a call. It needs the interpreter's lock, so it can only if the call
    releases the lock."""
    counted = [0]
    stop = threading.Event()
    progress: list[bool] = []

    def count() -> None:
        while not stop.is_set():
            counted[0] += 1
            time.sleep(0)  # releases the lock

    def run(call) -> None:
        workspace = torch.empty(call.workspace, dtype=torch.uint8)
        address = workspace.data_ptr()
        seen = False
        for _ in range(100):  # on a busy machine the thread may not get to run
            before = counted[0]
            call.run(address)
            seen = counted[0] > before
            if seen:
                break
        progress.append(seen)

    monkeypatch.setattr(native, "run", run)
    x = torch.randn(2000, 64, generator=generator(0)).requires_grad_()
    interval = sys.getswitchinterval()
    thread = threading.Thread(target=count)
    sys.setswitchinterval(1000)
    try:
        thread.start()
        fastcl.contrastive_stats(x, want=("lse_all",), normalize_anchors=True).lse_all.sum().backward()
    finally:
        stop.set()
        sys.setswitchinterval(interval)
        thread.join()
    assert progress == [True, True]  # forward and backward


def resident() -> int:
    """The process's resident memory in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.usefixtures("_threads_restored")
def test_no_leak_over_many_calls(engine) -> None:
    """A call of this size arranges over 10 kB and works on more than 200 kB: a leak would show."""
    torch.set_num_threads(1)
    g = generator(0)
    x, y = (torch.randn(size, 8, generator=g).requires_grad_() for size in (256, 200))
    a, c = torch.randint(0, 50, (256,), generator=g), torch.randint(0, 50, (200,), generator=g)

    def call() -> None:
        s = fastcl.contrastive_stats(x, y, a, c, anchor_ids=a, contrast_ids=c, both=True, want=FIELDS)
        torch.autograd.grad(s.lse_all.sum() + s.reverse.lse_neg.sum(), (x, y))

    for _ in range(100):
        call()
    gc.collect()
    before = resident()
    for _ in range(500):
        call()
    gc.collect()
    assert resident() - before < 2 * 2**20


def test_autograd_from_several_threads_at_once(engine) -> None:
    expected = results(m=420)
    got: list[list[Tensor]] = []

    def work() -> None:
        with fastcl.use_backend("cpu"):
            got.extend(results(m=420) for _ in range(5))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 20
    for result in got:
        assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))


@pytest.mark.parametrize("name", [name for name in BACKENDS if name != "reference"])
def test_python_threads_compute_what_one_does(name) -> None:
    """Python threads with OpenMP threads of their own compute what one thread does. The interpreter runs one thread at
    a time."""
    slow = name == "triton"  # interpreted
    z = torch.randn(2 if slow else 4, 5 if slow else 300, 2, 32, generator=generator(0))

    def losses(start: threading.Barrier | None, k: int) -> list[Tensor]:
        found = []
        if start is not None:
            start.wait()
        with fastcl.use_backend(name):
            for temperature in (0.1,) if slow else (0.01, 0.1, 1.0):
                leaf = z[k].clone().requires_grad_()
                loss = fastcl.ClusterInfoNCE(temperature)(leaf)
                loss.backward()
                found += [loss.detach(), leaf.grad]
        return found

    with ThreadPoolExecutor(len(z)) as pool:
        together = list(pool.map(losses, [threading.Barrier(len(z))] * len(z), range(len(z))))
    for k, found in enumerate(together):
        for got, expected in zip(found, losses(None, k), strict=True):
            assert torch.equal(got, expected)


def test_writing_past_the_workspace_fails_a_test() -> None:
    class Call:
        workspace = 100

        def __init__(self, written: int) -> None:
            self.written = written

        def run(self, address: int) -> None:
            ctypes.memset(address, 1, self.written)

    native.run(Call(100))
    with pytest.raises(AssertionError, match="Call: wrote past its workspace of 100 bytes"):
        native.run(Call(101))
