"""Backend ``cuda`` without a GPU: csrc/tests/emulator.h runs the kernels, compiled for the host."""

import fcntl
import importlib.util
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from fastcl import use_backend
from fastcl.ops.backends import choose, cuda_runtime
from tests.support.backends import running

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "build" / "emulated"


def _run(*command: object) -> None:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@cache
def module() -> Any:
    """The native module with emulated kernels, built if it is out of date."""
    if platform.machine() not in ("x86_64", "AMD64") or not sys.platform.startswith("linux"):
        pytest.skip("the emulator is for Linux on x86-64")
    beside = [str(Path(sys.executable).parent / name) for name in ("cmake", "ninja")]
    tools = [shutil.which(path) or shutil.which(Path(path).name) for path in beside]
    if not all(tools) or shutil.which("c++") is None:
        pytest.skip("CMake, Ninja and a C++ compiler build the emulator")
    pybind11 = pytest.importorskip("pybind11")
    FOLDER.mkdir(parents=True, exist_ok=True)
    with (FOLDER / "lock").open("w") as lock:  # another process may build it too
        fcntl.flock(lock, fcntl.LOCK_EX)
        cmake, ninja = tools
        options = {
            "CMAKE_MAKE_PROGRAM": ninja,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "Python_EXECUTABLE": sys.executable,
            "FASTCL_EMULATOR": "ON",
        }
        settings = [f"-D{name}={value}" for name, value in options.items()]
        _run(cmake, "-S", ROOT, "-B", FOLDER, "-G", "Ninja", *settings)
        _run(cmake, "--build", FOLDER)
    (path,) = FOLDER.glob("_native*" + importlib.machinery.EXTENSION_SUFFIXES[0])
    spec = importlib.util.spec_from_file_location("emulated._native", path)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@contextmanager
def emulating() -> Iterator[None]:
    """Backend ``cuda`` takes tensors on the CPU."""
    kernels = module().cuda
    with (
        mock.patch.object(cuda_runtime, "kernels", return_value=kernels),
        mock.patch.dict(choose.AVAILABLE, {"cuda": "emulated"}),
    ):
        yield


@contextmanager
def on(name: str) -> Iterator[None]:
    """Runs a variant of `tests.support.backends`, or "cuda" by the emulator."""
    if name == "cuda":
        with emulating(), use_backend("cuda"):
            yield
    else:
        with running(name):
            yield
