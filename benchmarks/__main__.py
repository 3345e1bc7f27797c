"""``python -m benchmarks``: measures, writes rows, and generates the report from them."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from benchmarks.cases import Case
    from benchmarks.run import Row

NEEDED = {"matplotlib": "matplotlib", "tqdm": "tqdm", "torch": "torch"}


def _apart() -> dict[str, Any]:
    """The suites with their own peers, rows and pages, by name."""
    from benchmarks import (
        clusters,
        few_rows,
        many,
        nearest,
        pair_losses,
        pair_rules,
        prototypes,
        queue_step,
        transport_report,
    )

    modules = (transport_report, pair_losses, pair_rules, prototypes, queue_step, few_rows, nearest, clusters, many)
    return {module.SUITE: module for module in modules}


def _parser() -> argparse.ArgumentParser:
    from benchmarks.cases import SUITES

    suites = [*SUITES, *_apart()]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description="Compares speed, memory and error of fastcl and its peers."
    )
    parser.add_argument("--suite", nargs="+", choices=suites, default=suites, help="default: all suites")
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], default="cpu", help="cuda: the plan of benchmarks/gpu_plan.py, in order"
    )
    parser.add_argument(
        "--budget", type=float, metavar="SECONDS", help="with --device cuda: when to stop (default: 240)"
    )
    parser.add_argument(
        "--rehearse", action="store_true", help="with --device cuda: the plan with tiny sizes on the CPU, no GPU needed"
    )
    parser.add_argument("--quick", action="store_true", help="few and small cases: under two minutes on two cores")
    parser.add_argument("--autotune", action="store_true", help="choose the Triton kernels' tiles by time")
    parser.add_argument("--json", action="store_true", help="print only the rows, as JSON lines")
    parser.add_argument("--only", metavar="TEXT", default="", help="run only the cases whose name contains TEXT")
    parser.add_argument(
        "--out", type=Path, help="folder for rows, report and plots (default: runs/benchmarks/MACHINE, not tracked by "
        "git); keeps its rows of other suites, and with --only its rows of other cases"
    )  # fmt: skip
    parser.add_argument(
        "--report", type=Path, metavar="DIR", help="measure nothing: generate the report of the rows in DIR again"
    )
    parser.add_argument(
        "--readme", action="store_true", help="also write the plot and the table of these rows into README.md"
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    start = time.monotonic()
    absent = [package for name, package in NEEDED.items() if importlib.util.find_spec(name) is None]
    if absent:
        print(f'benchmarks need {", ".join(absent)}: pip install ".[bench]"', file=sys.stderr)
        return 2
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.device != "cuda" and (options.budget is not None or options.rehearse):
        parser.error(f"--{'rehearse' if options.rehearse else 'budget'}: expected --device cuda, got --device cpu")
    if options.autotune:
        os.environ.setdefault("FASTCL_TRITON_AUTOTUNE", "1")

    import torch

    from benchmarks import gpu_report, machine, report, transport_report
    from benchmarks.cases import cases

    folder: Path | None = options.report
    if folder is not None:
        if not any((folder / name).is_file() for name in (report.ROWS, transport_report.ROWS, gpu_report.ROWS)):
            parser.error(f"--report: {folder} holds no {report.ROWS}")
    elif options.device == "cuda":
        return _on_gpu(parser, options, start)
    else:
        device = torch.device(options.device)
        folder = options.out or machine.ROOT / "runs" / "benchmarks" / machine.slug(
            machine.processor(device), torch.get_num_threads(), device
        )
        apart, measured = _apart(), False
        here = f"{machine.processor(device)}, {torch.get_num_threads()} threads, torch {torch.__version__}"
        for name in [name for name in apart if name in options.suite]:
            suite = apart[name]
            if not any(options.only in case.name for case in (suite.QUICK if options.quick else suite.CASES)):
                continue
            found = suite.run(folder, device, options.quick, f"{here}, {machine.commit()}.", options.only)
            measured = measured or bool(found)
            for row in found:
                if options.json:
                    print(json.dumps(row), flush=True)
            if found and not options.json:
                print((folder / suite.PAGE).read_text())
        options.suite = [name for name in options.suite if name not in apart]
        chosen = [case for case in cases(options.suite, options.quick) if options.only in case.name]
        if measured and not chosen:
            return 0
        if not chosen:
            parser.error(f"--only: no case of these suites has {options.only!r} in its name")
        folder_of_rows = folder

        def keep(rows: list[Row]) -> None:  # called after every case, so that a stopped run keeps its results
            report.write_rows(folder_of_rows, rows, ())

        rows = _measure(chosen, device, options.quick, options.json, keep)
        report.write_rows(folder, rows, () if options.only else options.suite)
    pages: tuple[Any, ...] = (report, transport_report, gpu_report)
    written = [each for each in pages if (folder / each.ROWS).is_file()]
    for each in written:
        each.write(folder)
    if options.readme:
        try:
            report.write_readme(folder, machine.ROOT / "README.md")
        except ValueError as error:
            parser.error(f"--readme: {error}")
    if not options.json:
        print("\n".join((folder / each.PAGE).read_text() for each in written))
        print(f"written to {os.path.relpath(folder)}", file=sys.stderr)
    return 0


def _on_gpu(parser: argparse.ArgumentParser, options: argparse.Namespace, start: float) -> int:
    """Runs the plan for a GPU, or its rehearsal. The page is written however the run ends."""
    import torch

    from benchmarks import gpu_plan, gpu_report, gpu_run, gpu_supervise, gpu_worker, machine

    if options.quick or options.readme:
        parser.error(f"--{'quick' if options.quick else 'readme'}: expected --device cpu, got --device cuda")
    if not options.rehearse and not torch.cuda.is_available():
        parser.error("--device: cuda is not available: this torch finds no CUDA device")
    suites = [name for name in gpu_plan.suites() if name in options.suite]
    if not gpu_worker.chosen(suites, options.only, options.rehearse):
        parser.error(f"--suite, --only: no problem of the plan for a GPU is in these suites with {options.only!r}")
    device = torch.device("cpu" if options.rehearse else "cuda")
    name = "rehearsal" if options.rehearse else machine.slug(machine.processor(device), 1, device)
    folder = (options.out or machine.ROOT / "runs" / "benchmarks" / name).resolve()
    budget = gpu_plan.SECONDS if options.budget is None else options.budget
    plan = {"rehearsal": options.rehearse, "suites": suites, "only": options.only}
    worker = gpu_worker.command(folder, budget=budget, start=start, **plan)
    try:
        gpu_supervise.supervise(folder, budget, start, worker)
    finally:
        gpu_report.write(folder)
        print((folder / (gpu_run.ROWS if options.json else gpu_report.PAGE)).read_text(), flush=True)
        print(f"written to {os.path.relpath(folder)}", file=sys.stderr)
    return 0


def _measure(
    chosen: Sequence[Case], device: torch.device, quick: bool, as_json: bool, keep: Callable[[list[Row]], None]
) -> list[Row]:
    from tqdm import tqdm

    from benchmarks.providers import providers
    from benchmarks.run import Setting, missing_rows, run

    found, missing = providers(device)
    rows: list[Row] = []
    effort = {"rounds": (5, 15), "seconds": 0.5} if quick else {}

    def add(row: Row) -> None:
        rows.append(row)
        if as_json:
            print(json.dumps(row), flush=True)

    with tqdm(chosen, unit="case", file=sys.stderr, dynamic_ncols=True) as progress:

        def say(what: str) -> None:
            progress.set_postfix_str(what, refresh=sys.stderr.isatty())

        say("peak of the machine")
        setting = Setting.here(device)
        for row in missing_rows(setting, missing):
            add(row)
        for case in progress:
            for row in run(case, found, setting, say, **effort):
                add(row)
            keep(rows)
    return rows


if __name__ == "__main__":
    sys.exit(main())
