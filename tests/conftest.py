import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

# Before torch loads OpenMP: threads that spin while they wait take minutes where more of them run than there are cores.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# What the compiler keeps between processes knows nothing of a change in an operator's shapes.
if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(prefix="fastcl-inductor-")
    atexit.register(shutil.rmtree, os.environ["TORCHINDUCTOR_CACHE_DIR"], ignore_errors=True)

import pytest
import torch
from hypothesis import settings

# Without a GPU the Triton kernels run in Triton's interpreter. It has to know before it is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import fastcl
from fastcl.kernels import native, ops, triton_engine

# The same examples on every run; HYPOTHESIS_PROFILE=explore draws new ones.
settings.register_profile("fixed", deadline=None, derandomize=True, database=None, print_blob=False)
settings.register_profile("explore", deadline=None, database=None, max_examples=500)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))

# What takes tensors on the CPU; with a GPU, Triton's kernels are not interpreted, and `test_gpu.py` is theirs. Those of
# CUDA are there without a GPU too, where torch knows of CUDA; emulated, they have tests of their own.
BACKENDS = tuple(name for name in ops.BACKENDS if name != "cuda" and (name != "triton" or triton_engine.INTERPRETED))
ENGINES = tuple(native.native_module().supported_engines()) if "cpu" in BACKENDS else ()
# Backends, and the engines of `cpu` that it does not use by itself on this machine, as cpu-<instruction set>.
VARIANTS = BACKENDS + tuple(f"cpu-{name}" for name in ENGINES if name != native.engine()[0])


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


@pytest.fixture(params=VARIANTS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once on each backend, and on `cpu` once with each engine that this machine has."""
    with running(request.param) as name:
        yield name


@pytest.fixture(scope="session")
def npz(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few of the digits as a file that the trainer reads."""
    import numpy as np
    from sklearn.datasets import load_digits
    from training import COUNT

    digits = load_digits()
    path = tmp_path_factory.mktemp("data") / "few.npz"
    np.savez(path, images=(digits.images[:COUNT] * 15.9).astype(np.uint8), labels=digits.target[:COUNT])
    return path
