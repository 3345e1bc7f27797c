"""The plots, generated from rows alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from benchmarks.cases import BOTH
from benchmarks.providers import CHUNKED, COMPILED, EAGER, LINEAR_CROSS_ENTROPY
from benchmarks.run import TIMED, Row

TIME, MEMORY, RATIO, SHARE, ERROR = "time.png", "memory.png", "ratio.png", "share_of_peak.png", "error.png"
CAPTIONS = {
    TIME: "Time over the number of rows",
    MEMORY: "Peak extra memory over the number of rows",
    RATIO: "How many times faster fastcl is than eager PyTorch and torch.compile",
    SHARE: "Share of the machine's peak",
    ERROR: "Error of the gradient against float64 over the number of rows",
}
_COLOURS = {
    "fastcl cpu": "#d62728",
    "fastcl chunked": "#ff7f0e",
    "fastcl triton": "#d62728",
    "fastcl cuda": "#8c1a1a",
    EAGER: "#7f7f7f",
    COMPILED: "#1f77b4",
    CHUNKED: "#2ca02c",
    LINEAR_CROSS_ENTROPY: "#17becf",
    "pytorch-metric-learning": "#9467bd",
    "lightly": "#e377c2",
    "Inf-CL": "#bcbd22",
    "cut-cross-entropy": "#8c564b",
    "Liger-Kernel": "#000000",
}
PROBLEM = ("self-contrast, pairs", 128, "float32")  # problem, D and dtype of the plots over N


def rounded(number: float) -> str:
    """Two significant digits, or all digits before the point if there are more."""
    return f"{number:.0f}" if number >= 9.95 else f"{number:.2g}"


def draw(rows: Sequence[Row], folder: Path) -> list[str]:
    """Writes the plots for which there are rows, and returns their names."""
    done = [row for row in rows if row["status"] in TIMED and row["direction"] == BOTH]
    over_n = [row for row in done if (row["problem"], row["d"], row["dtype"]) == PROBLEM]
    several = len({row["n"] for row in over_n}) > 1
    figures = {
        TIME: _time(over_n) if several else None,
        MEMORY: _memory(over_n) if several else None,
        RATIO: _ratio(done),
        SHARE: _share(done),
        ERROR: _error(over_n) if several else None,
    }
    for name in CAPTIONS:
        (folder / name).unlink(missing_ok=True)
    drawn = {name: figure for name, figure in figures.items() if figure is not None}
    for name, figure in drawn.items():
        figure.savefig(folder / name)
    return list(drawn)


def _figure(width: float, height: float, title: str) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=11)
    return figure, figure.subplots()


def _style(provider: str) -> dict[str, Any]:
    mine = provider.startswith("fastcl ")
    return {
        "color": _COLOURS.get(provider, "black"),
        "linewidth": 2.4 if mine else 1.4,
        "marker": "o" if mine else "s",
        "markersize": 5 if mine else 4,
        "zorder": 3 if mine else 2,
    }


def _curves(rows: Sequence[Row], value: Callable[[Row], float | None]) -> dict[str, list[tuple[int, float, Row]]]:
    """For each provider (N, value, row), sorted by N. A size that two suites measured counts once."""
    curves: dict[str, dict[int, tuple[int, float, Row]]] = {}
    for row in rows:
        y = value(row)
        if y is not None:
            curves.setdefault(row["provider"], {}).setdefault(row["n"], (row["n"], y, row))
    return {name: sorted(points.values(), key=lambda point: point[0]) for name, points in curves.items()}


def _over_n(axes: Any, rows: Sequence[Row], ylabel: str) -> None:
    axes.set(xscale="log", yscale="log", xlabel="rows N", ylabel=ylabel)
    axes.xaxis.set_major_locator(FixedLocator(sorted({row["n"] for row in rows})))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda n, _: f"{n:.0f}"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.grid(alpha=0.3)


def _legend(figure: Figure, axes: Any) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=9)


def _what() -> str:
    return f"{PROBLEM[0]}, D = {PROBLEM[1]}, {PROBLEM[2]}"


def _time(rows: Sequence[Row]) -> Figure:
    figure, axes = _figure(8.4, 4.6, f"Forward + backward: {_what()}")
    for name, points in _curves(rows, lambda row: row["p50_ms"]).items():
        x = [n for n, _, _ in points]
        axes.plot(x, [y for _, y, _ in points], label=name, **_style(name))
        low, high = ([row[key] for _, _, row in points] for key in ("p20_ms", "p80_ms"))
        axes.fill_between(x, low, high, color=_style(name)["color"], alpha=0.15, linewidth=0)
    _over_n(axes, rows, "time (ms), median; band: 20th to 80th percentile")
    _legend(figure, axes)
    return figure


def _memory(rows: Sequence[Row]) -> Figure:
    figure, axes = _figure(8.4, 4.6, f"Peak memory beyond the inputs, forward + backward: {_what()}")
    # Smaller values are noise of a few pages, which a logarithmic axis would exaggerate: show them as 0.1 MB.
    for name, points in _curves(
        rows, lambda row: None if row["peak_extra_bytes"] is None else max(row["peak_extra_bytes"] / 1e6, 0.1)
    ).items():
        axes.plot([n for n, _, _ in points], [y for _, y, _ in points], label=name, **_style(name))
    sizes = sorted({row["n"] for row in rows})
    axes.plot(sizes, [n * PROBLEM[1] * 4 / 1e6 for n in sizes], "k:", linewidth=1, label="the embeddings themselves")
    _over_n(axes, rows, "peak extra memory, gradient included (MB)")
    _legend(figure, axes)
    return figure


def _error(rows: Sequence[Row]) -> Figure:
    figure = Figure(figsize=(11, 4.6), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"Error of the gradient against float64, relative to its norm: {_what()}", fontsize=11)
    for axes, kind in zip(figure.subplots(1, 2), ("random", "converged"), strict=True):
        curves = _curves(rows, lambda row, kind=kind: max(row["error"][kind]["gradient"], 1e-12))  # type: ignore[misc]
        for name, points in curves.items():
            axes.plot([n for n, _, _ in points], [y for _, y, _ in points], label=name, **_style(name))
        bounds = _curves(rows, lambda row, kind=kind: row["error"][kind]["gradient_allowed"])  # type: ignore[misc]
        limit = next(iter(bounds.values()))
        axes.plot([n for n, _, _ in limit], [y for _, y, _ in limit], "k--", linewidth=1, label="admitted by the rule")
        _over_n(axes, rows, "relative error")
        axes.tick_params(axis="x", labelsize="small")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:.0e}"))
        axes.set_title(f"{kind} rows", fontsize=10)
    _legend(figure, axes)
    return figure


def _by_case(rows: Sequence[Row]) -> dict[str, dict[str, Row]]:
    """Rows by case, then by provider. A case that two suites measured counts once."""
    cases: dict[str, dict[str, Row]] = {}
    for row in rows:
        cases.setdefault(row["case"], {}).setdefault(row["provider"], row)
    return cases


def _fastest(providers: dict[str, Row]) -> Row | None:
    mine = [row for name, row in providers.items() if name.startswith("fastcl ")]
    return min(mine, key=lambda row: row["p50_ms"], default=None)


def _bars(
    title: str, xlabel: str, cases: list[str], series: dict[str, list[float | None]], start: float, form: str
) -> tuple[Figure, Any]:
    """Horizontal bars from `start` to the values, with labels at their ends."""
    figure, axes = _figure(9, 1.4 + 0.24 * len(cases) * (len(series) + 0.8), title)
    height = 0.85 / len(series)
    for place, (name, values) in enumerate(series.items()):
        where = np.arange(len(cases)) + (place - (len(series) - 1) / 2) * height
        known = [(y, v) for y, v in zip(where, values, strict=True) if v is not None]
        if known:
            colour = _COLOURS.get(name.removeprefix("over "), "black")
            places, widths = [y for y, _ in known], [v - start for _, v in known]
            bars = axes.barh(places, widths, height * 0.92, left=start, label=name, color=colour)
            axes.bar_label(bars, [form.format(rounded(v)) for _, v in known], fontsize=7, padding=2)
    axes.set_yticks(range(len(cases)), cases, fontsize=8)
    axes.set_ylim(len(cases) - 0.4, -0.6)
    axes.set_xlabel(xlabel)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    figure.legend(loc="outside lower center", ncols=len(series), frameon=False, fontsize=9)
    return figure, axes


def _ratio(rows: Sequence[Row]) -> Figure | None:
    found = {case: best for case, providers in _by_case(rows).items() if (best := _fastest(providers))}
    if not found:
        return None
    series = {
        f"over {peer}": [best["ratio"].get(peer, {}).get("p50") for best in found.values()]
        for peer in (EAGER, COMPILED)
    }
    names = [f"{case}  [{best['provider'].removeprefix('fastcl ')}]" for case, best in found.items()]
    title = "How many times faster fastcl's fastest backend is, forward + backward"
    figure, axes = _bars(title, "ratio of times, pair by pair (left of 1x the peer is faster)", names, series, 1, "{}x")
    axes.set_xscale("log")
    values = [v for column in series.values() for v in column if v is not None]
    axes.set_xlim(min([0.5, *values]) * 0.75, max([2, *values]) * 1.4)
    axes.xaxis.set_major_locator(FixedLocator([0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}x"))
    axes.axvline(1, color="black", linewidth=1)
    return figure


def _share(rows: Sequence[Row]) -> Figure | None:
    cases = _by_case(rows)
    if not cases:
        return None
    names = [name for name in _COLOURS if name.startswith("fastcl ") and any(name in case for case in cases.values())]
    series: dict[str, list[float | None]] = {
        name: [100 * case[name]["share_of_peak"] if name in case else None for case in cases.values()]
        for name in (*names, EAGER, COMPILED)
    }
    title = "Arithmetic that the case takes at least, as a share of the machine's peak, forward + backward"
    figure, axes = _bars(title, "share of peak (%)", list(cases), series, 0, "{}")
    # A share exceeds 100 if the host slowed the turns of the peak; see docs/performance.md.
    axes.set_xlim(0, max(100, *(1.1 * share for shares in series.values() for share in shares if share is not None)))
    return figure
