"""The page of a GPU run, from its rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu_plan import KERNELS
from benchmarks.gpu_run import ROWS, SKIPPED, Row, read
from benchmarks.run import MISSING, TIMED

PAGE = "gpu.md"
SHOWN = 12  # kernels of a table
NOTE = (
    "A call computes loss and gradients (Sinkhorn: assignments; top-k: values and indices). Time: median and 20th to "
    "80th percentile, by CUDA events, with rotating inputs. Graph: the same calls replayed as a CUDA graph. Host: the "
    "time in which the host issues a call. Over: how many times faster fastcl's fastest backend is, the quotient of "
    "medians. Of yardstick: the least work of the case per second, as a share of the yardstick's, which takes turns "
    "with the provider; Sinkhorn counts the forward alone. Extra: peak memory beyond the inputs. Error: the largest "
    "relative error against float64; †: above what fastcl's own backends are allowed. A wrong provider has no time."
)


def write(folder: Path) -> None:
    (folder / PAGE).write_text(page(read(folder)))


def page(rows: Sequence[Row]) -> str:
    known = [row for row in rows if row["suite"] is not None]
    lines = ["# On a GPU" if not any(row["rehearsal"] for row in known) else "# Rehearsal of a GPU run, on the CPU", ""]
    if known:
        first = known[0]
        versions = {name: version for row in known for name, version in row["versions"].items()}
        lines += [
            f"{first['processor']}, {first['instruction_set']}; commit {first['commit']}; "
            + ", ".join(f"{name} {version}" for name, version in versions.items()),
            "",
        ]
    lines += [f"**The run ended early**: {row['reason']}." for row in rows if row["suite"] is None]
    measured = [row for row in known if row["status"] not in (MISSING, SKIPPED)]
    for name in dict.fromkeys(row["case"] for row in measured):
        lines += _case(name, [row for row in measured if row["case"] == name])
    skipped = [f"{row['case']}: {row['provider']}, {row['what']}" for row in known if row["status"] == SKIPPED]
    if skipped:
        lines += ["## Not measured: the budget was over", "", *(f"- {name}" for name in skipped), ""]
    missing: dict[str, list[str]] = {}
    for row in known:
        if row["status"] == MISSING:
            names = missing.setdefault(f"{row['provider']}: {row['reason']}", [])
            names.append(row["case"])
    if missing:
        everywhere = len({row["case"] for row in known})
        lines += ["## Missing", ""]
        for what, cases in missing.items():
            lines.append(f"- {what}" + ("" if len(cases) == everywhere else f" ({len(cases)} of {everywhere} cases)"))
        lines.append("")
    return "\n".join([*lines, NOTE]) + "\n"


def _case(name: str, rows: Sequence[Row]) -> list[str]:
    timed = [row for row in rows if row["status"] in TIMED and "p50_ms" in row]
    ours = [row for row in timed if row["provider"].startswith("fastcl ")]
    best = min((row["p50_ms"] for row in ours), default=None)
    lines = [f"## {name}", ""]
    if timed:
        lines += [
            f"Yardstick: {timed[0]['yardstick']}.",
            "",
            "| who | time | graph | host | over | of yardstick | extra | error | first call |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
    for row in timed:
        theirs = not row["provider"].startswith("fastcl ")
        over = f"{row['p50_ms'] / best:.2g}x" if best and theirs else ""
        mark = "†" if row["status"] != "ok" else ""
        extra = row.get("peak_extra_bytes")
        lines.append(
            f"| {row['provider']} | {_ms(row['p50_ms'])} ({_ms(row['p20_ms'])} to {_ms(row['p80_ms'])}) "
            f"| {_ms(row['graph_p50_ms']) if row.get('graph_p50_ms') else ''} | {_ms(row['host_ms'])} | {over} "
            f"| {100 * row['of_yardstick']:.0f} % | {'' if extra is None else f'{extra / 1e6:.4g} MB'} "
            f"| {_error(row)}{mark} | {row['first_call_s']:.2g} s |"
        )
    remarks = [
        f"- {row['provider']}, {row['what']}: {row['status']} ({row['reason']})"
        for row in rows
        if row["status"] not in TIMED
    ]
    remarks += [
        f"- {row['provider']}: no graph ({row['graph_reason']})"
        for row in timed
        if row.get("graph_reason") and not row["rehearsal"]
    ]
    lines += ["", *remarks] if remarks else []
    for row in rows:
        if row["what"] == KERNELS and row.get("kernels"):
            lines += ["", f"Kernels of {row['provider']}:", "", "| kernel | calls | µs |", "|---|---|---|"]
            lines += [f"| `{k['name']}` | {k['calls']} | {k['us']:.4g} |" for k in row["kernels"][:SHOWN]]
    return [*lines, ""]


def _error(row: Row) -> str:
    worst = [v for part in row["error"].values() if isinstance(part, dict) for k, v in part.items() if k != "allowed"]
    worst += [row["error"]["result"]] if "result" in row["error"] else []
    return f"{max(worst):.0e}" if worst else ""


def _ms(number: float) -> str:
    return f"{number:.3g} ms" if number >= 1 else f"{1e3 * number:.3g} µs"


__all__ = ["PAGE", "ROWS", "page", "write"]
