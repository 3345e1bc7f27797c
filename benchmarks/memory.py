"""Peak memory beyond the inputs, measured in a separate process."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import multiprocessing
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import BOTH, Case
from benchmarks.measure import training_step
from benchmarks.providers import Provider

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
LEFT_TO_OTHERS = 2**29  # bytes of the machine's free memory that a measurement may not use


@dataclass(frozen=True)
class Peak:
    """Bytes above the memory that the process held before forward and backward, gradients included."""

    extra: int
    source: str


class TooLargeError(Exception):
    """The call needs more memory than the machine has."""


def measure(case: Case, provider: Provider, device: torch.device, threads: int) -> Peak:
    """Runs the provider in a new process: see `apart`."""
    return apart(partial(_run, case, provider, device), threads)


def apart(run: Callable[[], Peak], threads: int) -> Peak:
    """The result of `run` (picklable) in a new process that is limited to the machine's free memory.

    Raises:
        TooLargeError: it needs more memory.
        RuntimeError: it raised another error; the message has its text.
    """
    context = _processes()
    here, there = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(there, run, threads, available()))
    child.start()
    there.close()
    try:
        with here:
            kind, value = here.recv()
    except EOFError:
        child.join()
        # If memory runs out, the kernel kills the process with SIGKILL.
        if child.exitcode == -9:
            raise TooLargeError("the process was killed, most likely because memory ran out") from None
        raise RuntimeError(f"the measuring process ended with status {child.exitcode}") from None
    child.join()
    if kind == "peak":
        peak: Peak = value
        return peak
    raise {"too large": TooLargeError, "error": RuntimeError}[kind](value)


def _processes() -> Any:
    """Starts processes from a server that has imported torch and run nothing; where there is none, from scratch."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.memory"])
    return context


def available() -> int | None:
    """Bytes that a new process may use; None if the system does not say."""
    try:
        found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:
        return None
    return max(int(found[1]) * 1024 - LEFT_TO_OTHERS, 0) if found else None


def _child(answer: Connection, run: Callable[[], Peak], threads: int, limit: int | None) -> None:
    try:
        torch.set_num_threads(threads)
        if limit is not None:
            _limit(limit)
        answer.send(("peak", run()))
    except Exception as error:
        out_of_memory = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "alloc" in str(error)
        answer.send(("too large" if out_of_memory else "error", f"{type(error).__name__}: {error}".splitlines()[0]))


def _limit(extra: int) -> None:
    import resource

    held = _bytes("VmData")
    with contextlib.suppress(ValueError, OSError):  # fails if a lower limit is already set
        resource.setrlimit(resource.RLIMIT_DATA, (held + extra, resource.getrlimit(resource.RLIMIT_DATA)[1]))


def _bytes(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", _STATUS.read_text())
    if not found:
        raise OSError(f"{_STATUS} has no {field}")
    return int(found[1]) * 1024


def _run(case: Case, provider: Provider, device: torch.device) -> Peak:
    loss = provider.pose(case)
    inputs = case.inputs("random", device)
    return peak_of(training_step(loss, [inputs], BOTH), inputs.leaves)


def peak_of(step: Callable[[], object], leaves: tuple[torch.Tensor, ...]) -> Peak:
    """The peak of a step that has not run before in this process."""
    try:
        _CLEAR.write_text("5")
    except OSError:
        # The mark cannot be reset here, so the first call is measured, including compilation and persistent buffers.
        return Peak(_first_call(step), "ru_maxrss of the first call")
    return Peak(high_water(step, leaves), "VmHWM - VmRSS")


def _settle(leaves: tuple[torch.Tensor, ...]) -> None:
    """Returns memory that the process no longer needs."""
    for leaf in leaves:
        leaf.grad = None
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # malloc_trim exists only in glibc
        ctypes.CDLL(None).malloc_trim(0)


def high_water(step: Any, leaves: tuple[torch.Tensor, ...]) -> int:
    """Bytes that the second call of a step takes at most, beyond those that were held before."""
    step()  # warm-up: compilation, thread pools, persistent buffers
    _settle(leaves)
    _CLEAR.write_text("5")  # resets the high-water mark to the memory held now
    before = _bytes("VmRSS")
    step()
    return _bytes("VmHWM") - before


def _first_call(step: Any) -> int:
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit
