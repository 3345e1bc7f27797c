"""What a user installs: sdist and wheel, into an environment that holds nothing else."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ENVIRONMENT = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONWARNINGS", "FASTCL_BACKEND")}

USE = """
import sys, torch, fastcl
z = torch.randn(8, 2, 4, requires_grad=True)
fastcl.ClusterInfoNCE()(z).backward()
assert z.grad.isfinite().all() and z.grad.abs().sum() > 0
print(fastcl.__file__)
"""


def run(*command: object, cwd: Path) -> str:
    done = subprocess.run([str(c) for c in command], cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The sdist, built from a copy of what git would ship, and the wheel built from the sdist."""
    where = tmp_path_factory.mktemp("built")
    source = where / "source"
    names = run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT).splitlines()
    for name in names:
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", where / "dist", source, cwd=where)
    return next((where / "dist").glob("*.tar.gz")), next((where / "dist").glob("*.whl"))


def test_wheel_holds_the_package_and_nothing_else(built: tuple[Path, Path]) -> None:
    names = set(zipfile.ZipFile(built[1]).namelist())
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "fastcl").rglob("*.py")}
    assert modules <= names
    assert "fastcl/py.typed" in names
    assert {name.split("/")[0].split("-")[0] for name in names} == {"fastcl"}


def test_sdist_holds_what_a_build_needs(built: tuple[Path, Path]) -> None:
    with tarfile.open(built[0]) as archive:
        names = {name.split("/", 1)[-1] for name in archive.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "fastcl/infonce.py"} <= names


def test_metadata_leaves_the_user_free_to_have_any_torch(built: tuple[Path, Path]) -> None:
    wheel = zipfile.ZipFile(built[1])
    metadata = wheel.read(next(name for name in wheel.namelist() if name.endswith("METADATA"))).decode()
    required = [line.split(": ", 1)[1] for line in metadata.splitlines() if line.startswith("Requires-Dist")]
    assert [line for line in required if "extra ==" not in line] == ["torch>=2.6", "numpy"]


@pytest.mark.slow
def test_sdist_and_wheel_install_into_an_empty_environment(built: tuple[Path, Path], tmp_path: Path) -> None:
    sdist, wheel = built
    run(sys.executable, "-m", "venv", tmp_path / "venv", cwd=tmp_path)
    python = tmp_path / "venv" / "bin" / "python"
    constraints = ROOT / "constraints.txt"
    run(python, "-m", "pip", "install", "-q", "-c", constraints, sdist, cwd=tmp_path)
    assert str(tmp_path / "venv") in run(python, "-W", "error", "-c", USE, cwd=tmp_path)
    run(python, "-m", "pip", "uninstall", "-q", "-y", "fastcl", cwd=tmp_path)
    run(python, "-m", "pip", "install", "-q", "--no-deps", wheel, cwd=tmp_path)
    assert str(tmp_path / "venv") in run(python, "-W", "error", "-c", USE, cwd=tmp_path)

    assert "chunked" in run(python, "-W", "error", "-m", "fastcl.info", cwd=tmp_path)
    trainer = subprocess.run(
        [str(python), "-m", "fastcl.train"], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True
    )
    assert trainer.returncode != 0
    assert 'pip install "fastcl[train]"' in trainer.stderr
    assert "Traceback" not in trainer.stderr
