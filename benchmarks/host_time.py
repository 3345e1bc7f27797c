"""``python -m benchmarks.host_time``: the time that Python and the launchers take for one step on a GPU; needs no GPU.

Tensors on the CPU stand in for tensors on a GPU. Triton compiles its kernels for sm_90 and launches them through its
own Python code, but a stub replaces the driver; a stub also replaces the native module of backend ``cuda``. Results are
therefore undefined, and the time lacks what the driver takes for a launch, of torch's operators too. It includes the
work of these operators on the CPU, so the default size is small; no other part depends on the size.
"""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import fastcl
from fastcl import checks
from fastcl.command import Parser, run
from fastcl.ops.backends import choose, cuda_runtime, native, triton_launch, triton_series
from fastcl.ops.contrastive import direct

_PROG = "python -m benchmarks.host_time"
_EXAMPLES = """\
  python -m benchmarks.host_time                       both backends, all cases
  python -m benchmarks.host_time --backend triton      one backend"""

ROWS, DIMENSION = 64, 128
BATCHES, STEPS = 15, 20

Step = Callable[[], None]


# Handle of the k-th kernel, as k * HANDLES: `int abs(int)` takes its lower 32 bits and returns 0, which means success.
HANDLES = 1 << 32


class Launches:
    """What has been launched."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.arguments: list[tuple[str, tuple[int, int, int], list[Any]]] = []  # by Triton: kernel, grid, values
        self.sources: list[tuple[Any, Any]] = []  # of the same launches: what Triton compiled, and its metadata
        self.hooked: list[str] = []  # kernels whose launch came with a profiler's hooks
        self.compiled: list[str] = []  # the k-th has the handle k * HANDLES
        self.quiet = False  # the native module's launches are not recorded, which would take time
        # Called for each recorded one: kernel, grid, threads, shared memory, addresses of its parameters.
        self.seen: Callable[[str, tuple[int, int, int], int, int, int], None] | None = None

    def name_of(self, handle: int) -> str:
        return self.compiled[handle // HANDLES - 1]


_LAUNCH = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_uint64, *[ctypes.c_uint] * 7, *[ctypes.c_void_p] * 3
)  # `cuLaunchKernel`
_FILL = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_uint64, ctypes.c_ubyte, ctypes.c_size_t, ctypes.c_void_p)
_CONTEXT = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)


class _Utils:
    def __init__(self, launches: Launches) -> None:
        self.launches = launches

    def load_binary(self, name: str, *_: Any) -> tuple[int, ...]:
        from triton.compiler import CompiledKernel

        self.launches.compiled.append(name)
        handle = len(self.launches.compiled) * HANDLES
        newer = "n_max_threads" in CompiledKernel._init_handles.__code__.co_names  # than Triton 3.2
        return (0, handle, 0, 0, 1024) if newer else (0, handle, 0, 0)

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232448, "multiprocessor_count": 132}

    def unload_module(self, module: int) -> None: ...


class _Driver:
    """Triton's driver of an imaginary sm_90 device."""

    def __init__(self, launches: Launches) -> None:
        from triton.backends.compiler import GPUTarget

        self.utils, self.target = _Utils(launches), GPUTarget("cuda", 90, 32)

        def launcher(source: Any, metadata: Any) -> Callable[..., None]:
            def launch(x: int, y: int, z: int, stream: int, function: int, *others: Any) -> None:
                _, _, enter, _, *values = others
                name = launches.name_of(function)
                launches.names.append(name)
                launches.arguments.append((name, (x, y, z), values))
                launches.sources.append((source, metadata))
                if getattr(enter, "calls", enter):
                    launches.hooked.append(name)

            return launch

        self.launcher_cls = launcher

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return self.target


class _Kernels:
    """The native module's submodule with the CUDA kernels."""

    emulated = True
    targets = "nothing"
    sinkhorn_whole = 8192

    def __init__(self, launches: Launches) -> None:
        self.launches = launches

    def contrast_forward(self, *_: Any) -> None:
        self.launches.names.append("contrast_forward")

    def contrast_backward(self, *_: Any) -> None:
        self.launches.names.append("contrast_backward")

    def line_count(self, rows: int, where: Any) -> int:
        return min(-(-rows // 128), 132)

    def extreme_blocks(self, rows: int) -> int:
        return -(-rows // 1024)


def _driver(launches: Launches) -> Callable[[], Any]:
    """Stands for `triton_series.driver`."""
    module = native.native_module()
    if module is None:
        return lambda: None

    @_LAUNCH
    def launch(handle: int, x: int, y: int, z: int, threads: int, _: int, __: int, shared: int, *rest: Any) -> int:
        name, (_, parameters, _) = launches.name_of(handle), rest
        launches.names.append(name)
        if launches.seen is not None:
            launches.seen(name, (x, y, z), threads, shared, parameters)
        return 0

    @_FILL
    def fill(*_: Any) -> int:
        return 0

    @_CONTEXT
    def context(_: int) -> int:
        return 0

    def made(launch: Any) -> Any:
        return module.Driver(*(ctypes.cast(each, ctypes.c_void_p).value for each in (launch, fill, context, context)))

    recording, quiet = made(launch), made(ctypes.CDLL(None).abs)
    kept = launch, fill, context  # the driver knows only their addresses

    def driver() -> Any:
        return quiet if launches.quiet and kept else recording

    return driver


@contextmanager
def pretending() -> Iterator[Launches]:
    """Inside, tensors on the CPU are taken for tensors on a GPU whose driver does nothing."""
    launches = Launches()
    with ExitStack() as stack:
        # Values of tensors on a GPU are not looked at, because that would wait for the device.
        stack.enter_context(_code_of(checks.values_visible, _never))
        stack.enter_context(mock.patch.dict(choose.AVAILABLE, {"triton": "a stub", "cuda": "a stub"}))
        stack.enter_context(mock.patch.object(cuda_runtime, "kernels", _constant(_Kernels(launches))))
        stack.enter_context(mock.patch.object(triton_launch, "unsupported_reason", _supported))
        stack.enter_context(mock.patch.object(direct, "TAPED", "cpu"))
        stack.enter_context(mock.patch.object(triton_series, "driver", _driver(launches)))
        stack.enter_context(mock.patch.object(triton_series, "context", return_value=0))
        if triton_launch.availability()[1] != "Triton is not installed":
            from triton.runtime import driver

            name = "_active" if hasattr(driver, "_active") else "active"  # the first since Triton 3.4
            stack.enter_context(mock.patch.object(driver, name, _Driver(launches)))
        yield launches


def _never(tensor: Tensor) -> bool:
    return False


def _constant(value: Any) -> Callable[[], Any]:
    """A function; a mock would take longer than a launch."""
    return lambda: value


def _supported(device: torch.device) -> str:
    return ""


@contextmanager
def _code_of(function: Any, other: Any) -> Iterator[None]:
    """Calls of `function`, which many modules import by name, run `other`."""
    code = function.__code__
    function.__code__ = other.__code__
    try:
        yield
    finally:
        function.__code__ = code


def cases(rows: int, dimension: int) -> dict[str, Step]:
    """A forward and backward of each case."""
    generator = torch.Generator().manual_seed(0)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).requires_grad_()

    def step(loss: Callable[[], Tensor], *leaves: Tensor) -> Step:
        def forward_and_backward() -> None:
            for tensor in leaves:
                tensor.grad = None
            loss().backward()

        return forward_and_backward

    views, left, right = leaf(rows // 2, 2, dimension), leaf(rows, dimension), leaf(rows, dimension)
    clusters, queue = torch.arange(rows // 2) % 7, torch.randn(4 * rows, dimension, generator=generator)
    simclr, supcon, clip = fastcl.ClusterInfoNCE(0.1), fastcl.ClusterInfoNCE(0.1), fastcl.ClipLoss()
    moco = fastcl.ClusterInfoNCE(0.1)
    none = torch.full((4 * rows,), -1)
    return {
        "self-contrast": step(lambda: simclr(views), views),
        "clusters": step(lambda: supcon(views, clusters), views),
        "two sets, both directions": step(lambda: clip(left, right, 10.0), left, right),
        "queue": step(lambda: moco(left, positives=right.detach(), contrasts=queue, contrast_clusters=none), left),
    }


def eager_cases(rows: int, dimension: int) -> dict[str, Step]:
    """Two of these losses as users of PyTorch write them, for comparison in the same run."""
    functional = torch.nn.functional
    views = torch.randn(rows // 2, 2, dimension).requires_grad_()
    left, right = (torch.randn(rows, dimension).requires_grad_() for _ in range(2))
    clusters = (torch.arange(rows // 2) % 7).repeat_interleave(2)
    itself = torch.eye(rows, dtype=torch.bool)

    def supcon() -> None:
        views.grad = None
        unit = functional.normalize(views.flatten(0, 1), dim=1)
        log_shares = (unit @ unit.T / 0.1).masked_fill(itself, -torch.inf).log_softmax(1)
        positive = (clusters[:, None] == clusters) & ~itself
        sums = log_shares.masked_fill(~positive, 0).sum(1)
        (-sums / positive.sum(1)).mean().backward()

    def clip() -> None:
        left.grad = right.grad = None
        logits = 10.0 * (functional.normalize(left, dim=1) @ functional.normalize(right, dim=1).T)
        own = torch.arange(rows)
        ((functional.cross_entropy(logits, own) + functional.cross_entropy(logits.T, own)) / 2).backward()

    return {"clusters": supcon, "two sets, both directions": clip}


def measure(step: Step, launches: Launches) -> tuple[float, list[str], int]:
    """Milliseconds of a step, the kernels that it launches, and the number of torch's operators that it calls.

    The time is processor time, the least of some batches: other programs on the machine hardly disturb it.
    """
    for _ in range(5):
        step()
    launches.names.clear()
    with torch.autograd.profiler.profile() as profile:
        step()
    names = list(launches.names)
    launches.arguments.clear()
    launches.sources.clear()
    operators = sum(
        event.name.startswith("aten::") and (event.cpu_parent is None or not event.cpu_parent.name.startswith("aten::"))
        for event in profile.function_events
    )
    times = []
    launches.quiet = True
    for _ in range(BATCHES):
        start = time.thread_time()
        for _ in range(STEPS):
            step()
        times.append((time.thread_time() - start) / STEPS * 1e3)
    launches.quiet = False
    return min(times), names, operators


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = Parser(_PROG, str(__doc__), _EXAMPLES)
    parser.add_argument("--backend", choices=("triton", "cuda"), help="only this one")
    parser.add_argument("--rows", type=int, default=ROWS, help="anchors of a case (default: %(default)s)")
    parser.add_argument("--dimension", type=int, default=DIMENSION, help="numbers of a row (default: %(default)s)")
    options = parser.parse_args(argv)
    if triton_launch.INTERPRETED:
        parser.error("TRITON_INTERPRET is set: nothing is launched then")
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, Triton {triton_launch.triton_version()}, Python {sys.version.split()[0]}")
    print(f"{'backend':<8}{'case':<28}{'ms':>7}{'launches':>10}{'kernels compiled':>18}{'operators of torch':>20}")
    for name, step in eager_cases(options.rows, options.dimension).items():
        milliseconds, _, operators = measure(step, Launches())
        print(f"{'eager':<8}{name:<28}{milliseconds:>7.3f}{0:>10}{0:>18}{operators:>20}")
    with pretending() as launches:
        for backend in (options.backend,) if options.backend else ("triton", "cuda"):
            for name, step in cases(options.rows, options.dimension).items():
                with fastcl.use_backend(backend):
                    before = len(launches.compiled)
                    step()
                    compiled = len(launches.compiled) - before
                    milliseconds, kernels, operators = measure(step, launches)
                print(f"{backend:<8}{name:<28}{milliseconds:>7.3f}{len(kernels):>10}{compiled:>18}{operators:>20}")
    return 0


if __name__ == "__main__":
    run(_PROG, main)
