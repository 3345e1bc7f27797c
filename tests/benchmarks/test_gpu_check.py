"""benchmarks/gpu_check.sh with other commands in place of its stages: boxes of time, failures, the table at the end."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_check.sh"
STAGES = ("build", "smoke", "speed", "tests", "sanitizer")
pytestmark = pytest.mark.skipif(
    not shutil.which("bash") or not shutil.which("timeout"), reason="needs bash and timeout"
)


def check(out: Path, *arguments: str, **options: str) -> tuple[int, dict[str, list[str]], str]:
    """Exit status; the table's rows by stage, without the last line of the log; and all that was printed."""
    commands = {f"FASTCL_CHECK_{name.upper()}": f"echo {name} works" for name in STAGES}
    environment = os.environ | commands | {f"FASTCL_CHECK_{name.upper()}": value for name, value in options.items()}
    command = ["bash", str(SCRIPT), *arguments, str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    table = (out / "table.txt").read_text()
    assert done.stdout.endswith(table)
    pattern = r"^(\w+) +(ok|not all ok|out of time|no time left|failed \(\d+\)) +(\d+)(?: +(-?\d+))?"
    rows = {name: [status, seconds, box] for name, status, seconds, box in re.findall(pattern, table, re.MULTILINE)}
    assert tuple(rows) == (*STAGES, "total")
    return done.returncode, rows, done.stdout


def test_all_stages_run_in_order_and_the_table_comes_last(tmp_path) -> None:
    code, rows, printed = check(tmp_path / "out")
    assert code == 0
    assert {status for status, *_ in rows.values()} == {"ok"}
    assert [line.split(":")[0] for line in printed.splitlines() if " at most " in line] == list(STAGES)
    assert "sanitizer works" in printed
    assert (tmp_path / "out" / "speed.log").read_text() == "speed works\n"


def test_a_stage_that_fails_or_runs_out_of_time_stops_no_other(tmp_path) -> None:
    hung = "echo begun; sleep 100 & wait"
    code, rows, printed = check(tmp_path, build="echo no nvcc; exit 7", speed=hung, boxes="30 30 1 30 30")
    assert code == 1
    assert {name: status for name, (status, *_) in rows.items()} == {
        "build": "failed (7)",
        "smoke": "ok",
        "speed": "out of time",
        "tests": "ok",
        "sanitizer": "ok",
        "total": "not all ok",
    }
    assert "no nvcc" in printed
    assert int(rows["speed"][1]) < 20
    assert "begun" in (tmp_path / "speed.log").read_text()


def test_what_a_stage_started_ends_with_its_box(tmp_path) -> None:
    mark = tmp_path / "still there"
    check(tmp_path, smoke=f"(sleep 4; touch '{mark}') & wait", boxes="30 1 30 30 30", build="true", tests="sleep 5")
    assert not mark.exists()


def test_all_stages_together_have_the_time_they_are_given(tmp_path) -> None:
    code, rows, _ = check(tmp_path, seconds="8", build="sleep 60")
    assert code == 1
    assert rows["build"][0] == "out of time"
    assert int(rows["build"][2]) <= 3
    assert rows["sanitizer"][0] in ("no time left", "ok")
    assert int(rows["total"][1]) < 60


def test_a_stage_knows_its_box_and_finds_the_package_without_installation(tmp_path) -> None:
    command = 'cd /; echo "$FASTCL_CHECK_BOX $OUT $PYTHONPATH"'
    _, rows, _ = check(tmp_path / "a", speed=command)
    box, out, path = (tmp_path / "a" / "speed.log").read_text().split()
    assert box == rows["speed"][2] == "215"
    assert Path(out) == tmp_path / "a"
    assert path.split(":")[0] == str(SCRIPT.parents[1])


@pytest.mark.parametrize("arguments", [[], ["--other"], ["a", "b"]])
def test_wrong_arguments(arguments, tmp_path) -> None:
    done = subprocess.run(["bash", str(SCRIPT), *arguments], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "usage: benchmarks/gpu_check.sh [--dry-run] OUT\n"
    assert not list(tmp_path.iterdir())
