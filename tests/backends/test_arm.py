"""The engine for 64-bit ARM from a cross compiler: its results in an emulator, and its machine code."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.native_program import build, exported, innermost_loops, instructions, objects, run_engines, tool

PREFIX = "aarch64-linux-gnu-"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="builds and runs ELF programs"),
]


@pytest.fixture(scope="module")
def built() -> Path:
    compiler = tool(f"{PREFIX}g++")
    found = subprocess.run([compiler, "-print-file-name=libgomp.a"], capture_output=True, text=True, check=True)
    options = {
        "CMAKE_SYSTEM_NAME": "Linux",
        "CMAKE_SYSTEM_PROCESSOR": "aarch64",
        "CMAKE_CXX_COMPILER": compiler,
        "CMAKE_EXE_LINKER_FLAGS": "-static",  # the emulator needs no libraries of the other processor
        "OpenMP_gomp_LIBRARY": found.stdout.strip(),  # CMake would find the shared one
    }
    return build("native-test-aarch64", *(f"-D{name}={value}" for name, value in options.items()))


@pytest.fixture(scope="module")
def code(built: Path) -> str:
    (path,) = objects(built, "fastcl_neon.dir/**/*.o")
    assert exported(path) == ["fastcl::neon::engine"]
    return instructions(path, f"{PREFIX}objdump")


def test_results_in_an_emulator(built: Path) -> None:
    """All dtypes at every third dimension from 1 to 70; buffers lie next to inaccessible pages."""
    printed = run_engines(built, "pages", "280", "neon", "3", emulator=[tool("qemu-aarch64")])
    assert printed == "neon: 94 cases agree\n"


def test_products_take_less_than_two_instructions_for_each_of_their_multiplications(code: str) -> None:
    """The twelve rows and two vectors of a register tile stay in registers, and factors are multiplied from lanes."""
    lane = re.compile(r"fmla\s.*\.[sd]\[1\]")  # loops of exponentials have as many fmla, but of whole registers
    counted = [(len(re.findall(r"\bfmla\b", "\n".join(loop))), loop) for loop in innermost_loops(code)]
    products = [(count, loop) for count, loop in counted if count == 48 and any(map(lane.search, loop))]
    assert len(products) >= 4
    for count, loop in products:
        assert len(loop) < 1.6 * count, "\n".join(loop)
