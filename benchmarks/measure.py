"""Timing: alternation of providers, percentiles, and ratios within rounds."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from benchmarks.cases import BOTH, Inputs

Step = Callable[[], object]
Timer = Callable[[Step, int], float]  # seconds of a number of consecutive calls

PERCENTILES = (20, 50, 80)
ROUNDS = (5, 40)  # fewest and most
SECONDS = 2.0  # of samples of the slowest provider, which limits the rounds beyond ROUNDS[0]
SAMPLE_SECONDS = 2e-3  # least duration of a sample, which makes as many calls as that takes


def clock_timer(clock: Callable[[], float] = time.perf_counter) -> Timer:
    def timer(step: Step, calls: int) -> float:
        start = clock()
        for _ in range(calls):
            step()
        return clock() - start

    return timer


def cuda_timer(step: Step, calls: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(calls):
        step()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def timer_for(device: torch.device) -> Timer:
    return cuda_timer if device.type == "cuda" else clock_timer()


def training_step(loss: Callable[[Inputs], Tensor], sets: Sequence[Inputs], direction: str) -> Callable[[], Tensor]:
    """What a training step does with a loss: clear the gradients, forward with a graph, and for BOTH the backward.

    Calls alternate between `sets`: on a GPU, rows that the previous call left in the cache would make it too fast.
    """
    turns = itertools.cycle(sets)

    def step() -> Tensor:
        inputs = next(turns)
        for leaf in inputs.leaves:
            leaf.grad = None
        value = loss(inputs)
        if direction == BOTH:
            value.backward()
        return value

    return step


@dataclass(frozen=True)
class Samples:
    """Seconds of one call, one number per round. All providers are measured close together in time in each round."""

    seconds: dict[str, list[float]]
    calls: dict[str, int]  # per sample

    def percentiles(self, name: str) -> tuple[float, ...]:
        return percentiles(self.seconds[name])

    def ratio(self, name: str, baseline: str) -> tuple[float, ...]:
        """Percentiles over rounds of how many times faster `name` is than `baseline`."""
        pairs = zip(self.seconds[name], self.seconds[baseline], strict=True)
        return percentiles([theirs / ours for ours, theirs in pairs])


def percentiles(values: Sequence[float]) -> tuple[float, ...]:
    return tuple(float(p) for p in np.percentile(values, PERCENTILES))


def alternate(
    steps: Mapping[str, Step], timer: Timer, *, rounds: tuple[int, int] = ROUNDS, seconds: float = SECONDS
) -> Samples:
    """Times all steps in turn, round after round, in reverse order in every other round, so that a drift cancels.

    A sample makes as many calls as take SAMPLE_SECONDS. All steps have the same number of rounds: as many as the
    slowest step does in `seconds`, within `rounds`. Call every step once before, as warm-up.
    """
    calls, longest = {}, 0.0
    for name, step in steps.items():
        once = timer(step, 1)
        calls[name] = max(1, math.ceil(SAMPLE_SECONDS / max(once, 1e-9)))
        longest = max(longest, once if calls[name] == 1 else timer(step, calls[name]))
    count = min(max(rounds[0], int(seconds / max(longest, 1e-9))), rounds[1])
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for r in range(count):
        for name in list(steps)[:: -1 if r % 2 else 1]:
            taken[name].append(timer(steps[name], calls[name]) / calls[name])
    return Samples(taken, calls)
