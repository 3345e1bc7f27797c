"""A picture of each study, drawn from its rows."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.ticker import MaxNLocator

from fastcl.train.files import save_figure
from fastcl.train.report import draw_information, figure_of, write_caption
from fastcl.train.study_tables import USE, Row, grouped

PROBE, PROBE_TITLE = "linear_5", "held-out accuracy, 5 labels a class (%)"


def _draw_clusters(path: Path, title: str, rows: Sequence[Row]) -> None:
    """Accuracy on the plane of information, and contrasting beside predicting."""
    figure = figure_of(13, 5.6, title)
    left, right = figure.subplots(1, 2, width_ratios=(1.35, 1))
    found = grouped(rows)
    contrast = {what: own for (group, what), own in found.items() if group == "contrast"}
    if contrast:  # a part of the study may have none
        figure.colorbar(_plane(left, contrast), ax=left, label=PROBE_TITLE)
    left.set(xlabel="H(cluster | label) (nats): what is in the clusters besides",
             ylabel="I(label; cluster) (nats): what they tell about the label", title="contrasted")  # fmt: skip
    left.margins(0.1)
    left.grid(alpha=0.25)
    predicted = [what for group, what in found if group in ("PCL", "predict")]
    kinds = [what for what in contrast if what in predicted] or list(dict.fromkeys(predicted))
    groups = list(dict.fromkeys(group for group, _ in found))
    for number, group in enumerate(groups):
        shown = [what for what in kinds if (group, what) in found]
        _points(right, group, [(kinds.index(what) + 0.2 * (number - 1), found[group, what]) for what in shown], PROBE)
    right.set_xticks(range(len(kinds)), kinds)
    right.set(ylabel=PROBE_TITLE, title="contrasted and predicted")
    right.legend(frameon=False)
    right.grid(alpha=0.25, axis="y")
    save_figure(figure, path)


def _plane(axes: Any, contrast: dict[str, list[Row]]) -> Any:
    """Points with captions; returns what a colour bar is made of."""
    names = (PROBE, "mutual_information", "conditional_entropy")
    means = {what: {name: np.mean([row[name] for row in own]) for name in names} for what, own in contrast.items()}
    accuracies = [100 * mean[PROBE] for mean in means.values()]
    places = [(float(mean["conditional_entropy"]), float(mean["mutual_information"])) for mean in means.values()]
    ends = (max(x for x, _ in places), max(y for _, y in places))
    drawn = axes.scatter(*np.transpose(places), c=accuracies, s=100, cmap="viridis", edgecolors="black")
    captioned: list[tuple[float, float]] = []
    for what, place, accuracy in zip(means, places, accuracies, strict=True):
        write_caption(axes, f"{what} {accuracy:.1f}", place, ends, captioned)
    return drawn


def _draw_priors(path: Path, title: str, rows: Sequence[Row]) -> None:
    """A panel for balanced data, head and tail, and batches of few classes; a part of the study may have fewer."""
    found = grouped(rows)
    laws = list(dict.fromkeys(what for group, what in found if not group.startswith("batches")))
    wanted = (("balanced", PROBE, "balanced"), ("long tail", "head", "long tail, head"),
              ("long tail", "tail", "long tail, tail"), ("batches", PROBE, "classes a batch"))  # fmt: skip
    shown = [part for part in wanted if any(group.startswith(part[0]) for group, _ in found)]
    figure = figure_of(max(10, 3.4 * len(shown) + 0.4), 5, title)
    panels = figure.subplots(1, len(shown), squeeze=False, sharey=True)[0]
    for axes, (kind, name, heading) in zip(panels, shown, strict=True):
        own = {key: lines for key, lines in found.items() if key[0].startswith(kind)}
        methods = list(dict.fromkeys(group.rpartition(", ")[2] for group, _ in own))
        kinds = list(dict.fromkeys(what for _, what in own))
        batches = kind == "batches"
        ticks, legend = (methods, kinds) if batches else (laws, methods)
        for place, label in enumerate(legend):
            points = [
                (ticks.index(method if batches else what) + 0.16 * (2 * place - 1), own[f"{kind}, {method}", what])
                for method in methods for what in kinds
                if (f"{kind}, {method}", what) in own and label == (what if batches else method)
            ]  # fmt: skip
            _points(axes, label, points, name, f"C{place + 2 * batches}")
        axes.set_xticks(range(len(ticks)), ticks, rotation=30)
        axes.set(title=heading, xlabel="" if batches else "prior")
        axes.grid(alpha=0.25, axis="y")
        if batches or axes is panels[0]:
            axes.legend(frameon=False)
    panels[0].set_ylabel(PROBE_TITLE)
    save_figure(figure, path)


def _draw_prototypes(path: Path, title: str, rows: Sequence[Row]) -> None:
    """A panel for each number of prototypes: how many are in use, by three measures."""
    found = grouped(rows)
    groups = list(dict.fromkeys(group for group, _ in found))
    figure = figure_of(4.6 * len(groups) + 1, 4.4, title)
    grid = figure.subplots(1, len(groups), squeeze=False)[0]
    for axes, group in zip(grid, groups, strict=True):
        kinds = [what for owner, what in found if owner == group]
        for number, (name, label) in enumerate(USE.items()):
            points = [(place + 0.16 * (number - 1), found[group, what]) for place, what in enumerate(kinds)]
            _points(axes, label, points, name, scale=1)
        axes.set_xticks(range(len(kinds)), kinds)
        axes.set(title=group, xlabel="prior", ylabel="prototypes")
        axes.set_ylim(0, 1.05 * int(group.split()[0]))
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.25, axis="y")
    grid[0].legend(frameon=False)
    save_figure(figure, path)


def _draw_compare(path: Path, title: str, rows: Sequence[Row]) -> None:
    """A panel for each loss; what is not trained is on no plane."""
    panels: dict[str, dict[str, list[Row]]] = {}
    for (group, what), own in grouped(rows).items():
        if group:
            panels.setdefault(group, {})[what] = own
    draw_information(path, title, panels)


def _draw_batch(path: Path, title: str, rows: Sequence[Row]) -> None:
    """Accuracy and time."""
    figure = figure_of(10, 4.4, title)
    left, right = figure.subplots(1, 2)
    found = {int(what): own for (_, what), own in grouped(rows).items()}
    _points(left, "simclr", list(found.items()), PROBE, joined=True)
    _points(right, "simclr", list(found.items()), "seconds", joined=True, scale=1)
    for axes, label in ((left, PROBE_TITLE), (right, "seconds an epoch")):
        axes.set_xscale("log", base=2)
        axes.set_xticks(list(found), list(map(str, found)))
        axes.set(xlabel="images a step", ylabel=label)
        axes.grid(alpha=0.25)
    right.set_ylim(bottom=0)
    save_figure(figure, path)


def _points(
    axes: Any, label: str, entries: list[tuple[float, list[Row]]], name: str, colour: str | None = None,
    joined: bool = False, scale: float = 100,
) -> None:  # fmt: skip
    """Means with standard deviations over seeds."""
    values = [(place, [scale * row[name] for row in own]) for place, own in entries]
    means = [np.mean(own) for _, own in values]
    deviations = [np.std(own, ddof=1) if len(own) > 1 else 0 for _, own in values]
    axes.errorbar([place for place, _ in values], means, deviations, fmt="o-" if joined else "o", color=colour,
                  capsize=3, label=label)  # fmt: skip


PICTURES: dict[str, Callable[[Path, str, Sequence[Row]], None]] = {
    "clusters": _draw_clusters, "priors": _draw_priors, "prototypes": _draw_prototypes, "batch": _draw_batch,
    "compare": _draw_compare,
}  # fmt: skip
