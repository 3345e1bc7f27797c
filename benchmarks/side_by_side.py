"""Shared by suites with their own peers: rows of a case with errors, times and ratios, and the page."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.measure import Step, alternate, timer_for
from benchmarks.providers import version

Row = dict[str, Any]


class Contestant(NamedTuple):
    """A measured provider.

    step: the timed function. error: returns the step's relative error against float64; it is called first, and raises
    if the provider cannot compute the case. package: the package whose version is recorded.
    """

    step: Step
    error: Callable[[], float]
    package: str


def measure(
    suite: str,
    case: str,
    contestants: Mapping[str, Contestant],
    missing: Mapping[str, str],
    device: torch.device,
    tolerance: float,
    **effort: Any,
) -> list[Row]:
    """A row per contestant. One with an error above `tolerance` is wrong and not timed.

    effort: options of `measure.alternate`.
    """
    rows: dict[str, Row] = {}
    steps: dict[str, Step] = {}
    for name, contestant in contestants.items():
        row: Row = {"suite": suite, "case": case, "provider": name, "version": version(contestant.package)}
        rows[name] = row
        try:
            error = contestant.error()
            contestant.step()
        except Exception as problem:  # an error of one peer must not stop the others
            row |= {"status": "error", "reason": f"{type(problem).__name__}: {problem}".splitlines()[0][:200]}
            continue
        row["error"] = error
        if not error <= tolerance:
            row |= {"status": "wrong", "reason": f"error {error:.1e}, allowed {tolerance:.0e}"}
            continue
        row["status"] = "ok"
        steps[name] = contestant.step
    samples = alternate(steps, timer_for(device), **effort)
    for name in steps:
        low, middle, high = samples.percentiles(name)
        ratio = {other: samples.ratio(name, other)[1] for other in steps if other != name}
        rows[name] |= {"p20_ms": low * 1e3, "p50_ms": middle * 1e3, "p80_ms": high * 1e3, "ratio": ratio}
    absent = [
        {"suite": suite, "case": case, "provider": name, "status": "missing", "reason": reason}
        for name, reason in missing.items()
    ]
    return [*rows.values(), *absent]


def fastest(rows: Iterable[Row]) -> str:
    """The name of fastcl's fastest backend among the rows of a case; "fastcl" if none has a time."""
    timed = [row for row in rows if row["status"] == "ok" and row["provider"].startswith("fastcl ")]
    return min(timed, key=lambda row: row["p50_ms"])["provider"] if timed else "fastcl"


def page(title: str, rows: Sequence[Row], circumstances: str, note: str) -> str:
    """circumstances: of rows that do not say theirs."""
    lines = [f"# {title}", "", *_circumstances(rows, circumstances), ""]
    for case in dict.fromkeys(row["case"] for row in rows):
        chosen = [row for row in rows if row["case"] == case]
        ours = fastest(chosen)
        weighed = any("extra_bytes" in row for row in chosen)
        columns = ["who", "time (20 to 80 %)", f"{ours} is faster by", "error", *(["extra memory"] if weighed else [])]
        lines += [f"## {case}", "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
        for row in chosen:
            if row["status"] != "ok":
                continue
            faster, extra = row["ratio"].get(ours), row.get("extra_bytes")
            memory = f" {extra / 1e6:.0f} MB |" if extra is not None else " |" if weighed else ""
            lines.append(
                f"| {row['provider']} | {row['p50_ms']:.3g} ms ({row['p20_ms']:.3g} to {row['p80_ms']:.3g}) "
                f"| {f'{1 / faster:.2g}x' if faster else ''} | {row['error']:.0e} |{memory}"
            )
        left_out = [f"- {r['provider']}: {r['status']} ({r['reason']})" for r in chosen if r["status"] != "ok"]
        lines += ["", *left_out, ""] if left_out else [""]
    return "\n".join([*lines, note]) + "\n"


def _circumstances(rows: Iterable[Row], otherwise: str) -> list[str]:
    """The circumstances of most cases, and then of each that was measured in others."""
    by_case = {row["case"]: row.get("circumstances", otherwise) for row in rows}
    found = list(by_case.values())
    most = max(dict.fromkeys(found), key=found.count, default=otherwise)
    apart = [f"- {case}: {where}" for case, where in by_case.items() if where != most]
    return [most, "", *apart] if apart else [most]


def write(folder: Path, suite: str, rows: Iterable[Row], text: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{suite}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / f"{suite}.md").write_text(text)


def run(
    cases: Iterable[Any],
    only: str,
    measured: Callable[..., list[Row]],
    device: torch.device,
    quick: bool,
    folder: Path,
    suite: str,
    title: str,
    circumstances: str,
    note: str,
) -> list[Row]:
    """Measures cases of a suite and writes its rows and page into `folder`, anew after each case.

    only: part of the names of the cases to measure; unless it is empty, the rows of other cases stay. measured: a
    suite's `measure`, which returns the rows of a case.
    """
    effort = {"rounds": (3, 15), "seconds": 0.5 if quick else 2.0}
    rows: list[Row] = []
    before = _written(folder, suite) if only else []
    for case in cases:
        if only not in case.name:
            continue
        rows += [row | {"circumstances": circumstances} for row in measured(case, device, **effort)]
        together = _together(before, rows)
        write(folder, suite, together, page(title, together, circumstances, note))
    return rows


def _written(folder: Path, suite: str) -> list[Row]:
    """The rows in a folder. Those that do not say their circumstances have those of the page."""
    table, text = folder / f"{suite}.jsonl", folder / f"{suite}.md"
    if not (table.exists() and text.exists()):
        return []
    of_page = text.read_text().splitlines()[2]
    return [{"circumstances": of_page} | json.loads(line) for line in table.read_text().splitlines()]


def _together(before: Iterable[Row], rows: Iterable[Row]) -> list[Row]:
    """The rows by case, in the order in which cases came first; new rows replace those of their case."""
    by_case: dict[str, list[Row]] = {}
    for row in before:
        by_case.setdefault(row["case"], []).append(row)
    new: dict[str, list[Row]] = {}
    for row in rows:
        new.setdefault(row["case"], []).append(row)
    return [row for found in (by_case | new).values() for row in found]
