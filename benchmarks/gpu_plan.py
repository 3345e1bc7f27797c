"""The plan of a GPU run: what is measured in which order, so that a run that stops early has measured the most telling.

First fastcl's backends on every main problem, then eager PyTorch, then kernel times, torch.compile, which compiles for
long, and the other peers; in the end the same of the further problems.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from benchmarks import nearest, pair_losses, transport
from benchmarks.cases import BF16, Case
from benchmarks.gpu_pairs import PairProblem
from benchmarks.gpu_problems import EAGER_HALF, LossProblem, NearestProblem, Problem, SinkhornProblem
from benchmarks.providers import COMPILED, EAGER

SECONDS = 240  # of a run, if not told otherwise
FIRST = ("fastcl triton", "fastcl cuda", "fastcl cpu")
TIME, KERNELS = "time", "kernels"


@dataclass(frozen=True)
class Entry:
    """main: measured before all that is not. profiled: a problem whose kernels are timed one by one."""

    problem: Problem
    main: bool = True
    profiled: bool = False


@dataclass(frozen=True)
class Measurement:
    entry: Entry
    provider: str
    what: str = TIME

    @property
    def name(self) -> str:
        return f"{self.entry.problem.name}: {self.provider}" + (", kernels" if self.what == KERNELS else "")


def _loss(loss: str, n: int, m: int, d: int, dtype: torch.dtype, suite: str = "infonce") -> LossProblem:
    return LossProblem(Case(suite, loss, n, m, d, dtype))


def _small(n: int, dtype: torch.dtype) -> LossProblem:
    return _loss("self", n, n, 128, dtype, "small")


F32 = torch.float32
PLAN: tuple[Entry, ...] = (
    Entry(_loss("self", 65536, 65536, 256, BF16), profiled=True),
    Entry(_loss("self", 16384, 16384, 128, F32), profiled=True),
    Entry(_loss("two sets", 65536, 65536, 512, BF16, "two_set"), profiled=True),
    Entry(_loss("queue", 4096, 2**20, 256, BF16, "memory"), profiled=True),
    Entry(PairProblem(pair_losses.Case("SigLIP", 65536, 768, BF16)), profiled=True),
    *(Entry(_small(n, dtype), profiled=(n, dtype) == (256, BF16)) for n in (256, 1024, 4096) for dtype in (BF16, F32)),
    Entry(SinkhornProblem(transport.Case(4096, 3000)), profiled=True),
    Entry(SinkhornProblem(transport.Case(32768, 131072, dtype=BF16)), profiled=True),
    Entry(NearestProblem(nearest.Case(4096, 10**7, 20, 256, BF16)), profiled=True),
    Entry(_loss("self", 65536, 65536, 128, BF16), main=False),
    Entry(_loss("self", 16384, 16384, 256, BF16), main=False),
    Entry(LossProblem(Case("infonce", "self", 16384, 16384, 128, F32, 4096)), main=False),
    Entry(_loss("two sets", 16384, 16384, 512, BF16, "two_set"), main=False),
    Entry(_loss("two sets", 4096, 4096, 128, F32, "two_set"), main=False),
    Entry(_loss("queue", 4096, 65536, 128, F32, "memory"), main=False),
    *(Entry(_small(n, dtype), main=False) for n in (512, 2048) for dtype in (BF16, F32)),
    Entry(PairProblem(pair_losses.Case("SigLIP", 8192)), main=False),
    Entry(SinkhornProblem(transport.Case(4096, 4096, gradient=True)), main=False),
    Entry(NearestProblem(nearest.Case(64, 10**6, 20)), main=False),
)


def tiny(plan: Sequence[Entry]) -> list[Entry]:
    """The plan for a rehearsal: problems of the same kinds, each once."""
    entries: dict[str, Entry] = {}
    for entry in plan:
        small = Entry(entry.problem.tiny(), entry.main, entry.profiled)
        entries.setdefault(small.problem.name, small)
    return list(entries.values())


def suites() -> list[str]:
    return list(dict.fromkeys(entry.problem.suite for entry in PLAN))


def _wave(provider: str) -> int:
    """When a provider's turn comes; kernel times take turn 2."""
    if provider in FIRST:
        return 0
    return 1 if provider in (EAGER, EAGER_HALF) or provider.startswith("eager") else 3 if provider == COMPILED else 4


def ordered(plan: Sequence[Entry], device: torch.device) -> tuple[list[Measurement], dict[Entry, dict[str, str]]]:
    """All measurements in their order; and for each entry the providers that are missing, with the reason."""
    turns: list[tuple[tuple[bool, int, int], Measurement]] = []
    missing = {}
    for place, entry in enumerate(plan):
        names, missing[entry] = entry.problem.providers(device)
        for name in names:
            turns.append(((not entry.main, _wave(name), place), Measurement(entry, name)))
            if entry.profiled and name in FIRST:
                turns.append(((not entry.main, 2, place), Measurement(entry, name, KERNELS)))
    return [measurement for _, measurement in sorted(turns, key=lambda turn: turn[0])], missing
