"""Times: warm-up, alternation, percentiles, and ratios pair by pair."""

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
Timer = Callable[[Step, int], float]  # seconds of so many calls, one after the other

PERCENTILES = (20, 50, 80)
ROUNDS = (5, 40)  # at least, at most
SECONDS = 2.0  # of samples of one provider at most, once ROUNDS[0] are taken
SAMPLE_SECONDS = 2e-3  # a sample is at least so long: as many calls as that takes


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
    """What a training step does with a loss: gradients dropped, forward with its graph, and the backward if asked.

    `sets` take turns: on a GPU, rows that are still in its cache from the call before would flatter.
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
    """Seconds of one call, one number a round. Round r of all providers lies close together in time."""

    seconds: dict[str, list[float]]
    calls: dict[str, int]  # in a sample

    def percentiles(self, name: str) -> tuple[float, ...]:
        return percentiles(self.seconds[name])

    def ratio(self, name: str, baseline: str) -> tuple[float, ...]:
        """Percentiles of how many times faster `name` is than `baseline`, round by round."""
        pairs = zip(self.seconds[name], self.seconds[baseline], strict=True)
        return percentiles([theirs / ours for ours, theirs in pairs])


def percentiles(values: Sequence[float]) -> tuple[float, ...]:
    return tuple(float(p) for p in np.percentile(values, PERCENTILES))


def alternate(
    steps: Mapping[str, Step], timer: Timer, *, rounds: tuple[int, int] = ROUNDS, seconds: float = SECONDS
) -> Samples:
    """Times every step in turn, round after round, every other round backwards so that a drift favours nobody.

    A sample is of as many calls as last SAMPLE_SECONDS. The number of rounds is the same for all: as many as the
    slowest step does in `seconds`, within `rounds`. The steps have been called before.
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
