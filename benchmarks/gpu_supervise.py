"""Supervises a GPU run in another process, which a kernel that hangs or reads out of bounds may take down with it.

What was being measured then gets a row that says so, and a new process goes on with what comes after it.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.gpu_run import NOTE, ROWS, append, key, read

GRACE = 10.0  # seconds after the budget in which the measurement under way may end
POLL = 0.2


def supervise(folder: Path, budget: float, start: float, worker: Sequence[str]) -> int:
    """Runs workers until one has finished the plan, or the budget is over; returns how many it took.

    worker: the command of a worker, which adds to the rows in `folder`. start: on the clock time.monotonic.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ROWS).write_text("")
    note = folder / NOTE
    count = 0
    with _terminated_in_order():
        while True:
            note.unlink(missing_ok=True)
            count += 1
            process = subprocess.Popen(worker, cwd=machine.ROOT)
            try:
                fate = _watch(process, note, start + budget + GRACE)
            finally:
                process.kill()
                process.wait()
            if fate is None:
                return count
            known = _read(note)
            over = time.monotonic() > start + budget
            if known is None:  # nothing was being measured: the next worker would end in the same way
                append(folder, _row_of_no_case(fate))
                return count
            if key(known["row"]) not in map(key, read(folder)):
                append(folder, known["row"] | {"reason": fate})
            if over:
                note.unlink(missing_ok=True)
                return count


def _watch(process: subprocess.Popen[bytes], note: Path, end: float) -> str | None:
    """What became of a worker that did not finish; None if it did."""
    while process.poll() is None:
        known, now = _read(note), time.monotonic()
        if known is not None and now > known["until"]:
            return f"stopped: not done {now - known['since']:.0f} s after it began"
        if now > end:
            return "stopped: the budget was over"
        time.sleep(POLL)
    if process.returncode == 0:
        return None
    how = f"signal {-process.returncode}" if process.returncode < 0 else f"status {process.returncode}"
    return f"the process ended with {how}"


def _read(note: Path) -> Any:
    try:
        return json.loads(note.read_text())
    except (OSError, json.JSONDecodeError):  # there is none, or it is just being written
        return None


def _row_of_no_case(fate: str) -> dict[str, Any]:
    return {"suite": None, "case": "", "provider": "", "what": "run", "status": "error", "reason": fate}


@contextmanager
def _terminated_in_order() -> Iterator[None]:
    """SIGTERM, as `timeout` sends it, ends the worker too."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
