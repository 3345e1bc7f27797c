"""``python -m benchmarks``: measures, writes rows, and generates the report from them."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
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
    from benchmarks import many, nearest, queue_step, transport_report

    return {module.SUITE: module for module in (transport_report, queue_step, nearest, many)}


def _parser() -> argparse.ArgumentParser:
    from benchmarks.cases import SUITES

    suites = [*SUITES, *_apart()]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description="Compares speed, memory and error of fastcl and its peers."
    )
    parser.add_argument("--suite", nargs="+", choices=suites, default=suites, help="default: all suites")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
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
    absent = [package for name, package in NEEDED.items() if importlib.util.find_spec(name) is None]
    if absent:
        print(f'benchmarks need {", ".join(absent)}: pip install ".[bench]"', file=sys.stderr)
        return 2
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.autotune:
        os.environ.setdefault("FASTCL_TRITON_AUTOTUNE", "1")

    import torch

    from benchmarks import machine, report, transport_report
    from benchmarks.cases import cases

    folder: Path | None = options.report
    if folder is not None:
        if not any((folder / name).is_file() for name in (report.ROWS, transport_report.ROWS)):
            parser.error(f"--report: {folder} holds no {report.ROWS}")
    else:
        if options.device == "cuda" and not torch.cuda.is_available():
            parser.error("--device: cuda is not available: this torch finds no CUDA device")
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
        chosen = [case for case in cases(options.suite, options.quick, options.device) if options.only in case.name]
        if measured and not chosen:
            return 0
        if not chosen:
            parser.error(f"--only: no case of these suites has {options.only!r} in its name")
        folder_of_rows = folder

        def keep(rows: list[Row]) -> None:  # called after every case, so that a stopped run keeps its results
            report.write_rows(folder_of_rows, rows, ())

        rows = _measure(chosen, device, options.quick, options.json, keep)
        report.write_rows(folder, rows, () if options.only else options.suite)
    written = [each for each in (report, transport_report) if (folder / each.ROWS).is_file()]
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


def _measure(
    chosen: Sequence[Case], device: torch.device, quick: bool, as_json: bool, keep: Callable[[list[Row]], None]
) -> list[Row]:
    from tqdm import tqdm

    from benchmarks.providers import providers
    from benchmarks.run import Setting, missing_rows, run

    found, missing = providers(device)
    rows: list[Row] = []
    effort = {"rounds": (5, 15), "seconds": 0.5} if quick or device.type == "cuda" else {}

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
