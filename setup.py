"""Builds the native module with CMake and Ninja; all else stands in pyproject.toml. Imports no torch.

Without a compiler the package installs all the same, and remembers why it lacks the module (``python -m fastcl.info``).

Environment, read while fastcl is built and not when pip installs a wheel that was built before:
    FASTCL_NATIVE=0: do not build the module.
    FASTCL_REQUIRE_NATIVE=1: a module that cannot be built is an error.
    FASTCL_CUDA=auto, 1 or 0: whether the module has CUDA kernels, which take a minute or two to compile. auto, the
        default: if there are an NVIDIA driver and nvcc (on PATH, in CUDA_HOME or in /usr/local/cuda), and nvcc compiles
        them. 1: also without a driver; it is an error if there is no nvcc or it does not compile them.
    CXX, CXXFLAGS, LDFLAGS, CMAKE_ARGS: as CMake takes them. ARCHFLAGS, on a Mac: the one architecture.
"""

import ctypes
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from importlib import import_module
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError

ROOT = Path(__file__).resolve().parent
PACKAGE = "fastcl"
FAILURE = "_build_failure.py"  # read by fastcl/ops/backends/native.py
CUDA_FAILURE = "_cuda_failure.py"  # read by fastcl/ops/backends/cuda_runtime.py
DRIVER_LIBRARIES = ("libcuda.so.1", "nvcuda.dll")
DRIVER_FOLDER = "/proc/driver/nvidia"
LAST_LINES = 20  # of the failed tool's output, which are kept


class BuildError(Exception):
    """The module was not built. reason: in one line; log: the end of what the tool said."""

    def __init__(self, reason: str, log: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.log = log


def flag(name: str, default: bool) -> bool:
    value = os.environ.get(name, "")
    if value not in ("", "0", "1"):
        raise BaseError(f"{name}: expected 0 or 1, got {value!r}")
    return value == "1" if value else default


def cuda_wanted() -> str:
    value = os.environ.get("FASTCL_CUDA", "") or "auto"
    if value not in ("auto", "0", "1"):
        raise BaseError(f"FASTCL_CUDA: expected auto, 0 or 1, got {value!r}")
    return value


def mac_architecture() -> list[str]:
    """Of the module for a Mac: as in ARCHFLAGS, which pip and cibuildwheel set, else this machine's."""
    named = re.findall(r"-arch\s+(\S+)", os.environ.get("ARCHFLAGS", "")) if sys.platform == "darwin" else []
    return [f"-DCMAKE_OSX_ARCHITECTURES={';'.join(named)}"] if named else []


def find_nvcc() -> str:
    """Its path; empty if there is none."""
    home = os.environ.get("CUDA_HOME", "")
    places = [os.path.join(folder, "bin") for folder in (home, "/usr/local/cuda") if folder]
    return shutil.which("nvcc") or shutil.which("nvcc", path=os.pathsep.join(places)) or ""


def has_driver() -> bool:
    """Whether an NVIDIA driver is installed: its library loads, or its folder or nvidia-smi is there."""
    for library in DRIVER_LIBRARIES:
        try:
            ctypes.CDLL(library)
        except OSError:
            continue
        return True
    return Path(DRIVER_FOLDER).exists() or shutil.which("nvidia-smi") is not None


def tool(name: str) -> str:
    """Path of a tool: from the package of that name, else from PATH."""
    try:
        package = import_module(name)
    except ImportError:
        found = shutil.which(name)
    else:
        folder = getattr(package, "CMAKE_BIN_DIR", None) or getattr(package, "BIN_DIR", None)
        found = shutil.which(name, path=folder) or shutil.which(name)
    if found is None:
        raise BuildError(f"{name} was not found")
    return found


def run(step: str, *command: str) -> None:
    print("+", shlex.join(command), flush=True)
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    print(done.stdout, flush=True)
    if done.returncode != 0:
        lines = [line.rstrip() for line in done.stdout.splitlines() if line.strip()]
        raise BuildError(_told(step, lines), "\n".join(lines[-LAST_LINES:]))


def _told(step: str, lines: list[str]) -> str:
    """The first error among a tool's lines, in one line."""
    for k, line in enumerate(lines):
        if line.startswith("CMake Error"):  # the message itself is indented, and may be wrapped
            message = []
            for following in lines[k + 1 :]:
                if not following.startswith("  "):
                    break
                message.append(following.strip())
            return f"{step}: {' '.join(message) or line}"
        if "error:" in line:
            return f"{step}: {line.strip()}"
    return f"{step}: {lines[-1].strip() if lines else 'failed without a word'}"


def remember(path: Path, failure: BuildError) -> None:
    text = f'"""Written by setup.py."""\n\nREASON = {failure.reason!r}\nLOG = {failure.log!r}\n'
    path.write_text(text, encoding="utf-8")


class BuildNative(build_ext):
    """Leaves the module, or else the reason for its absence, in the build or, for an editable install, in the tree; and
    the reason for the absence of its CUDA kernels."""

    def run(self) -> None:
        package = (ROOT if self.inplace else Path(self.build_lib).resolve()) / PACKAGE
        module = package / Path(self.get_ext_filename("_native")).name
        package.mkdir(parents=True, exist_ok=True)
        for stale in (module, package / FAILURE, package / CUDA_FAILURE):
            stale.unlink(missing_ok=True)
        required, cuda = flag("FASTCL_REQUIRE_NATIVE", False), cuda_wanted()
        try:
            if not flag("FASTCL_NATIVE", True):
                raise BuildError("FASTCL_NATIVE=0 was set when this fastcl was built")
            lacking = self.build_with_cuda(module, cuda)
        except BuildError as failure:
            if required or cuda == "1":
                which = "FASTCL_REQUIRE_NATIVE=1" if required else "FASTCL_CUDA=1"
                raise BaseError(f"{which}, but {failure.reason}\n{failure.log}") from failure
            remember(package / FAILURE, failure)
            print(
                f"WARNING: fastcl is installed WITHOUT its native module: the CPU computes in plain PyTorch, slower.\n"
                f"  {failure.reason}\n  python -m fastcl.info tells this too.",
                file=sys.stderr,
                flush=True,
            )
        else:
            if lacking:
                remember(package / CUDA_FAILURE, lacking)

    def build_with_cuda(self, module: Path, wanted: str) -> BuildError | None:
        """Builds the module, and returns why it has no CUDA kernels."""
        nvcc = find_nvcc() if wanted != "0" else ""
        if nvcc and wanted == "auto" and not has_driver():
            self.build_module(module, "")
            return BuildError(
                "no NVIDIA driver was found when this fastcl was built; building it again from source with "
                "FASTCL_CUDA=1 compiles the CUDA kernels all the same"
            )
        if nvcc:
            try:
                self.build_module(module, nvcc)
            except BuildError as failure:
                if wanted == "1":
                    raise
                self.build_module(module, "")
                return failure
            return None
        if wanted == "1":
            raise BuildError("nvcc was not found on PATH, in CUDA_HOME or in /usr/local/cuda")
        self.build_module(module, "")
        if wanted == "0":
            return BuildError("FASTCL_CUDA=0 was set when this fastcl was built")
        return BuildError("nvcc was not found on PATH, in CUDA_HOME or in /usr/local/cuda when this fastcl was built")

    def build_module(self, module: Path, nvcc: str) -> None:
        # One folder for each Python: the module's name and headers are Python's, and CMake remembers them.
        folder = ROOT / "build" / f"native-{sys.implementation.cache_tag}-{sysconfig.get_platform()}"
        variables = (os.environ.get(v, "") for v in ("CXX", "CXXFLAGS", "LDFLAGS", "ARCHFLAGS"))
        inputs = "\n".join([str(ROOT), sys.executable, find_nvcc(), *variables])
        remembered = folder / "inputs.txt"
        if remembered.is_file() and remembered.read_text(encoding="utf-8") != inputs:
            shutil.rmtree(folder)
        known = folder.exists()
        try:
            self.compile(folder, module, nvcc)
        except BuildError:
            if not known:
                raise
            shutil.rmtree(folder)  # what an older build left may be what is in the way
            self.compile(folder, module, nvcc)
        remembered.write_text(inputs, encoding="utf-8")

    def compile(self, folder: Path, module: Path, nvcc: str) -> None:
        cmake = tool("cmake")
        try:
            pybind11 = import_module("pybind11").get_cmake_dir()
        except ImportError:
            raise BuildError("pybind11 was not found") from None
        run(
            "configuring",
            *(cmake, "-S", str(ROOT), "-B", str(folder), "-G", "Ninja"),
            # All that may lie in an isolated environment that is gone by the next build is named each time.
            f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}",
            f"-Dpybind11_DIR={pybind11}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DFASTCL_VERSION={self.distribution.get_version()}",
            f"-DFASTCL_CUDA={'ON' if nvcc else 'OFF'}",
            *([f"-DCMAKE_CUDA_COMPILER={nvcc}"] if nvcc else []),
            *mac_architecture(),
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        )
        run("compiling", cmake, "--build", str(folder))
        built = folder / module.name
        if not built.is_file():
            raise BuildError(f"CMake built no {module.name}")
        shutil.copy2(built, module)


class Wheel(bdist_wheel):
    """Without the native module a wheel serves every Python and platform, and its tag says so."""

    def run_command(self, command: str) -> None:
        super().run_command(command)
        if command == "build" and (Path(self.get_finalized_command("build").build_lib) / PACKAGE / FAILURE).exists():
            self.root_is_pure = True
            self.distribution.ext_modules = []


def description() -> str:
    """README.md for a package index, where relative links lead nowhere: names of files instead, and no pictures."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    text = re.sub(r"^(<!--.*-->|!\[.*\]\((?!https:).*\))\n+", "", text, flags=re.MULTILINE)

    def named(link: re.Match[str]) -> str:
        words, target = link[1].strip("`"), link[2].split("#")[0]
        return target if words in target else f"{words} ({target})"

    return re.sub(r"\[([^\[\]]+)\]\((?!https:|#)([^()]+)\)", named, text)


setup(
    ext_modules=[Extension("fastcl._native", sources=[])],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": Wheel},
    long_description=description(),
    long_description_content_type="text/markdown",
)
