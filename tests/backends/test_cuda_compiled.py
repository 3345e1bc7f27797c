"""The machine code of the CUDA kernels in the native module: all targets, no spills, tensor cores.

No GPU is needed. The module has kernels if nvcc was available when it was built.
"""

import os
import re
import shutil
import subprocess
from functools import cache
from importlib import util
from pathlib import Path

import pytest

from fastcl.ops.backends import cuda_runtime, native

HERE = cuda_runtime.kernels() is not None and not cuda_runtime.kernels().emulated
pytestmark = pytest.mark.skipif(not HERE, reason="the native module was built without CUDA kernels")

TARGETS = ("sm_80", "sm_90")
# Keyed by the distinctive part of a kernel's mangled name.
PRODUCTS = {
    "Bfloat16": r"HMMA\.16816\.F32\.BF16",
    "Half": r"HMMA\.16816\.F32 ",
    "float": r"HMMA\.1688\.F32\.TF32",
}
MANGLED = {"Bfloat16": "INS0_8Bfloat16EE", "Half": "INS0_4HalfEE", "float": "IfEE"}
SWEEPS = [
    (kernel, dtype)
    for kernel in ("statistics_kernel", "gradient_kernel", "weighted_kernel", "pair_kernel")
    for dtype in PRODUCTS
]


@cache
def tool() -> str:
    folders = ["", "/usr/local/cuda/bin", os.path.join(os.environ.get("CUDA_HOME", ""), "bin")]
    triton = util.find_spec("triton")
    if triton is not None and triton.origin:
        folders.append(str(Path(triton.origin).parent / "backends" / "nvidia" / "bin"))
    found = (shutil.which("cuobjdump", path=folder or None) for folder in folders)
    return next((path for path in found if path), "")


@cache
def dumped(*options: str) -> str:
    if not tool():
        pytest.skip("no cuobjdump")
    done = subprocess.run([tool(), *options, native.native_module().__file__], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@cache
def usage() -> dict[tuple[str, str], dict[str, int]]:
    """For each target and kernel: number of registers, bytes of stack and of local memory."""
    found: dict[tuple[str, str], dict[str, int]] = {}
    target = name = ""
    for line in dumped("--dump-resource-usage").splitlines():
        if match := re.match(r"arch = (sm_\d+)", line):
            target = match[1]
        elif match := re.match(r"\s*Function (\S+):", line):
            name = match[1]
        elif "REG:" in line:
            numbers = re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", line)
            found[target, name] = {key.lower(): int(value) for key, value in numbers}
    return found


@cache
def machine_code(target: str) -> dict[str, str]:
    """The machine code of each kernel."""
    parts = re.split(r"^\s*Function : (\S+)$", dumped("--dump-sass", "--gpu-architecture", target), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_targets() -> None:
    assert {target for target, _ in usage()} == set(TARGETS)
    assert set(re.findall(r"\.(sm_\d+)\.ptx", dumped("--list-ptx"))) == {"sm_80"}  # newer devices compile it
    per_target = [{name for target, name in usage() if target == one} for one in TARGETS]
    assert per_target[0] == per_target[1]


def test_no_kernel_spills() -> None:
    for (target, name), numbers in usage().items():
        assert numbers["stack"] == numbers["local"] == 0, (target, name, numbers)
        assert numbers["reg"] <= 255


@pytest.mark.slow
@pytest.mark.parametrize(("kernel", "dtype"), SWEEPS)
@pytest.mark.parametrize("target", TARGETS)
def test_sweeps_use_tensor_cores(target, kernel, dtype) -> None:
    (name,) = (name for name in machine_code(target) if kernel + MANGLED[dtype] in name)
    code = machine_code(target)[name]
    assert re.search(PRODUCTS[dtype], code)
    for other, product in PRODUCTS.items():
        assert other == dtype or not re.search(product, code), other
    assert "LDSM" in code  # loads fragments from shared memory
    assert "LDGSTS" in code  # copies to shared memory without registers
    assert "MUFU.EX2" in code
    assert not re.search(r"\b(LDL|STL|ATOM|RED)\b", code)
    # A block has at least 256 threads, and a multiprocessor 65536 registers.
    assert usage()[target, name]["reg"] * 256 <= 65536


# Kernels of Sinkhorn and top-k, with the number of instances of each.
OTHERS = {
    "whole_rows_kernel": 3,
    "iterations_kernel": 1,
    "long_rows_kernel": 4,
    "long_columns_kernel": 4,
    "score_gradient_kernel": 1,
    "topk_kernel": 6,
}


@pytest.mark.parametrize("kernel", OTHERS)
@pytest.mark.parametrize("target", TARGETS)
def test_sinkhorn_and_topk(target, kernel) -> None:
    code = {name: text for name, text in machine_code(target).items() if kernel in name}
    assert len(code) == OTHERS[kernel]
    for name, text in code.items():
        assert not re.search(r"\b(LDL|STL)\b", text)
        if kernel == "topk_kernel":
            for element in ("Bfloat16", "Half"):
                assert bool(re.search(PRODUCTS[element], text)) == (element in name), name
            continue
        assert "MUFU.EX2" in text
        if kernel == "iterations_kernel":  # waits for the whole grid, so it has a multiprocessor to itself
            assert re.search(r"\bATOMG?\b", text)
        else:  # each sum has one owner
            assert not re.search(r"\b(ATOMG?|ATOMS|RED)\b", text)
        if kernel in ("whole_rows_kernel", "iterations_kernel"):
            assert usage()[target, name]["reg"] * 512 <= 65536
