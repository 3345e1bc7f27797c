"""The objects of `csrc`: symbols and instructions; the native test program with guard pages and sanitizers."""

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ISAS = ("baseline", "avx2", "avx512", "avx512_bf16")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the engines are for x86-64"),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into ELF objects and maps pages"),
]


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
    return build("native-test-sanitized", "-DFASTCL_SANITIZE=address,undefined")


def run_engines(folder: Path, place: str, cases: int) -> None:
    done = subprocess.run(
        [folder / "engine_test", place, str(cases)],
        # waiting threads do not spin: tests may run on fewer cores than threads
        env=os.environ | {"OMP_WAIT_POLICY": "passive", "ASAN_OPTIONS": "detect_leaks=1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(f"{cases} cases agree") >= 1  # one line for each engine of this machine


def test_engines_stay_within_their_buffers(built: Path) -> None:
    """All dtypes at every dimension from 1 to 70, three times; buffers lie next to inaccessible pages."""
    run_engines(built, "pages", 3 * 280)


def test_engines_under_sanitizers(sanitized: Path) -> None:
    run_engines(sanitized, "heap", 280)


# Symbols and instructions


def objects(folder: Path, pattern: str) -> list[Path]:
    found = sorted(folder.glob(f"CMakeFiles/{pattern}"))
    assert found, pattern
    return found


def symbols(path: Path) -> list[tuple[str, str]]:
    """(kind, name) of all symbols that the object defines."""
    done = subprocess.run([tool("nm"), "-C", "--defined-only", path], capture_output=True, text=True, check=True)
    return [tuple(line.split(maxsplit=2)[1:]) for line in done.stdout.splitlines()]  # type: ignore[misc]


@pytest.mark.parametrize("isa", ISAS)
def test_an_engine_shares_no_symbol_with_another(built: Path, isa: str) -> None:
    """The linker merges a weak or unique symbol with others of its name, so an old machine might run code for a newer
    one."""
    (path,) = objects(built, f"fastcl_{isa}.dir/**/*.o")
    assert [name for kind, name in symbols(path) if kind.isupper() or kind in "wvu"] == [f"fastcl::{isa}::engine"]


def instructions(path: Path) -> str:
    return subprocess.run([tool("objdump"), "-d", "--no-show-raw-insn", path], capture_output=True, text=True).stdout


def test_what_every_machine_runs_has_no_wide_instructions(built: Path) -> None:
    """Detection, arrangement, the baseline, and (compiled with the same flags) the module's own code have none."""
    for path in objects(built, "fastcl_cpu.dir/**/*.o") + objects(built, "fastcl_baseline.dir/**/*.o"):
        code = instructions(path)
        assert "xmm" in code or "ret" in code
        wide = re.search(r".*(%[yz]mm|%k[1-7]\b|\tv[a-z]+).*", code)
        assert wide is None, f"{path.name}: {wide.group()}"


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
