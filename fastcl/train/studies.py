"""What each study trains, and what its tables show: ``python -m fastcl.train.study``."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fastcl.train import Config, counted
from fastcl.train.compare import INFORMATION, PROBES, aligned, spread

ACCURACY = {"knn": "kNN", "linear_5": "5 labels a class", "linear_all": "all labels"}
PARTS = {"head": "head", "tail": "tail"}  # accuracy with 5 labels a class on the largest and smallest third of classes
FEW = 2  # classes a batch

Row = dict[str, Any]  # group, what, seed, and numbers by name


@dataclass(frozen=True)
class Entry:
    """What is trained once a seed: options of the trainer, and the two names that it has in the table."""

    group: str
    what: str
    options: dict[str, Any]


@dataclass(frozen=True)
class Study:
    """about: a line for the help. columns: numbers in the table, with their headings. pairs: group and what of two
    entries whose difference, seed by seed, answers a question."""

    about: str
    entries: Callable[[Config], list[Entry]]
    columns: dict[str, str]
    pairs: tuple[tuple[str, tuple[str, str], tuple[str, str]], ...]


def _clusters(base: Config) -> list[Entry]:
    count = base.n_clusters

    def kmeans(k: int) -> dict[str, Any]:
        return {"clusters": "kmeans", "n_clusters": k}

    kinds: dict[str, dict[str, Any]] = {
        name: {"clusters": name}
        for name in ("labels", "merged2", "merged5", "split4", "split16", "noisy20", "noisy50", "attributes", "tags")
    }
    kinds |= {f"k-means {k}": kmeans(k) for k in (max(2, count // 2), count, 5 * count // 2)}
    contrasted = [Entry("contrast", what, {"method": "clinfonce", **options}) for what, options in kinds.items()]
    predicted = [
        Entry("predict", what, {"method": "cluster-ce", **kinds[what]})
        for what in ("labels", "split4", "noisy50", "attributes", f"k-means {count}")
    ]
    others = [Entry("contrast", "instances", {"method": "simclr"}), Entry("PCL", f"k-means {count}", {"method": "pcl"})]
    return [*contrasted, *others, *predicted]


def _priors(base: Config) -> list[Entry]:
    laws = {"uniform": "uniform", **{f"rank^-{exponent}": f"power_law:{exponent}" for exponent in ("0.25", "0.5", "1")}}
    tail = {"long_tail": base.long_tail, "epochs": 3 * base.epochs}  # of about a third of the images
    entries = []
    for kind, options, priors in (
        ("balanced", {"long_tail": None}, laws),
        ("long tail", tail, laws | {"counts": "counts"}),
    ):
        for method in ("swav", "msn"):
            entries += [
                Entry(f"{kind}, {method}", what, {"method": method, "prior": prior, **options})
                for what, prior in priors.items()
            ]
    for method in ("simclr", "vicreg", "swav", "cluster-ce"):
        for what, few in (("all classes", None), (f"{FEW} classes", FEW)):
            entries.append(
                Entry(f"batches, {method}", what, {"method": method, "batch_classes": few, "long_tail": None})
            )
    return entries


def _batch(base: Config) -> list[Entry]:
    """The learning rate grows with the root of the batch size, as is usual for Adam."""
    sizes = [base.batch_size * factor for factor in (1, 4, 16)]
    sizes = sorted({max(8, base.batch_size // 4), *sizes})
    return [
        Entry("simclr", str(size), {"method": "simclr", "batch_size": size,
                                    "lr": base.lr * math.sqrt(size / base.batch_size)})
        for size in sizes
    ]  # fmt: skip


def _law(kind: str, method: str, prior: str) -> tuple[str, tuple[str, str], tuple[str, str]]:
    return (f"{prior} prior, {method}, {kind}", (f"{kind}, {method}", prior), (f"{kind}, {method}", "uniform"))


STUDIES = {
    "clusters": Study(
        "accuracy over what clusters tell about the labels; contrasting, predicting and PCL",
        _clusters,
        {**ACCURACY, **INFORMATION},
        (
            ("labels beat instances", ("contrast", "labels"), ("contrast", "instances")),
            ("auxiliary attributes beat instances", ("contrast", "attributes"), ("contrast", "instances")),
            ("attributes come close to labels", ("contrast", "attributes"), ("contrast", "labels")),
            ("tags beat instances", ("contrast", "tags"), ("contrast", "instances")),
            ("k-means beats instances", ("contrast", "k-means *"), ("contrast", "instances")),
            ("Cl-InfoNCE with k-means beats PCL", ("contrast", "k-means *"), ("PCL", "k-means *")),
            ("contrasting beats predicting: labels", ("contrast", "labels"), ("predict", "labels")),
            ("split in 4", ("contrast", "split4"), ("predict", "split4")),
            ("half of them wrong", ("contrast", "noisy50"), ("predict", "noisy50")),
            ("attributes", ("contrast", "attributes"), ("predict", "attributes")),
            ("k-means", ("contrast", "k-means *"), ("predict", "k-means *")),
            ("less I(label; cluster) costs", ("contrast", "merged5"), ("contrast", "labels")),
            ("more H(cluster given label) costs", ("contrast", "split16"), ("contrast", "labels")),
        ),
    ),
    "priors": Study(
        "priors of prototypes on balanced and long-tailed data, and batches of few classes",
        _priors,
        {**ACCURACY, **PARTS, "used": "prototypes in use (%)"},
        (
            *(_law("long tail", method, f"rank^-{e}") for method in ("swav", "msn") for e in ("0.25", "0.5", "1")),
            *(_law("long tail", method, "counts") for method in ("swav", "msn")),
            *(_law("balanced", method, f"rank^-{e}") for method in ("swav", "msn") for e in ("0.25", "1")),
            *(
                (f"batches of {FEW} classes, {method}", (f"batches, {method}", f"{FEW} classes"),
                 (f"batches, {method}", "all classes"))
                for method in ("simclr", "vicreg", "swav", "cluster-ce")
            ),
        ),
    ),
    "batch": Study(
        "accuracy and time over the batch size",
        _batch,
        {**ACCURACY, "seconds": "seconds an epoch"},
        (),
    ),
}  # fmt: skip


def _shown(values: Sequence[float], name: str, sign: bool = False) -> str:
    accuracies = {*PROBES, *PARTS, "used"}
    return spread(values, 100 if name in accuracies else 1, sign) if values else ""


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


def heading(study: Study, base: Config) -> str:
    """What was trained, in a few words."""
    data = f"{base.glyphs} glyphs of {base.side} pixels" if base.data == "glyphs" else base.data
    entries = study.entries(base)
    *fewer, most = sorted({entry.options.get("epochs", base.epochs) for entry in entries})
    text = f"{data}, {''.join(f'{epochs} or ' for epochs in fewer)}{counted(most, 'epoch')}"
    if any("batch_size" in entry.options for entry in entries):
        return text
    return f"{text} of {base.batch_size} images a step"


def settled(base: Config, entry: Entry, seed: int) -> Config:
    """The trainer's config of an entry."""
    from fastcl.train.options import settle

    return settle(dataclasses.replace(base, seed=seed, **{"long_tail": None, **entry.options}))
