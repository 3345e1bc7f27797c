"""What each study trains, and what its tables show: ``python -m fastcl.train.study``."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastcl.train import Config, counted
from fastcl.train.comparison import comparison
from fastcl.train.study_tables import ACCURACY, INFORMATION, PARTS, USE, Entry, Study, of_groups

FEW = 2  # classes a batch


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


def _prototypes(base: Config) -> list[Entry]:
    return [
        Entry(f"{count} prototypes", what, {
            "method": "swav", "prior": prior, "n_clusters": count, "long_tail": base.long_tail,
            "epochs": 3 * base.epochs,
        })
        for count in (base.n_clusters, 5 * base.n_clusters // 2)
        for what, prior in (("uniform", "uniform"), ("rank^-0.25", "power_law:0.25"), ("counts", "counts"))
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
    "prototypes": Study(
        "how many prototypes are in use on long-tailed data, by their number and prior",
        _prototypes,
        {**USE, "variation": "total variation from the prior", "lead": "best cosine above the second",
         "linear_5": ACCURACY["linear_5"]},
        (),
    ),
    "batch": Study(
        "accuracy and time over the batch size",
        _batch,
        {**ACCURACY, "seconds": "seconds an epoch"},
        (),
    ),
    "compare": comparison(),
}  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """A study as it is conducted. heading: what is trained, in a few words."""

    study: Study
    base: Config
    entries: list[Entry]
    heading: str


def planned(name: str, about: dict[str, Any]) -> Plan:
    """The plan of a study.

    about: ``options`` of the trainer that differ from the study's defaults; ``only``, beginnings of the groups that are
    trained, where these are not all; of ``compare`` its ``auxiliary`` and ``counts``. OptionError on what cannot be.
    """
    study = STUDIES[name]
    if name == "compare":
        study = comparison(**{option: about[option] for option in ("auxiliary", "counts") if option in about})
    base = dataclasses.replace(study.default, **about.get("options", {}))
    only = about.get("only", [])
    entries = of_groups(study.entries(base), only)
    settled_base = settled(base, Entry("", "", {}), 0)
    return Plan(study, base, entries, _heading(entries, settled_base) + (f"; only {', '.join(only)}" if only else ""))


def _heading(entries: Sequence[Entry], base: Config) -> str:
    data = f"{base.glyphs} glyphs of {base.side} pixels" if base.data == "glyphs" else base.data
    *fewer, most = sorted({entry.options.get("epochs", base.epochs) for entry in entries})
    text = f"{data}, {''.join(f'{epochs} or ' for epochs in fewer)}{counted(most, 'epoch')}"
    if not any("batch_size" in entry.options for entry in entries):
        text += f" of {base.batch_size} images a step"
    if any(entry.options.get("prior") and "n_clusters" not in entry.options for entry in entries):
        text += f", {base.n_clusters} prototypes"
    return text


def settled(base: Config, entry: Entry, seed: int) -> Config:
    """The trainer's config of an entry."""
    from fastcl.train.options import settle

    return settle(dataclasses.replace(base, seed=seed, **{"long_tail": None, **entry.options}))
