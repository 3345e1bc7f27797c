"""Which backends and engines tests run over, and how one is fixed. conftest.py sets the environment first."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import pytest

import fastcl
from fastcl.ops.backends import choose, native, triton_launch

# What takes tensors on the CPU; with a GPU, Triton's kernels are not interpreted, and `test_gpu.py` is theirs. Those of
# CUDA are there without a GPU too, where torch knows of CUDA; emulated, they have tests of their own.
BACKENDS = tuple(
    name for name in choose.AVAILABLE if name != "cuda" and (name != "triton" or triton_launch.INTERPRETED)
)
ENGINES = tuple(native.native_module().supported_engines()) if "cpu" in BACKENDS else ()
# Backends, and the engines of `cpu` that it does not use by itself on this machine, as cpu-<instruction set>.
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
