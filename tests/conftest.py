import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

# Before torch loads OpenMP: threads that spin while they wait take minutes if there are more threads than cores.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# The compiler's cache between processes does not notice changes of an operator's shapes.
if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(prefix="fastcl-inductor-")
    atexit.register(shutil.rmtree, os.environ["TORCHINDUCTOR_CACHE_DIR"], ignore_errors=True)

import pytest
import torch
from hypothesis import settings

# Without a GPU the Triton kernels run in Triton's interpreter, which must be enabled before Triton is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from tests.support.backends import INTERPRETED, VARIANTS, running
from tests.support.guarded import guard
from tests.support.interpreter import quicken
from tests.support.lost_device import tidy
from tests.support.order import place

if INTERPRETED:
    quicken()
guard()

# The same examples in every run; HYPOTHESIS_PROFILE=explore draws new ones.
settings.register_profile("fixed", deadline=None, derandomize=True, database=None, print_blob=False)
settings.register_profile("explore", deadline=None, database=None, max_examples=500)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config.option, "loadscopereorder"):  # pytest-xdist's own order: by the number of tests
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):  # in a process of pytest-xdist
        items.sort(key=lambda item: place(item.path))


def pytest_runtest_teardown(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and torch.cuda.is_available():
        tidy()


@pytest.fixture(params=VARIANTS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once on each backend, and on `cpu` once with each engine that this machine supports."""
    with running(request.param) as name:
        yield name


@pytest.fixture(scope="session")
def npz(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few of the digits as a file that the trainer reads."""
    import numpy as np
    from sklearn.datasets import load_digits

    from tests.support.training import COUNT

    digits = load_digits()
    path = tmp_path_factory.mktemp("data") / "few.npz"
    np.savez(path, images=(digits.images[:COUNT] * 15.9).astype(np.uint8), labels=digits.target[:COUNT])
    return path
