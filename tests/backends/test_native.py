"""The objects of `csrc`: symbols and instructions; the native test program with guard pages and sanitizers."""

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fastcl.ops.backends import native
from tests.support.native_program import build, exported, instructions, objects, run_engines

X86 = platform.machine() in ("x86_64", "AMD64")
ARM = platform.machine() in ("aarch64", "arm64")
ISAS = ("baseline", "avx2", "avx512", "avx512_bf16") if X86 else ("neon",)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not X86 and not ARM, reason="the engines are for x86-64 and 64-bit ARM"),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into ELF objects and maps pages"),
]
needs_x86 = pytest.mark.skipif(not X86, reason="registers of x86-64")


@pytest.fixture(scope="module")
def built() -> Path:
    return build("native-test")


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = tmp_path_factory.mktemp("sanitizers") / "probe.cpp"
    source.write_text("int main() { return 0; }\n")
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    probe = source.with_suffix("")
    done = subprocess.run(
        [compiler, "-fsanitize=address,undefined", source, "-o", probe], capture_output=True, text=True
    )
    if done.returncode != 0 or subprocess.run([probe]).returncode != 0:
        pytest.skip(f"{compiler} has no sanitizers: {done.stderr.strip()}")
    module = native.native_module()
    runs = module.supported_engines() if module else []  # other engines could not be tested; none: all are built
    return build("native-test-sanitized", "-DFASTCL_SANITIZE=address,undefined", f"-DFASTCL_ISAS={';'.join(runs)}")


def test_engines_stay_within_their_buffers(built: Path) -> None:
    """All dtypes at every dimension from 1 to 70, three times; buffers lie next to inaccessible pages."""
    assert "840 cases agree" in run_engines(built, "pages", "840")  # one line for each engine of this machine


def test_engines_under_sanitizers(sanitized: Path) -> None:
    assert "280 cases agree" in run_engines(sanitized, "heap", "280")


# Symbols and instructions


@pytest.mark.parametrize("isa", ISAS)
def test_an_engine_shares_no_symbol_with_another(built: Path, isa: str) -> None:
    """The linker merges a weak or unique symbol with others of its name, so an old machine might run code for a newer
    one."""
    (path,) = objects(built, f"fastcl_{isa}.dir/**/*.o")
    assert exported(path) == [f"fastcl::{isa}::engine"]


@needs_x86
def test_what_every_machine_runs_has_no_wide_instructions(built: Path) -> None:
    """Detection, arrangement, the baseline, and (compiled with the same flags) the module's own code have none."""
    for path in objects(built, "fastcl_cpu.dir/**/*.o") + objects(built, "fastcl_baseline.dir/**/*.o"):
        code = instructions(path)
        assert "xmm" in code or "ret" in code
        wide = re.search(r".*(%[yz]mm|%k[1-7]\b|\tv[a-z]+).*", code)
        assert wide is None, f"{path.name}: {wide.group()}"


@needs_x86
@pytest.mark.parametrize(
    ("isa", "expected", "foreign"),
    [
        ("avx2", r"vfmadd\w+ .*%ymm", r"%zmm|%k[1-7]\b"),
        ("avx512", r"vfmadd\w+ .*%zmm", r"vdpbf16ps|vcvtne2?ps2?bf16"),
        ("avx512_bf16", r"vdpbf16ps .*%zmm", r"%tmm"),
    ],
)
def test_an_engine_has_its_own_instructions(built: Path, isa: str, expected: str, foreign: str) -> None:
    (path,) = objects(built, f"fastcl_{isa}.dir/**/*.o")
    code = instructions(path)
    assert re.search(expected, code)
    assert not re.search(foreign, code)
