"""Whether setup.py builds the CUDA kernels, what it does if the build fails, and what the module then reports."""

import os
import platform
import re
import sys
from pathlib import Path

import pytest

from fastcl.ops.backends import cuda_runtime, native
from tests.project.test_packaging import MODULE, attempt, copy_source, needs_compiler, run

BUILD = (sys.executable, "setup.py", "build_ext", "--inplace")
# Compiles quickly. Its message about nvcc is the one that CMake prints for a broken nvcc.
SMALL_PROJECT = """
cmake_minimum_required(VERSION 3.18)
project(fastcl LANGUAGES CXX)
if(FASTCL_CUDA)
  enable_language(CUDA)
endif()
find_package(Python COMPONENTS Interpreter Development.Module REQUIRED)
Python_add_library(_native MODULE WITH_SOABI csrc/module.cpp)
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """The sources of a small project that look for nvcc only on PATH and in CUDA_HOME, and for a driver on PATH."""
    where = copy_source(tmp_path / "source")
    (where / "CMakeLists.txt").write_text(SMALL_PROJECT)
    (where / "csrc" / "module.cpp").write_text("int works;")
    setup = (where / "setup.py").read_text()
    for there, instead in (
        ('(home, "/usr/local/cuda")', "(home,)"),
        ('("libcuda.so.1", "nvcuda.dll")', '("absent.so",)'),
        ('"/proc/driver/nvidia"', '"/absent"'),
    ):
        assert setup.count(there) == 1
        setup = setup.replace(there, instead)
    (where / "setup.py").write_text(setup)
    return where


def without_cuda(where: Path) -> str:
    """PATH without nvcc and nvidia-smi: links to the programs of all folders, but these two."""
    links = where / "without_cuda"
    links.mkdir()
    for folder in [*os.environ["PATH"].split(os.pathsep), str(Path(sys.executable).parent)]:
        for program in Path(folder).iterdir() if Path(folder).is_dir() else ():
            if program.name not in ("nvcc", "nvidia-smi") and not (links / program.name).is_symlink():
                (links / program.name).symlink_to(program)
    return str(links)


def program(where: Path, name: str, script: str) -> Path:
    """The folder of a new program."""
    folder = where / name / "bin"
    folder.mkdir(parents=True)
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)
    return folder


def broken_nvcc(where: Path) -> dict[str, str]:
    """Variables with which setup.py finds a driver, and an nvcc that fails."""
    nvcc = program(where, "nvcc", "echo nvcc fatal: out of order >&2; exit 1")
    driver = program(where, "nvidia-smi", "exit 0")
    return {"CUDA_HOME": str(nvcc.parent), "PATH": os.pathsep.join((without_cuda(where), str(driver)))}


@needs_compiler
def test_without_nvcc(source: Path, tmp_path: Path) -> None:
    environment = {"PATH": without_cuda(tmp_path), "CUDA_HOME": ""}
    module, failure = source / "fastcl" / MODULE, source / "fastcl" / "_cuda_failure.py"
    done = attempt(*BUILD, cwd=source, FASTCL_CUDA="1", **environment)
    assert done.returncode != 0
    assert "FASTCL_CUDA=1, but nvcc was not found on PATH, in CUDA_HOME or in /usr/local/cuda" in done.stderr
    assert not module.exists()
    for wanted, reason in (("auto", "nvcc was not found"), ("", "nvcc was not found"), ("0", "FASTCL_CUDA=0 was set")):
        done = attempt(*BUILD, cwd=source, FASTCL_CUDA=wanted, **environment)
        assert done.returncode == 0, done.stderr
        assert module.exists()
        assert reason in failure.read_text()


@needs_compiler
def test_an_nvcc_that_does_not_work_leaves_the_rest_of_the_module(source: Path, tmp_path: Path) -> None:
    environment = broken_nvcc(tmp_path)
    module, failure = source / "fastcl" / MODULE, source / "fastcl" / "_cuda_failure.py"
    done = attempt(*BUILD, cwd=source, FASTCL_CUDA="auto", **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert module.exists()
    assert "configuring: " in failure.read_text()
    module.unlink()
    done = attempt(*BUILD, cwd=source, FASTCL_CUDA="1", **environment)
    assert done.returncode != 0
    assert "FASTCL_CUDA=1, but configuring: " in done.stderr
    assert not module.exists()


@needs_compiler
def test_without_a_driver_the_kernels_are_compiled_on_demand_only(source: Path, tmp_path: Path) -> None:
    environment = broken_nvcc(tmp_path)
    module, failure = source / "fastcl" / MODULE, source / "fastcl" / "_cuda_failure.py"
    environment["PATH"] = environment["PATH"].split(os.pathsep)[0]
    done = attempt(*BUILD, cwd=source, FASTCL_CUDA="auto", **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert module.exists()
    remembered: dict[str, str] = {}
    exec(failure.read_text(), remembered)
    reason = (
        "no NVIDIA driver was found when this fastcl was built; building it again from source with FASTCL_CUDA=1 "
        "compiles the CUDA kernels all the same"
    )
    assert remembered["REASON"] == reason  # fastcl.info prints it, and use_backend("cuda") raises it
    done = attempt(*BUILD, cwd=source, FASTCL_CUDA="1", **environment)
    assert "FASTCL_CUDA=1, but configuring: " in done.stderr  # it tries the nvcc that fails

    setup = (source / "setup.py").read_text()
    for there in (  # a driver's folder is enough, and so is its library
        setup.replace('"/absent"', repr(str(tmp_path))),
        setup.replace('("absent.so",)', "(None,)"),  # the program itself, which always loads
    ):
        (source / "setup.py").write_text(there)
        done = attempt(*BUILD, cwd=source, FASTCL_CUDA="auto", **environment)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "configuring: " in failure.read_text()


def test_the_switch_is_checked(source: Path) -> None:
    done = attempt(*BUILD, cwd=source, FASTCL_CUDA="yes")
    assert done.returncode != 0
    assert "FASTCL_CUDA: expected auto, 0 or 1, got 'yes'" in done.stderr


# The installed module


HERE = cuda_runtime.kernels() is not None and not cuda_runtime.kernels().emulated


@pytest.mark.skipif(not HERE, reason="the native module was built without CUDA kernels")
@pytest.mark.skipif(platform.system() != "Linux", reason="looks into an ELF file")
def test_the_runtime_is_inside_and_nothing_of_it_is_exported(tmp_path: Path) -> None:
    module = native.native_module().__file__
    needed = [line.split()[1] for line in run("objdump", "-p", module, cwd=tmp_path).splitlines() if "NEEDED" in line]
    assert not [name for name in needed if "cud" in name or "torch" in name]
    dynamic = [line.split() for line in run("nm", "-D", module, cwd=tmp_path).splitlines()]
    assert [name for *_, kind, name in dynamic if kind in "TDBRVWu" and len(_) == 1] == ["PyInit__native"]


@pytest.mark.skipif(not HERE, reason="the native module was built without CUDA kernels")
def test_without_a_driver_a_call_says_so() -> None:
    kernels = cuda_runtime.kernels()
    assert re.match(r"nvcc \d+\.\d+", kernels.targets)
    assert kernels.runtime_version() >= 11000
    if kernels.driver_version():
        pytest.skip("there is a driver")
    assert kernels.driver_failure() == "there is no NVIDIA driver"
    call = (1, 64, 4, 1, 1, 1, 64, 4, 1, 1, 1, 0, 0, 16, 4, 1, 64)
    with pytest.raises(RuntimeError, match="there is no NVIDIA driver"):
        kernels.topk((0, 0), call)
    with pytest.raises(ValueError, match="too few numbers"):
        kernels.topk((0, 0), call[:-1])
