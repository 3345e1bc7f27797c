"""The backends and engines that tests run over, and how to fix one. conftest.py sets the environment first."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import pytest

import fastcl
from fastcl.ops.backends import choose, native, triton_launch

# Backends that take tensors on the CPU. With a GPU, Triton's kernels are not interpreted; `test_gpu.py` tests them.
# `cuda` is listed without a GPU too if torch has CUDA; its kernels are tested on the emulator.
BACKENDS = tuple(
    name for name in choose.AVAILABLE if name != "cuda" and (name != "triton" or triton_launch.INTERPRETED)
)
ENGINES = tuple(native.native_module().supported_engines()) if "cpu" in BACKENDS else ()
# Backends, and as cpu-<instruction set> the engines of `cpu` that are not the default on this machine.
VARIANTS = BACKENDS + tuple(f"cpu-{name}" for name in ENGINES if name != native.engine()[0])
# All but Triton's, which an interpreter runs here: it takes a hundred times as long as the others.
QUICK = tuple(name for name in VARIANTS if name != "triton")
INTERPRETED = tuple(name for name in VARIANTS if name == "triton")
needs_interpreter = pytest.mark.skipif(not INTERPRETED, reason="Triton is not interpreted here")


@contextmanager
def using_engine(name: str | None) -> Iterator[None]:
    """Backend `cpu` runs on the engine of this instruction set, in all threads."""
    with mock.patch.object(native, "engine", return_value=(name, "chosen by a test")):
        yield


@contextmanager
def running(variant: str) -> Iterator[str]:
    """Fixes backend and engine; yields the backend's name."""
    backend, _, engine = variant.partition("-")
    with using_engine(engine or native.engine()[0]), fastcl.use_backend(backend):
        yield backend
