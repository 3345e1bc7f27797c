"""A GPU run is supervised: workers that die, hang or run over the budget cost one measurement, not the run."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import gpu_run, gpu_supervise, machine

# A worker of made-up measurements a to d. What stands in `fault` goes wrong at b.
WORKER = """
import json, os, signal, sys, time
folder, fault, patience = sys.argv[1:]
rows, note = os.path.join(folder, "gpu.jsonl"), os.path.join(folder, "gpu.now")
done = [json.loads(line)["case"] for line in open(rows)]
for case in "abcd":
    if case in done:
        continue
    row = {"suite": "s", "case": case, "provider": "p", "what": "time", "status": "error", "reason": None}
    now = time.monotonic()
    open(note, "w").write(json.dumps({"since": now, "until": now + float(patience), "row": row}))
    if case == "b" and fault == "dies":
        os.kill(os.getpid(), signal.SIGSEGV)
    if case == "b" and fault == "hangs":
        time.sleep(600)
    with open(rows, "a") as file:
        file.write(json.dumps(row | {"status": "ok"}) + chr(10))
    if case == "b" and fault == "loses the device":
        sys.exit(1)
    os.unlink(note)
    if case == "b" and fault == "ends between two":
        sys.exit(3)
"""


def supervised(folder: Path, fault: str, patience: float = 60, budget: float = 60) -> tuple[int, dict[str, dict]]:
    worker = [sys.executable, "-S", "-c", WORKER, str(folder), fault, str(patience)]
    count = gpu_supervise.supervise(folder, budget, time.monotonic(), worker)
    return count, {row["case"]: row for row in gpu_run.read(folder)}


def status(rows: dict[str, dict]) -> dict[str, str]:
    return {case: row["status"] for case, row in rows.items()}


def test_a_run_without_faults_takes_one_process(tmp_path) -> None:
    count, rows = supervised(tmp_path, "none")
    assert count == 1
    assert status(rows) == dict.fromkeys("abcd", "ok")


@pytest.mark.parametrize("fault", ["dies", "hangs"])
def test_the_next_process_goes_on_after_what_went_wrong(tmp_path, fault) -> None:
    count, rows = supervised(tmp_path, fault, patience=60 if fault == "dies" else 1.5)
    assert count == 2
    assert status(rows) == {"a": "ok", "b": "error", "c": "ok", "d": "ok"}
    expected = f"the process ended with signal {signal.SIGSEGV}" if fault == "dies" else "stopped: not done 2 s"
    assert rows["b"]["reason"].startswith(expected)


def test_a_row_that_was_written_before_the_device_was_lost_stays(tmp_path) -> None:
    count, rows = supervised(tmp_path, "loses the device")
    assert count == 2
    assert status(rows) == dict.fromkeys("abcd", "ok")


def test_a_process_that_ends_where_nothing_is_measured_is_not_repeated(tmp_path) -> None:
    count, rows = supervised(tmp_path, "ends between two")
    assert count == 1
    assert status(rows) == {"a": "ok", "b": "ok", "": "error"}
    assert rows[""]["reason"] == "the process ended with status 3"


def test_nothing_runs_on_when_the_budget_is_over(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(gpu_supervise, "GRACE", 0.5)
    before = time.monotonic()
    count, rows = supervised(tmp_path, "hangs", budget=1.5)
    assert count == 1
    assert status(rows) == {"a": "ok", "b": "error"}
    assert rows["b"]["reason"] == "stopped: the budget was over"
    assert not (tmp_path / gpu_run.NOTE).exists()
    assert time.monotonic() - before < 300  # not the worker's 600


def test_a_terminated_supervisor_ends_its_worker(tmp_path) -> None:
    worker = [sys.executable, "-S", "-c", WORKER, str(tmp_path), "hangs", "600"]
    program = (
        "import sys, time; from pathlib import Path; from benchmarks import gpu_supervise as s\n"
        f"s.supervise(Path({str(tmp_path)!r}), 600, time.monotonic(), {worker!r})"
    )
    environment = os.environ | {"PYTHONPATH": str(machine.ROOT)}
    process = subprocess.Popen([sys.executable, "-c", program], env=environment, cwd=tmp_path)
    note = tmp_path / gpu_run.NOTE
    try:
        while not (note.is_file() and '"case": "b"' in note.read_text()):
            assert process.poll() is None
            time.sleep(0.05)
        [child] = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        process.terminate()
        assert process.wait(60) == 128 + signal.SIGTERM
    finally:
        process.kill()
    assert not Path(f"/proc/{child}").exists()
    assert [json.loads(line)["case"] for line in (tmp_path / gpu_run.ROWS).read_text().splitlines()] == ["a"]
