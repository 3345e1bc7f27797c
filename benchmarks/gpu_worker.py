"""The process in which a GPU run measures: ``python -m benchmarks.gpu_worker JSON``; see `gpu_supervise`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import device, gpu_plan, gpu_run


def chosen(suites: Sequence[str], only: str, rehearsal: bool) -> list[gpu_plan.Entry]:
    """The entries of the plan in some suites with some text in their name; for a rehearsal tiny ones."""
    plan = [entry for entry in gpu_plan.PLAN if entry.problem.suite in suites and only in entry.problem.name]
    return gpu_plan.tiny(plan) if rehearsal else plan


def command(folder: Path, **options: Any) -> list[str]:
    return [sys.executable, "-m", "benchmarks.gpu_worker", json.dumps({"folder": str(folder)} | options)]


def main(text: str) -> None:
    options = json.loads(text)
    rehearsal = options["rehearsal"]
    state = gpu_run.Run(
        device.stand_in() if rehearsal else device.gpu(),
        Path(options["folder"]),
        options["budget"],
        options["start"],
        rehearsal,
        say=lambda what: print(what, file=sys.stderr, flush=True),
    )
    gpu_run.run(chosen(options["suites"], options["only"], rehearsal), state)


if __name__ == "__main__":
    main(sys.argv[1])
