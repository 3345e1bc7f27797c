"""Builds the native test program of csrc/tests and looks into its objects."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def tool(name: str) -> str:
    folders = [str(Path(sys.executable).parent), os.environ.get("PATH", "")]
    found = shutil.which(name, path=os.pathsep.join(folders))
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def build(name: str, *options: str) -> Path:
    """The native test program and its objects, in a folder that is reused while it is up to date."""
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        pytest.skip("there is no C++ compiler")
    folder = ROOT / "build" / name
    common = ("-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}", "-DFASTCL_MODULE=OFF", "-DFASTCL_TESTS=ON")
    for arguments in (("-S", ROOT, "-B", folder, *common, *options), ("--build", folder)):
        done = subprocess.run([tool("cmake"), *map(str, arguments)], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder


def run_engines(folder: Path, *arguments: str, emulator: Sequence[str] = ()) -> str:
    """What the program prints if all cases agree."""
    done = subprocess.run(
        [*emulator, folder / "engine_test", *arguments],
        # waiting threads do not spin: tests may run on fewer cores than threads
        env=os.environ | {"OMP_WAIT_POLICY": "passive", "ASAN_OPTIONS": "detect_leaks=1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def objects(folder: Path, pattern: str) -> list[Path]:
    found = sorted(folder.glob(f"CMakeFiles/{pattern}"))
    assert found, pattern
    return found


def exported(path: Path) -> list[str]:
    """Names of the symbols of an object that the linker could merge with another object's."""
    done = subprocess.run([tool("nm"), "-C", "--defined-only", path], capture_output=True, text=True, check=True)
    symbols = [line.split(maxsplit=2)[1:] for line in done.stdout.splitlines()]  # (kind, name)
    return [name for kind, name in symbols if kind.isupper() or kind in "wvu"]


def instructions(path: Path, objdump: str = "objdump") -> str:
    return subprocess.run([tool(objdump), "-d", "--no-show-raw-insn", path], capture_output=True, text=True).stdout


def innermost_loops(code: str) -> list[list[str]]:
    """The instructions, with operands, of each loop that holds no other jump back, of one object's `instructions`."""
    loops: list[list[str]] = []
    places: dict[str, int] = {}
    lines: list[str] = []
    start = 0
    for line in code.splitlines():
        found = re.match(r"\s*([0-9a-f]+):\s+(\S.*)", line)
        if found is None:
            places, lines, start = {}, [], 0  # the next function
            continue
        places[found[1]] = len(lines)
        lines.append(found[2])
        jump = re.match(r"(?:b\.?\w*|cbn?z|tbn?z)\s(?:.*\s)?([0-9a-f]+)\s+<", found[2])
        if jump and (first := places.get(jump[1], -1)) >= start:
            loops.append(lines[first:])
            start = len(lines)
    return loops
