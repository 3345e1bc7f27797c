"""Processes that compile Triton kernels ahead of time, and which part of the kernels they compile."""

from __future__ import annotations

import json
import os
import queue
import random
import subprocess
import sys
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
ROOT = Path(__file__).parents[2]
SHARD = "FASTCL_COMPILE_SHARD"


def environment(root: Path, cache: Path) -> dict[str, str]:
    """FASTCL_COMPILE_WITH: a folder with another Triton than the installed one."""
    other = os.environ.get("FASTCL_COMPILE_WITH")
    path = os.pathsep.join([*([other] if other else []), str(root)])
    return os.environ | {"PYTHONPATH": path, "TRITON_CACHE_DIR": str(cache)}


def everything() -> bool:
    """Whether tests compile all kernels, or a shard of all, and not only a few."""
    return bool(os.environ.get("FASTCL_COMPILE_ALL") or os.environ.get(SHARD))


def shard(entries: Collection[T], asked: str) -> list[T]:
    """The K-th of N parts of the entries, in their order, if `asked` is K/N; all if it is empty."""
    if not asked:
        return list(entries)
    part, slash, parts = asked.partition("/")
    if not (slash and part.isdecimal() and parts.isdecimal() and 1 <= int(part) <= int(parts)):
        raise ValueError(f"{SHARD}: expected K/N with 1 <= K <= N, got {asked!r}")
    # Neighbours take about the same time, so a part gets them at random.
    places = list(range(len(entries)))
    random.Random(0).shuffle(places)
    own = set(places[int(part) - 1 :: int(parts)])
    return [entry for place, entry in enumerate(entries) if place in own]


def chosen(some: Collection[T], all_: Collection[T]) -> list[T]:
    """What a test compiles: by default `some`; with FASTCL_COMPILE_ALL all, with FASTCL_COMPILE_SHARD a part of all."""
    return shard(all_, os.environ.get(SHARD, "")) if everything() else list(some)


class Compilers:
    """Processes that each compile one kernel at a time. They start when they are first needed.

    None is compiled twice, as they stay in a folder: that of TRITON_CACHE_DIR, if it is set, keeps them for later runs.
    """

    def __init__(self, cache: Path) -> None:
        self._cache = Path(os.environ.get("TRITON_CACHE_DIR", cache))
        self._log = (cache / "stderr").open("w+")
        # Processes of pytest-xdist share the cores.
        number = max(1, (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))
        self._pool = ThreadPoolExecutor(number)
        self._idle: queue.SimpleQueue[subprocess.Popen[str] | None] = queue.SimpleQueue()
        for _ in range(number):
            self._idle.put(None)

    def __call__(self, jobs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """The jobs and their outcomes, in order: see `compile_triton.compiled`."""
        return list(self._pool.map(self._outcome, jobs))

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
        while not self._idle.empty():
            if (process := self._idle.get()) is not None:
                process.communicate()  # closes its input, which ends it
        self._log.close()

    def _outcome(self, job: dict[str, Any]) -> dict[str, Any]:
        process = self._idle.get() or self._started()
        assert process.stdin is not None
        assert process.stdout is not None
        print(json.dumps(job), file=process.stdin, flush=True)
        line = process.stdout.readline()
        if not line:  # the compiler has crashed
            process.communicate()
            self._idle.put(None)
            raise AssertionError(f"{job}: {Path(self._log.name).read_text()[-2000:]}")
        self._idle.put(process)
        outcome: dict[str, Any] = json.loads(line)
        assert "error" not in outcome, outcome["error"]
        return outcome

    def _started(self) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "support" / "compile_triton.py")],
            env=environment(ROOT, self._cache),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
