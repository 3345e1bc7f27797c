"""The device of a GPU run: how it times, captures graphs, counts memory, lists kernels; and a stand-in on the CPU."""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.measure import Step, Timer, clock_timer, cuda_timer, percentiles

QUEUED = 10  # calls issued without a wait: far fewer launches than a device queues
MANY_KERNELS = 30  # listed of one call


@dataclass(frozen=True)
class Device:
    """What differs between a GPU and its stand-in.

    capture: makes one step that replays all given steps as a CUDA graph; None where there are no graphs. peak_bytes:
    the peak of a step above what was allocated before; None where nothing counts it. kernels: the profiler's kernels
    of a step, the longest first. release: returns unused memory.
    """

    torch_device: torch.device
    timer: Timer
    synchronize: Callable[[], None]
    capture: Callable[[Sequence[Step]], Step] | None
    peak_bytes: Callable[[Step], int] | None
    kernels: Callable[[Step], list[dict[str, Any]]]
    release: Callable[[], None]


def gpu() -> Device:
    return Device(
        torch.device("cuda", torch.cuda.current_device()),
        cuda_timer,
        torch.cuda.synchronize,
        _captured,
        _peak_bytes,
        _device_kernels,
        _release,
    )


def stand_in() -> Device:
    """For rehearsals where there is no GPU: the host's clock, no graphs, no count of memory, operators for kernels."""
    return Device(torch.device("cpu"), clock_timer(), lambda: None, None, None, _host_operators, _collect)


def rotating(steps: Sequence[Step]) -> Step:
    """Calls the steps in turn: rows that the previous call left in the cache would make a call too fast."""
    turns = itertools.cycle(steps)
    return lambda: next(turns)()


def host_seconds(step: Step, calls: int, device: Device, clock: Callable[[], float] = time.perf_counter) -> float:
    """Median time in which the host issues one call while the device need not be waited for."""
    taken = []
    for _ in range(5):
        device.synchronize()
        start = clock()
        for _ in range(calls):
            step()
        taken.append((clock() - start) / calls)
    device.synchronize()
    return percentiles(taken)[1]


def _collect() -> None:
    gc.collect()


def _captured(steps: Sequence[Step]) -> Step:
    current, side = torch.cuda.current_stream(), torch.cuda.Stream()
    side.wait_stream(current)
    with torch.cuda.stream(side):
        for _ in range(2):
            steps[0]()
    current.wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for step in steps:
            step()
    graph.replay()
    torch.cuda.synchronize()
    return graph.replay


def _release() -> None:
    gc.collect()  # first: tensors in reference cycles still hold their blocks
    torch.cuda.synchronize()
    torch.cuda.empty_cache()


def _peak_bytes(step: Step) -> int:
    _release()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _device_kernels(step: Step) -> list[dict[str, Any]]:
    from torch._C._autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        step()
        torch.cuda.synchronize()
    found = [event for event in profiled.key_averages() if event.device_type == DeviceType.CUDA]
    return _listed([(event.key, event.count, event.self_device_time_total) for event in found])


def _host_operators(step: Step) -> list[dict[str, Any]]:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        step()
    return _listed([(event.key, event.count, event.self_cpu_time_total) for event in profiled.key_averages()])


def _listed(found: list[tuple[str, int, float]]) -> list[dict[str, Any]]:
    longest = sorted(found, key=lambda entry: -entry[2])[:MANY_KERNELS]
    return [{"name": name[:120], "calls": calls, "us": round(us, 2)} for name, calls, us in longest]
