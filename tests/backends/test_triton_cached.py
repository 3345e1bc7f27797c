"""Launches of Triton's compiled kernels past its look-up, with a stub for the driver: no device is needed.

Runs in a process of its own, in which Triton is not interpreted.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fastcl.ops.backends import native, triton_launch
from fastcl.ops.backends.triton_cached import KNOWN

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(
    triton_launch.availability()[1] == "Triton is not installed", reason="Triton is not installed"
)

SAME = """
import torch
from benchmarks.host_time import cases, pretending
import fastcl
from fastcl.ops.backends import triton_cached, triton_launch

short = []  # launches past Triton's look-up

def addresses(values):
    return [value.data_ptr() if isinstance(value, torch.Tensor) else value for value in values]

class Recorded(triton_cached.CachedLauncher):
    def launch(self, shape, grid, given):
        before = len(launches.arguments)
        super().launch(shape, grid, given)
        direct = launches.arguments[before:]
        triton_cached.launched_by_triton(self._function, shape, grid, given)
        by_triton = launches.arguments[before + 1 :]
        assert len(direct) == len(by_triton) == 1
        (name, places, values), (other_name, other_places, others) = direct[0], by_triton[0]
        assert (name, places) == (other_name, other_places), (name, other_name)
        assert addresses(values) == addresses(others), name
        short.extend([name] * all(not isinstance(value, torch.Tensor) for value in values))

triton_launch.CachedLauncher = Recorded
with pretending() as launches, fastcl.use_backend("triton"):
    for name, step in cases(64, 32).items():
        step()
        step()
assert len(set(short)) > 8, set(short)
print("same")
"""

HOOK = """
import fastcl
from benchmarks.host_time import cases, pretending
from fastcl.ops.backends import triton_cached

seen = []
runtime = triton_cached._runtime()
with pretending() as launches, fastcl.use_backend("triton"):
    step = cases(64, 32)["self-contrast"]
    step(); step()
    number = len(launches.names) // 2
    enter = runtime.launch_enter_hook
    if hasattr(enter, "add"):
        enter.add(seen.append)
    else:
        runtime.launch_enter_hook = seen.append
    step()
    assert len(launches.arguments) == 3 * number
    assert len(launches.hooked) == number, (len(launches.hooked), number)
print("hooked")
"""


REPLAYED = """
import ctypes
import torch
import fastcl
from benchmarks.host_time import cases, pretending
from fastcl.ops.backends.triton_tape import Tape
from fastcl.ops.contrastive import direct, replayed

C = {
    "i1": ctypes.c_int8, "i8": ctypes.c_int8, "i16": ctypes.c_int16, "i32": ctypes.c_int32, "i64": ctypes.c_int64,
    "u32": ctypes.c_uint32, "u64": ctypes.c_uint64, "fp32": ctypes.c_float, "fp64": ctypes.c_double,
}

def expected(source, values):
    # Of the arguments that Triton's launcher gets, those that are parameters, and their types.
    constants = {key[0] if isinstance(key, tuple) else key for key in source.constants}
    names = list(source.signature)
    for k, (name, kind) in enumerate(source.signature.items()):
        if kind != "constexpr" and k not in constants and name not in constants:
            yield kind, values[k] if len(values) == len(names) else dict(zip(names, values))[name]

def read(kind, address):
    return (C[kind] if kind[0] != "*" else ctypes.c_uint64).from_address(address).value

def alike(kind, value, other):
    if isinstance(value, torch.Tensor):
        value = value.data_ptr()
    if kind == "fp32":
        value = ctypes.c_float(value).value
    if kind[0] == "*" and value:  # of other memory, with the same alignment
        return other > 1 << 32 and value % 16 == other % 16
    return (value or 0) == other

native = []
plain = []

def seen(name, grid, threads, shared, parameters):
    launch = plain[len(native)]
    (other, other_grid, values), (source, metadata) = launch
    assert (name, grid) == (other, other_grid), (name, other)
    assert (threads, shared) == (32 * metadata.num_warps, metadata.shared), name
    parameters = (ctypes.c_void_p * 64).from_address(parameters)
    count = 0
    for kind, value in expected(source, values):
        found = read(kind, parameters[count])
        assert alike(kind, value, found), (name, count, kind, value, found)
        count += 1
    assert read("u64", parameters[count]) == read("u64", parameters[count + 1]) == 0, "scratch memory"
    native.append(name)

with pretending() as launches, fastcl.use_backend("triton"):
    for name, step in cases(64, 32).items():
        step()
        launches.arguments.clear(), launches.sources.clear()
        step()
        plain = list(zip(launches.arguments, launches.sources))
        step(), step()
        launches.arguments.clear()
        native.clear()
        launches.seen = seen
        step()
        launches.seen = None
        assert len(native) == len(plain) > 10, (name, len(native), len(plain))
        assert not launches.arguments, name
tapes = [tape for taped in (replayed.FORWARD, replayed.BACKWARD) for tape in taped._tapes.values()]
assert len(tapes) >= 6
assert all(isinstance(tape, Tape) for tape in tapes)
print("replayed")
"""


WITHOUT_NATIVE = """
import torch
import fastcl
from benchmarks.host_time import cases, pretending
from fastcl.ops.backends import triton_series

def alike(value, other):
    if isinstance(value, torch.Tensor):
        value = value.data_ptr()
    if isinstance(value, int) and value > 1 << 32:  # an address
        return other > 1 << 32 and value % 16 == other % 16
    return value == other

with pretending() as launches, fastcl.use_backend("triton"):
    triton_series.driver = lambda: None
    for name, step in cases(64, 32).items():
        found = []
        for _ in range(5):
            launches.arguments.clear()
            step()
            found.append(list(launches.arguments))
        for plain, replayed in zip(found[1], found[4], strict=True):
            assert plain[:2] == replayed[:2], name
            assert len(plain[2]) == len(replayed[2])
            assert all(map(alike, plain[2], replayed[2])), (name, plain, replayed)
print("replayed")
"""


COMPILED = """
import fastcl
from benchmarks.host_time import cases, pretending

with pretending() as launches, fastcl.use_backend("triton"):
    for rows in (64, 66, 1000):  # 66 rows: parts of a tensor begin where no 16 bytes are aligned
        for name, step in cases(rows, 32).items():
            before = len(launches.compiled)
            step()
            print(rows, len(launches.compiled) - before, name)
"""


# Triton's own launcher and the native module, both on a driver of tests/support/fake_cuda.c.
FAKE = """import ctypes
import torch
from unittest import mock
import fastcl
from benchmarks.host_time import cases, pretending
from fastcl.ops.backends import triton_series
from triton.backends.nvidia.driver import CudaLauncher, CudaUtils
from triton.runtime import driver as runtime_driver

fake = ctypes.CDLL("libcuda.so.1")
C = {"i1": ctypes.c_int8, "i32": ctypes.c_int32, "i64": ctypes.c_int64, "fp32": ctypes.c_float}
seen, sources = [], {}

@ctypes.CFUNCTYPE(None, ctypes.c_void_p, *[ctypes.c_uint] * 5, ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p))
def recorder(function, x, y, z, threads, shared, stream, parameters):
    source = sources[function]
    constants = {key[0] if isinstance(key, tuple) else key for key in source.constants}
    kinds = [
        kind for k, (name, kind) in enumerate(source.signature.items())
        if kind != "constexpr" and k not in constants and name not in constants
    ]
    values = [
        (kind, (ctypes.c_uint64 if kind[0] == "*" else C[kind]).from_address(parameters[k]).value)
        for k, kind in enumerate(kinds)
    ]
    seen.append((function, source.fn.__name__, (x, y, z), threads, shared, stream, values))

ctypes.c_void_p.in_dll(fake, "fake_recorder").value = ctypes.cast(recorder, ctypes.c_void_p).value

class Launcher(CudaLauncher):
    def __init__(self, source, metadata):
        super().__init__(source, metadata)
        self.source = source
    def __call__(self, x, y, z, stream, function, *rest):
        sources[function] = self.source
        by_triton.append(0)
        values = [v.data_ptr() if isinstance(v, torch.Tensor) else v for v in rest]
        return super().__call__(x, y, z, stream, function, *values)

by_triton = []
originals = triton_series.driver, triton_series.context
with pretending(), fastcl.use_backend("triton"), mock.patch.object(torch.cuda, "current_device", return_value=0):
    active = runtime_driver.active
    active.utils, active.launcher_cls = CudaUtils(), Launcher
    triton_series.driver, triton_series.context = originals
    active.get_current_stream = lambda device: 4096
    for name, step in cases(64, 32).items():
        step(), seen.clear(), step()
        plain = list(seen)
        step(), step(), seen.clear(), by_triton.clear(), step()
        assert not by_triton, "Triton's launcher was called"
        assert len(plain) == len(seen) > 10, (len(plain), len(seen))
        for a, b in zip(plain, seen):
            assert a[:6] == b[:6], (a, b)
            for (kind, x), (other, y) in zip(a[6], b[6], strict=True):
                same = (x % 16, x > 0) == (y % 16, y > 0) if kind[0] == "*" else x == y
                assert same, (a[1], kind, x, y)
        assert all(launch[5] == 4096 for launch in seen), "another stream"
print("the same")
"""


def ran(code: str, **others: str) -> str:
    environment = {
        name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "FASTCL_BACKEND")
    }
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment | others, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_arguments_are_those_that_triton_passes() -> None:
    version = tuple(int(part) for part in triton_launch.triton_version().split(".")[:2])
    assert version in KNOWN, "a version of Triton whose launcher has not been looked at: it takes the long way"
    assert "same" in ran(SAME)


@pytest.mark.slow
def test_few_kernels_are_compiled_and_other_sizes_compile_none() -> None:
    """One compiled kernel serves forward and backward, one side and two, rows that are normalised and others."""
    numbers = [int(line.split()[1]) for line in ran(COMPILED).splitlines()]
    assert numbers[:4] == [13, 0, 8, 5]
    assert numbers[4:] == [0] * 8


@pytest.mark.slow
def test_hooks_of_a_profiler_are_called() -> None:
    assert "hooked" in ran(HOOK)


@pytest.mark.slow
def test_without_the_native_module_a_tape_calls_tritons_launcher() -> None:
    assert "replayed" in ran(WITHOUT_NATIVE)


@pytest.mark.slow
@pytest.mark.skipif(native.native_module() is None, reason="the native module is not built")
def test_a_tape_repeats_the_launches() -> None:
    assert "replayed" in ran(REPLAYED)


@pytest.mark.slow
@pytest.mark.skipif(native.native_module() is None, reason="the native module is not built")
@pytest.mark.skipif(shutil.which("cc") is None or sys.platform != "linux", reason="no C compiler, or no Linux")
def test_the_driver_gets_what_tritons_launcher_passes(tmp_path) -> None:
    """Function, grid, threads, shared memory, stream and parameters; the context is made current first."""
    library = tmp_path / "libcuda.so.1"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, ROOT / "tests" / "support" / "fake_cuda.c"], check=True)
    (tmp_path / "libcuda.so").symlink_to(library)  # Triton 3.2 links with it
    folder = str(tmp_path)
    others = {"LD_LIBRARY_PATH": folder, "TRITON_LIBCUDA_PATH": folder, "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    assert "the same" in ran(FAKE, **others)
