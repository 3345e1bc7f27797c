"""Lint, types, spelling, white space and workflows, so that one command checks everything."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.support.sources import sources

ROOT = Path(__file__).parents[2]
BINARY = (".png", ".npz")


@pytest.mark.parametrize("command", ["ruff check", "ruff format --check", "mypy"])
def test_house_tools_find_nothing(command: str) -> None:
    tool, *arguments = command.split()
    done = subprocess.run([sys.executable, "-m", tool, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_spelling() -> None:
    names = [str(path) for path in sources() if path.suffix not in BINARY]
    done = subprocess.run([sys.executable, "-m", "codespell_lib", *names], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_text_files_have_no_stray_white_space_and_no_conflicts() -> None:
    for path in sources():
        if path.suffix in BINARY:
            continue
        text = (ROOT / path).read_bytes().decode("utf-8")
        assert not re.search(r"[ \t\r]+$", text, re.MULTILINE), f"{path}: white space at the end of a line"
        assert not re.search(r"^(<{7} |={7}$|>{7} )", text, re.MULTILINE), f"{path}: a merge conflict"
        assert text.endswith("\n") or not text, f"{path}: no newline at its end"
        assert not text.endswith("\n\n"), f"{path}: empty lines at its end"


WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def actionlint(*files: Path) -> subprocess.CompletedProcess[str]:
    tool = shutil.which("actionlint", path=str(Path(sys.executable).parent)) or shutil.which("actionlint")
    if tool is None:
        pytest.skip("actionlint is not installed")
    command = [tool, "-no-color", "-config-file", str(ROOT / ".github" / "actionlint.yaml"), *map(str, files)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_actionlint_finds_nothing() -> None:
    assert WORKFLOWS
    done = actionlint(*WORKFLOWS)
    assert done.returncode == 0, done.stdout + done.stderr


def test_actionlint_finds_a_planted_fault(tmp_path: Path) -> None:
    tests = (ROOT / ".github" / "workflows" / "tests.yml").read_text(encoding="utf-8")
    planted = tmp_path / "tests.yml"
    planted.write_text(tests.replace("matrix.torch }}", "matrix.touch }}"))
    done = actionlint(planted)
    assert done.returncode == 1
    assert 'property "touch" is not defined' in done.stdout


def test_workflows_run_what_ci_runs() -> None:
    """`.ci/run` is the truth, and what workflows run by a path is there and may be executed."""
    run = {
        (path.stem, step["run"])
        for path in WORKFLOWS
        for job in yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"].values()
        for step in job["steps"]
        if "run" in step
    }
    assert ("tests", ".ci/run") in run
    for _, command in run:
        for script in re.findall(r"^\.ci/\w+", command, re.MULTILINE):
            assert (ROOT / script).stat().st_mode & 0o111, script


def test_the_hooks_are_commands_of_the_environment() -> None:
    """As pre-commit installs nothing for them, the extra `dev` must."""
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"][0]["hooks"]
    commands = {hook["entry"].split()[0] for hook in hooks}
    assert commands >= {
        "ruff",
        "mypy",
        "clang-format",
        "codespell",
        "trailing-whitespace-fixer",
        "check-merge-conflict",
    }
    for command in commands:
        assert (Path(sys.executable).parent / command).exists(), command
