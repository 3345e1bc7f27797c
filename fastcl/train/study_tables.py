"""What a study is, and the tables that its rows make."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastcl.train import Config, OptionError

PROBES = {
    "knn": "kNN", "linear_1": "1 label a class", "linear_5": "5 labels a class", "linear_all": "all labels"
}  # fmt: skip
ACCURACY = {name: title for name, title in PROBES.items() if name != "linear_1"}
PARTS = {"head": "head", "tail": "tail"}  # accuracy with 5 labels a class on the largest and smallest third of classes
INFORMATION = {"mutual_information": "I(label; cluster)", "conditional_entropy": "H(cluster given label)"}
USE = {  # numbers of prototypes
    "share": "with an image of a batch", "assigned": "largest of an assignment", "nearest": "nearest of an image"
}  # fmt: skip
PERCENT = {*PROBES, *PARTS, "used"}
COUNTS = {*USE}
DEFAULT = Config(epochs=6, batch_size=64, renew=2, long_tail=20.0)

Row = dict[str, Any]  # group, what, seed, and numbers by name


@dataclass(frozen=True)
class Entry:
    """What is trained once a seed: options of the trainer, and the two names that it has in the table.

    representation: ``trained``, or what is measured without training: ``raw`` pixels, the ``untrained`` encoder.
    """

    group: str
    what: str
    options: dict[str, Any]
    representation: str = "trained"


@dataclass(frozen=True)
class Study:
    """about: a line for the help. columns: numbers in the table, with their headings. pairs: group and what of two
    entries whose difference, seed by seed, answers a question. default: the options where none are given. whole: refuse
    data of fewer images than a step, which else takes all of them."""

    about: str
    entries: Callable[[Config], list[Entry]]
    columns: dict[str, str]
    pairs: tuple[tuple[str, tuple[str, str], tuple[str, str]], ...]
    default: Config = DEFAULT
    whole: bool = True


def spread(values: Sequence[float], scale: float, sign: bool = False, places: int | None = None) -> str:
    """Mean and standard deviation over the seeds; with one decimal in %, else with two unless `places` says more."""
    places = places or (1 if scale == 100 else 2)
    mean = f"{scale * np.mean(values):{'+' if sign else ''}.{places}f}"
    return mean if len(values) == 1 else f"{mean} ± {scale * np.std(values, ddof=1):.{places}f}"


def aligned(lines: list[list[str]]) -> str:
    """A Markdown table whose columns also stand below each other on a terminal."""
    widths = [max(len(line[place]) for line in lines) for place in range(len(lines[0]))]
    lines = [lines[0], ["-" * width for width in widths], *lines[1:]]
    return "\n".join("| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines)


def _shown(values: Sequence[float], name: str, sign: bool = False) -> str:
    if not values:
        return ""
    return spread(values, 100 if name in PERCENT else 1, sign, places=1 if name in COUNTS else None)


def of_groups(entries: Sequence[Entry], only: Sequence[str]) -> list[Entry]:
    """The entries whose group begins with one of `only`; all where that is empty."""
    for part in only:
        if not any(entry.group.startswith(part) for entry in entries):
            groups = dict.fromkeys(entry.group for entry in entries if entry.group)
            raise OptionError(f"--only must be the beginning of one of: {'; '.join(groups)}; got {part!r}")
    return [entry for entry in entries if not only or entry.group.startswith(tuple(only))]


def _numbers(rows: Sequence[Row], name: str) -> list[float]:
    return [row[name] for row in rows if row.get(name) is not None]


def grouped(rows: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
    """Rows by group and what, in the order in which these first come."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        found.setdefault((row["group"], row["what"]), []).append(row)
    return found


def tables(study: Study, rows: Sequence[Row], heading: str) -> str:
    """The report in Markdown: every entry, then the differences, seed by seed."""
    found = grouped(rows)
    every = [["", "", *study.columns.values()]]
    for (group, what), own in found.items():
        every.append([group, what, *(_shown(_numbers(own, name), name) for name in study.columns)])
    seeds = len({row["seed"] for row in rows})
    over = f"mean ± standard deviation over {seeds} seeds" if seeds > 1 else "one seed"
    text = f"Held-out accuracy in %; {over}; {heading}.\n\n{aligned(every)}\n"
    compared = {name: title for name, title in study.columns.items() if name in {*PROBES, *PARTS}}
    differences = [["question", *compared.values()]]
    for question, one, other in study.pairs:
        first, second = (_one(found, *key) for key in (one, other))
        cells = []
        for name in compared:
            second_by_seed = {row["seed"]: row.get(name) for row in second}
            points = [
                row[name] - second_by_seed[row["seed"]]
                for row in first
                if row.get(name) is not None and second_by_seed.get(row["seed"]) is not None
            ]
            cells.append(_shown(points, name, sign=True))
        if any(cells):
            differences.append([f"{question}: {_named(first)} minus {_named(second)}", *cells])
    if len(differences) > 1:
        text += f"\nDifferences in points of accuracy, each of the same seed's two runs.\n\n{aligned(differences)}\n"
    return text


def _one(found: dict[tuple[str, str], list[Row]], group: str, what: str) -> list[Row]:
    """The rows of an entry; a ``*`` at the end of `what` stands for the count in the middle of those that there are."""
    if what.endswith("*"):
        kinds = [name for owner, name in found if owner == group and name.startswith(what[:-1])]
        what = kinds[(len(kinds) - 1) // 2] if kinds else what
    return found.get((group, what), [])


def _named(rows: Sequence[Row]) -> str:
    return f"{rows[0]['group']}, {rows[0]['what']}"
