"""Runs a GPU plan within a budget of seconds. Every row is on disk as soon as it is measured.

A note beside the rows says what is being measured and for how long at most: `gpu_supervise` reads it.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch

import fastcl
from benchmarks import machine
from benchmarks.device import Device, host_seconds, rotating
from benchmarks.gpu_plan import KERNELS, Entry, Measurement, ordered
from benchmarks.gpu_problems import Contestant, Memo, Posed
from benchmarks.measure import alternate, percentiles
from benchmarks.providers import COMPILED, version
from benchmarks.run import FAILED, MISSING, OK, PATIENCE, TIMED, TOO_LARGE, TOO_SLOW

Row = dict[str, Any]
ROWS, NOTE = "gpu.jsonl", "gpu.now"
SKIPPED = "skipped"
EFFORT: dict[str, Any] = {"rounds": (5, 25), "seconds": 0.4}
# Guesses of the seconds that a measurement takes, until there is one of the same provider.
FIRST_CALL = {"fastcl triton": 10.0, COMPILED: 20.0}
ANY_CALL = 2.0
MARGIN = 1.3  # on the time of the provider's last measurement
PATIENCE_AT_FIRST = 20.0  # seconds beyond the guess, after which a measurement is given up
ISSUED = {True: 10, False: 2}  # calls in a row for the host's time: of short and of long steps
SHORT = 5e-3


@dataclass
class Run:
    """The state of a run. clock: seconds; `start` may lie before its creation, as a process has to start first."""

    device: Device
    folder: Path
    budget: float
    start: float
    rehearsal: bool = False
    clock: Callable[[], float] = time.monotonic
    say: Callable[[str], None] = lambda _: None
    known: set[tuple[str, ...]] = field(default_factory=set)  # keys of the rows in the folder
    last: dict[str, float] = field(default_factory=dict)  # seconds of a provider's last measurement, without checks
    memos: dict[Entry, Memo] = field(default_factory=dict)
    posed: tuple[Entry, Posed] | None = None

    def left(self) -> float:
        return self.budget - (self.clock() - self.start)

    def keep(self, row: Row) -> None:
        """Adds a row, on disk before anything else is measured."""
        append(self.folder, row)
        self.known.add(key(row))
        self.say(" | ".join(str(part) for part in (row["case"], row["provider"], row["what"], row["status"]) if part))


def key(row: Row) -> tuple[str, ...]:
    return row["case"], row["provider"], row["what"]


def read(folder: Path) -> list[Row]:
    """The rows of a folder; the last line may be cut where the process was killed."""
    rows = []
    for line in (folder / ROWS).read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows


def append(folder: Path, row: Row) -> None:
    path = folder / ROWS
    cut = path.is_file() and bool(text := path.read_text()) and not text.endswith("\n")
    with path.open("a") as file:
        file.write("\n" * cut + json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())


def run(plan: Sequence[Entry], state: Run) -> None:
    """Adds the rows of a plan that the folder does not have. What no longer fits into the budget has a row as well."""
    state.folder.mkdir(parents=True, exist_ok=True)
    if (state.folder / ROWS).is_file():
        state.known |= {key(row) for row in read(state.folder)}
    note = state.folder / NOTE
    measurements, missing = ordered(plan, state.device.torch_device)
    for entry, reasons in missing.items():
        for name, reason in reasons.items():
            row = _row(state, Measurement(entry, name), MISSING, reason)
            if key(row) not in state.known:
                state.keep(row)
    parent = os.getppid()
    for measurement in measurements:
        if key(_row(state, measurement, OK, None)) in state.known:
            continue
        needed, left = _needed(state, measurement), state.left()
        if needed > left:
            reason = f"takes about {needed:.0f} s, and {max(left, 0):.0f} s of the budget are left"
            state.keep(_row(state, measurement, SKIPPED, reason))
            continue
        if os.getppid() != parent:  # the supervisor was killed
            return
        since, unfinished = state.clock(), _row(state, measurement, FAILED, None)
        note.write_text(
            json.dumps({"since": since, "until": since + PATIENCE_AT_FIRST + 2.5 * needed, "row": unfinished})
        )
        row = measured(state, measurement)
        state.keep(row)
        if "after" in row:
            raise DeviceLostError(row["after"])
        note.unlink()


class DeviceLostError(Exception):
    """After an illegal access every call of this process raises."""


def _needed(state: Run, measurement: Measurement) -> float:
    """A guess of the seconds that a measurement takes."""
    problem, provider = measurement.entry.problem, measurement.provider
    check = 0.0 if state.memos.get(measurement.entry) else problem.check_seconds()
    if provider in state.last and provider != COMPILED:
        return check + max(MARGIN * state.last[provider], ANY_CALL)
    return check + FIRST_CALL.get(provider, ANY_CALL)


def measured(state: Run, measurement: Measurement) -> Row:
    """The row of a measurement, whatever goes wrong in it."""
    start = state.clock()
    row = _row(state, measurement, OK, None)
    try:
        _measure(state, measurement, row)
    except torch.OutOfMemoryError as error:
        row |= {"status": TOO_LARGE, "reason": _line(error)}
    except Exception as error:  # an error of one provider must not stop the others
        row |= {"status": FAILED, "reason": _line(error)}
    if row["status"] in (TOO_LARGE, FAILED):
        state.posed = None  # it may hold what is broken, or memory that the next one needs
    try:
        state.device.release()
    except Exception as error:  # after an illegal access every call raises
        row["after"] = _line(error)
    taken = state.clock() - start
    row["took_s"] = round(taken, 3)
    check = row.pop("_check_s", 0.0)
    state.last[measurement.provider] = taken - check
    return row


def _measure(state: Run, measurement: Measurement, row: Row) -> None:
    device, entry = state.device, measurement.entry
    if state.posed is None or state.posed[0] != entry:
        state.posed = None
        device.release()
        state.posed = entry, entry.problem.pose(device.torch_device, state.memos.setdefault(entry, {}))
    posed = state.posed[1]
    if measurement.provider == COMPILED:
        torch.compiler.reset()  # earlier graphs count against the limit, beyond which this case would run eagerly
    contestant = posed.contestant(measurement.provider)
    row["versions"].setdefault(contestant.package, version(contestant.package))
    if measurement.what == KERNELS:
        contestant.steps[0]()
        row["kernels"] = device.kernels(contestant.steps[0])
        return
    started = state.clock()
    contestant.steps[0]()
    device.synchronize()
    row["first_call_s"] = round(state.clock() - started, 4)
    checking = state.clock()
    verdict = contestant.judge()
    device.synchronize()
    row["_check_s"] = state.clock() - checking
    row |= {"status": verdict.status, "reason": verdict.reason, "error": verdict.errors}
    if verdict.status in TIMED:
        _time(device, posed, contestant, entry.problem.work, row)


def _time(device: Device, posed: Posed, contestant: Contestant, work: float, row: Row) -> None:
    """Peak memory, times of the eager call and of a graph's replay, each beside the yardstick, and the host's time."""
    for step in contestant.steps:
        step()
    once = device.timer(contestant.steps[0], 1)
    if once > PATIENCE:
        row |= {"status": TOO_SLOW, "reason": f"a call takes {once:.0f} s"}
        return
    if device.peak_bytes is not None:
        row["peak_extra_bytes"] = device.peak_bytes(contestant.steps[0])
    yardstick = posed.yardstick
    yardstick.step()
    call = rotating(contestant.steps)
    samples = alternate({"call": call, "yardstick": yardstick.step}, device.timer, **EFFORT)
    low, middle, high = samples.percentiles("call")
    row |= {
        "p20_ms": low * 1e3,
        "p50_ms": middle * 1e3,
        "p80_ms": high * 1e3,
        "samples": len(samples.seconds["call"]),
        "sets": len(contestant.steps),
        "work": work,
        "unit": yardstick.unit,
        "yardstick": yardstick.name,
        "yardstick_ms": samples.percentiles("yardstick")[1] * 1e3,
        "yardstick_per_second": yardstick.work / samples.percentiles("yardstick")[1],
        "of_yardstick": work / yardstick.work * samples.ratio("call", "yardstick")[1],
        "host_ms": host_seconds(call, ISSUED[middle < SHORT], device) * 1e3,
    }
    row |= _replayed(device, contestant)


def _replayed(device: Device, contestant: Contestant) -> Row:
    if device.capture is None:
        return {"graph_p50_ms": None, "graph_reason": "the stand-in has no graphs"}
    device.release()
    try:
        replay = device.capture(contestant.steps)
        count = len(contestant.steps)
        replay()
        once = device.timer(replay, 1)
        calls = max(1, int(2e-3 / max(once, 1e-9)))
        rounds = [device.timer(replay, calls) / calls / count for _ in range(5 if once > 0.1 else 15)]
    except Exception as error:  # not every step can be captured
        return {"graph_p50_ms": None, "graph_reason": _line(error)}
    return {"graph_p50_ms": percentiles(rounds)[1] * 1e3, "graph_reason": None}


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]


def _row(state: Run, measurement: Measurement, status: str, reason: str | None) -> Row:
    problem, device = measurement.entry.problem, state.device.torch_device
    return {
        "suite": problem.suite,
        "case": problem.name,
        **problem.size,
        "provider": measurement.provider,
        "what": measurement.what,
        "status": status,
        "reason": reason,
        "rehearsal": state.rehearsal,
        "at_s": round(state.clock() - state.start, 3),
        "processor": machine.processor(device),
        "instruction_set": machine.instruction_set(device),
        "versions": {"fastcl": fastcl.__version__, "torch": torch.__version__, "triton": _triton()},
        "commit": _commit(),
    }


_commit = cache(machine.commit)


@cache
def _triton() -> str:
    return version("triton")
