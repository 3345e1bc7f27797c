"""What users install: sdist and wheel, in an environment with nothing else."""

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from email import message_from_bytes
from email.message import Message
from pathlib import Path

import pytest

import fastcl
from tests.support.sources import sources

ROOT = Path(__file__).parents[2]
OURS = ("FASTCL_BACKEND", "FASTCL_CPU_ISA", "FASTCL_CUDA", "FASTCL_NATIVE", "FASTCL_REQUIRE_NATIVE")
ENVIRONMENT = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONWARNINGS", *OURS)}
ENVIRONMENT["FASTCL_CUDA"] = "0"  # a CUDA build takes minutes; `test_cuda_build.py` tests it
COMPILER = shutil.which(os.environ.get("CXX", "c++"))
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler")
ENGINES = COMPILER is not None and platform.machine() == "x86_64" and sys.platform.startswith("linux")
needs_engines = pytest.mark.skipif(not ENGINES, reason="builds the engines, for Linux on x86-64")
MODULE = "_native" + sysconfig.get_config_var("EXT_SUFFIX")

USE = """
import sys, torch, fastcl
z = torch.randn(8, 2, 4, requires_grad=True)
fastcl.ClusterInfoNCE()(z).backward()
assert z.grad.isfinite().all() and z.grad.abs().sum() > 0
print(fastcl.__file__)
"""


def attempt(*command: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(c) for c in command], cwd=cwd, env=ENVIRONMENT | environment, capture_output=True, text=True
    )


def run(*command: object, cwd: Path, **environment: str) -> str:
    done = attempt(*command, cwd=cwd, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def copy_source(to: Path) -> Path:
    """A copy of what git would ship."""
    for name in sources():
        (to / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, to / name)
    return to


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The sdist, and the wheel built from it; the tree has a stale file of an editable install."""
    where = tmp_path_factory.mktemp("built")
    source = copy_source(where / "source")
    (source / "fastcl" / "_build_failure.py").write_text("REASON = LOG = 'stale'")
    options = "-DFASTCL_PORTABLE=ON" if ENGINES else ""  # as in the wheels that are published
    run(
        sys.executable,
        "-m",
        "build",
        "--no-isolation",
        "--outdir",
        where / "dist",
        source,
        cwd=where,
        CMAKE_ARGS=options,
    )
    return next((where / "dist").glob("*.tar.gz")), next((where / "dist").glob("*.whl"))


@pytest.fixture
def clean(tmp_path: Path) -> Path:
    """The Python of a new environment that sees the packages of this one, but no editable fastcl."""
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "clean", cwd=tmp_path)
    python = tmp_path / "clean" / "bin" / "python"
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip()
    (Path(site) / "test_environment.pth").write_text(sysconfig.get_path("purelib"))  # its own .pth files are not read
    return python


def install(python: Path, what: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    pip = (
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "install",
        "--no-index",
        "--no-deps",
        "--no-build-isolation",
    )
    return attempt(*pip, "--ignore-installed", *options, what, cwd=python.parent, **environment)


def without_compiler(where: Path) -> dict[str, str]:
    tools = where / "tools"
    if not tools.exists():
        tools.mkdir()
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        (tools / "ninja").symlink_to(shutil.which("ninja", path=path))
    return {"PATH": str(tools), "CC": "/nonexistent", "CXX": "/nonexistent"}


def test_wheel_holds_the_package_and_nothing_else(built: tuple[Path, Path]) -> None:
    names = set(zipfile.ZipFile(built[1]).namelist())
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "fastcl").rglob("*.py")}
    assert modules <= names
    assert "fastcl/py.typed" in names
    assert "fastcl/_build_failure.py" not in names
    assert {name.split("/")[0].split("-")[0] for name in names} == {"fastcl"}
    if COMPILER:
        assert f"fastcl/{MODULE}" in names


def test_sdist_holds_all_files_of_a_checkout(built: tuple[Path, Path]) -> None:
    with tarfile.open(built[0]) as archive:
        names = {member.name.split("/", 1)[1] for member in archive.getmembers() if member.isfile()}
    generated = {name for name in names if name in ("PKG-INFO", "setup.cfg") or name.startswith("fastcl.egg-info/")}
    assert names - generated == {str(path) for path in sources()}


def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        return message_from_bytes(archive.read(next(n for n in archive.namelist() if n.endswith("/METADATA"))))


def test_metadata_leaves_the_user_free_to_have_any_torch(built: tuple[Path, Path]) -> None:
    required = metadata(built[1]).get_all("Requires-Dist")
    assert [line for line in required if "extra ==" not in line] == ["torch>=2.6", "numpy"]


def test_description_on_a_package_index_needs_no_other_file(built: tuple[Path, Path]) -> None:
    found = metadata(built[1])
    assert (found["Author"], found["Description-Content-Type"]) == ("fastcl developers", "text/markdown")
    description = found.get_payload()
    assert description.startswith("# fastcl\n")
    assert [part for part in re.findall(r"\]\(([^)]*)\)", description) if not part.startswith("https:")] == []
    assert not re.search(r"!\[|<", re.sub(r"```.*?```|`[^`]*`", "", description, flags=re.DOTALL))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert re.search(r"\]\(docs/", readme)
    assert re.findall("^#+ .*", description, re.MULTILINE) == re.findall("^#+ .*", readme, re.MULTILINE)
    for target in re.findall(r"(?<!!)\[[^\]]+\]\(([^)#:]+)", readme):
        assert target in description


@pytest.mark.slow
def test_sdist_is_built_in_isolation(built: tuple[Path, Path], clean: Path, tmp_path: Path) -> None:
    """For another architecture: a module without engines."""
    other = "-DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=riscv64" if ENGINES else ""
    pip = (sys.executable, "-m", "pip", "--python", clean, "install", "-q", "--no-deps", "--ignore-installed")
    run(*pip, built[0], cwd=tmp_path, CMAKE_ARGS=other, FASTCL_REQUIRE_NATIVE=str(int(ENGINES)))
    assert str(clean.parent.parent) in run(clean, "-W", "error", "-c", USE, cwd=tmp_path)
    report = run(clean, "-W", "error", "-m", "fastcl.info", cwd=tmp_path)
    if ENGINES:
        assert "used: none (this build carries no engine: it was not built for x86-64 or 64-bit ARM)" in report
    assert re.search(r"contrastive_stats +cpu +float32 +chunked", report), report


def test_the_trainer_says_what_to_install(tmp_path: Path) -> None:
    code = """
import runpy, sys
sys.modules["sklearn"] = None
sys.argv = ["fastcl.train"]
runpy.run_module("fastcl.train", run_name="__main__")
"""
    trainer = attempt(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert trainer.returncode != 0
    assert 'fastcl.train needs scikit-learn: pip install "fastcl[train]"' in trainer.stderr
    assert "Traceback" not in trainer.stderr


@pytest.mark.slow
@needs_engines
def test_wheel_passes_tests_where_there_are_no_sources_and_no_compiler(
    built: tuple[Path, Path], tmp_path: Path
) -> None:
    tests = ("tests/losses/test_presets.py", "tests/project/test_info.py")
    command = ("bash", ROOT / ".ci" / "wheel", tmp_path / "dist", "-n0", *tests)
    done = run(*command, cwd=tmp_path, PYTHON=sys.executable, FASTCL_BUILT=str(built[1].parent))
    assert re.search(r"contrastive_stats +cpu +float32 +cpu", done), done
    assert re.search(r"^\d+ passed", done, re.MULTILINE), done
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    wheels = {path.name for path in (tmp_path / "dist").glob("*.whl")}
    assert wheels == {f"fastcl-{fastcl.__version__}-{tag}-{tag}-manylinux_2_28_x86_64.whl"}


def test_setup_imports_no_torch(tmp_path: Path) -> None:
    source = copy_source(tmp_path / "source")
    code = """
import runpy, sys
sys.argv = ["setup.py", "--version"]
runpy.run_path("setup.py", run_name="__main__")
print(any(name.split(".")[0] in ("torch", "fastcl") for name in sys.modules))
"""
    assert run(sys.executable, "-c", code, cwd=source).splitlines()[-2:] == [fastcl.__version__, "False"]


def test_setup_takes_the_architecture_of_a_mac_from_pip(tmp_path: Path) -> None:
    source = copy_source(tmp_path / "source")
    code = """
import os, runpy, sys
sys.argv = ["setup.py", "--version"]
chosen = runpy.run_path("setup.py", run_name="__main__")["mac_architecture"]
one, two = "-arch arm64", "-arch arm64 -arch x86_64"
for sys.platform, os.environ["ARCHFLAGS"] in (("darwin", ""), ("darwin", one), ("darwin", two), ("linux", one)):
    print(chosen())
"""
    one, two = "-DCMAKE_OSX_ARCHITECTURES=arm64", "-DCMAKE_OSX_ARCHITECTURES=arm64;x86_64"
    printed = run(sys.executable, "-c", code, cwd=source).splitlines()
    assert printed[-4:] == ["[]", f"['{one}']", f"['{two}']", "[]"]


# The native module


@needs_engines
def test_wheel_is_used_where_there_is_no_compiler(built: tuple[Path, Path], clean: Path, tmp_path: Path) -> None:
    done = install(clean, built[1])
    assert done.returncode == 0, done.stderr
    nothing = without_compiler(tmp_path)
    assert str(clean.parent.parent) in run(clean, "-W", "error", "-c", USE, cwd=tmp_path, **nothing)
    report = run(clean, "-W", "error", "-m", "fastcl.info", cwd=tmp_path, **nothing)
    assert re.search(r"contrastive_stats +cpu +float32 +cpu", report), report
    assert f"for fastcl {fastcl.__version__}" in report
    # The environment of the installation sets none of the variables.
    assert "CUDA C++\n  not built (FASTCL_CUDA=0 was set when this fastcl was built)" in report
    assert "when fastcl was installed" not in report


@needs_engines
def test_module_exports_its_entry_alone_and_brings_no_openmp(built: tuple[Path, Path], tmp_path: Path) -> None:
    with zipfile.ZipFile(built[1]) as wheel:
        module = wheel.extract(f"fastcl/{MODULE}", tmp_path)
    needed = [line.split()[1] for line in run("objdump", "-p", module, cwd=tmp_path).splitlines() if "NEEDED" in line]
    assert not [name for name in needed if "omp" in name]
    dynamic = [line.split() for line in run("nm", "-D", module, cwd=tmp_path).splitlines()]
    assert ["U", "GOMP_parallel"] in dynamic
    assert [name for *_, kind, name in dynamic if kind in "TDBRVWu" and len(_) == 1] == ["PyInit__native"]


@needs_engines
def test_wheel_is_one_for_this_platform_and_runs_on_glibc_2_28(built: tuple[Path, Path], tmp_path: Path) -> None:
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    assert built[1].name == f"fastcl-{fastcl.__version__}-{tag}-{tag}-linux_x86_64.whl"
    with zipfile.ZipFile(built[1]) as wheel:
        module = wheel.extract(f"fastcl/{MODULE}", tmp_path)
    undefined = [line for line in run("objdump", "-T", module, cwd=tmp_path).splitlines() if " *UND*" in line]
    needed = {
        tuple(map(int, version.split("."))) for version in re.findall(r"\(GLIBC_([\d.]+)\)", "\n".join(undefined))
    }
    assert (2, 14) in needed  # memcpy's: they are read
    assert max(needed) <= (2, 28)
    # A function without a version is one that the linker did not find: glibc's have one.
    words = [line.split() for line in undefined if " w " not in line and "(" not in line]
    assert {name for *_, name in words if not re.match(r"_?Py|GOMP_|omp_", name)} == set()
    pytest.importorskip("auditwheel")
    shown = run(sys.executable, "-m", "auditwheel", "show", built[1], cwd=tmp_path)
    (version,) = {int(found) for found in re.findall(r"manylinux_2_(\d+)_x86_64", shown)[-1:]}
    assert version <= 28, shown


def test_without_compiler_the_install_succeeds_and_remembers_why(clean: Path, tmp_path: Path) -> None:
    source = copy_source(tmp_path / "source")
    nothing = without_compiler(tmp_path)
    done = install(clean, source, "-v", **nothing)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (done.stdout + done.stderr).count("fastcl is installed WITHOUT its native module") == 1
    assert str(clean.parent.parent) in run(clean, "-W", "error", "-c", USE, cwd=tmp_path, **nothing)
    report = run(clean, "-W", "error", "-m", "fastcl.info", cwd=tmp_path, **nothing)
    assert re.search(r"contrastive_stats +cpu +float32 +chunked", report), report
    assert re.search(r"none: not built \(configuring: .*/nonexistent", report), report

    done = install(clean, source, FASTCL_REQUIRE_NATIVE="1", **nothing)
    assert done.returncode != 0
    assert "FASTCL_REQUIRE_NATIVE=1, but configuring: " in done.stdout + done.stderr

    done = install(clean, source, "-v", FASTCL_NATIVE="0")
    assert done.returncode == 0, done.stdout + done.stderr
    report = run(clean, "-m", "fastcl.info", cwd=tmp_path)
    assert "none: not built (FASTCL_NATIVE=0 was set when this fastcl was built)" in report


def test_without_module_a_wheel_is_for_every_python_and_platform(clean: Path, tmp_path: Path) -> None:
    source = copy_source(tmp_path / "source")
    (source / "fastcl" / MODULE).write_text("left by an earlier build")
    build = (sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path / "dist", source)
    run(*build, cwd=tmp_path, FASTCL_NATIVE="0")
    (wheel,) = (tmp_path / "dist").iterdir()
    assert wheel.name == f"fastcl-{fastcl.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        told = archive.read(next(name for name in names if name.endswith("/WHEEL"))).decode()
    assert re.search(r"^Root-Is-Purelib: true$", told, re.MULTILINE)
    assert re.findall(r"^Tag: (.*)$", told, re.MULTILINE) == ["py3-none-any"]
    assert {"fastcl/__init__.py", "fastcl/_build_failure.py"} <= set(names)
    assert not [name for name in names if name.endswith(".so") or ".data/" in name]
    done = install(clean, wheel)
    assert done.returncode == 0, done.stderr
    assert str(clean.parent.parent) in run(clean, "-W", "error", "-c", USE, cwd=tmp_path)


@pytest.mark.parametrize("name", ["FASTCL_NATIVE", "FASTCL_REQUIRE_NATIVE"])
def test_switches_of_the_build_are_checked(name: str, tmp_path: Path) -> None:
    source = copy_source(tmp_path / "source")
    done = attempt(sys.executable, "setup.py", "build_ext", "--inplace", cwd=source, **{name: "yes"})
    assert done.returncode != 0
    assert f"{name}: expected 0 or 1, got 'yes'" in done.stderr


SMALL_PROJECT = """
cmake_minimum_required(VERSION 3.18)
project(fastcl LANGUAGES CXX)
find_package(Python COMPONENTS Interpreter Development.Module REQUIRED)
Python_add_library(_native MODULE WITH_SOABI csrc/module.cpp)
"""


@needs_compiler
def test_a_build_in_the_tree_replaces_what_the_last_one_left(tmp_path: Path) -> None:
    """Failed and successful builds in turn, as in editable installs; also with CMake's cache of another tree."""
    source = copy_source(tmp_path / "source")
    (source / "CMakeLists.txt").write_text(SMALL_PROJECT)  # compiles quickly
    module, failure = source / "fastcl" / MODULE, source / "fastcl" / "_build_failure.py"

    def build(text: str, **environment: str) -> str:
        (source / "csrc" / "module.cpp").write_text(text)
        done = attempt(sys.executable, "setup.py", "build_ext", "--inplace", cwd=source, **environment)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stderr

    assert "error: " in build("int broken = ;")
    assert not module.exists()
    assert "compiling: " in failure.read_text()
    assert "int broken = ;" in failure.read_text()  # the compiler's own words

    assert build("int works;") == ""
    assert module.exists()
    assert not failure.exists()
    first = module.read_bytes()
    build("int works_too(int x) { return x + 1; }")  # rebuilt as the source has changed
    assert module.read_bytes() != first

    build("int works;", FASTCL_NATIVE="0")
    assert not module.exists()
    assert "FASTCL_NATIVE=0" in failure.read_text()

    moved = source.rename(tmp_path / "moved")
    (moved / "csrc" / "module.cpp").write_text("int works;")
    run(sys.executable, "setup.py", "build_ext", "--inplace", cwd=moved)
    assert (moved / "fastcl" / MODULE).exists()
    (cache,) = moved.glob("build/*/CMakeCache.txt")
    cache.write_text(cache.read_text().replace(str(moved), "/elsewhere"))
    run(sys.executable, "setup.py", "build_ext", "--inplace", cwd=moved)
    assert (moved / "fastcl" / MODULE).exists()
