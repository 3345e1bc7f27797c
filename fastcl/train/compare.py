"""Cl-InfoNCE's three comparisons (Tsai et al. 2022) in one command: ``python -m fastcl.train.compare``.

Clusters of auxiliary attributes against those of k-means and against none (instances); contrasting clusters against
predicting them by cross-entropy; and both against training on the labels. Each is a run of the trainer per seed; the
table has the mean and standard deviation over seeds.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastcl.command import INTERRUPTED, Parser, run
from fastcl.train import Config, OptionError, WriteError, counted
from fastcl.train.options import add_options, at_least, require_packages, settle

PROG = "python -m fastcl.train.compare"
EXAMPLES = """\
  python -m fastcl.train.compare --quick                            two epochs each, to see that all works
  python -m fastcl.train.compare                                    the digits, three seeds, minutes
  python -m fastcl.train.compare --data photographs.npz --auxiliary tags.csv:camera
  python -m fastcl.train.compare --n-clusters 50 --seeds 5 --device cuda"""
DEFAULT = Config(epochs=20, batch_size=256, renew=4)
OPTIONS = (
    "data",
    "root",
    "glyphs",
    "side",
    "long-tail",
    "epochs",
    "batch-size",
    "batch-classes",
    "temperature",
    "lr",
    "renew",
    "device",
    "precision",
)
PROBES = {
    "knn": "kNN", "linear_1": "1 label a class", "linear_5": "5 labels a class", "linear_all": "all labels"
}  # fmt: skip
BASELINES = ("raw", "untrained")
INFORMATION = {"mutual_information": "I(label; cluster)", "conditional_entropy": "H(cluster given label)"}


Outcome = dict[str, dict[str, Any]]  # raw, untrained, trained -> probe -> number
Rows = list[dict[str, float]]  # a line a seed: probe -> number


@dataclass(frozen=True)
class Contestant:
    """What one row of the table trains with; None: nothing of the kind."""

    method: str
    clusters: str | None = None
    n_clusters: int | None = None

    @property
    def title(self) -> str:
        """For the table and the picture."""
        names = {"simclr": "instances (SimCLR)", "supcon": "labels (SupCon)"}
        count = f" {self.n_clusters}" if self.n_clusters else ""
        what = {"sinkhorn": "Sinkhorn", "kmeans": "k-means"}.get(self.clusters or "", Path(self.clusters or "").name)
        return names.get(self.method) or what + count

    @property
    def loss(self) -> str:
        """The two kinds of loss that are compared."""
        return "cross-entropy" if self.method == "cluster-ce" else "contrastive"

    @property
    def folder(self) -> str:
        """A name for its runs."""
        parts = (self.method, self.clusters and Path(self.clusters).name, self.n_clusters)
        return "-".join(str(part) for part in parts if part).replace(":", "_")


def contestants(auxiliary: str, counts: Sequence[int]) -> dict[str, Contestant]:
    """Everything that is trained, under the names by which :func:`comparisons` picks from it."""
    first = counts[0]
    several = {f"kmeans {count}": Contestant("clinfonce", "kmeans", count) for count in counts[1:]}
    return {
        "instance": Contestant("simclr"),
        "kmeans": Contestant("clinfonce", "kmeans", first),
        **several,
        "sinkhorn": Contestant("clinfonce", "sinkhorn", first),
        "auxiliary": Contestant("clinfonce", auxiliary),
        "predicted kmeans": Contestant("cluster-ce", "kmeans", first),
        "predicted auxiliary": Contestant("cluster-ce", auxiliary),
        "supcon": Contestant("supcon"),
        "predicted labels": Contestant("cluster-ce", "labels"),
    }


COMPARISONS = {
    "kinds of clusters": [("auxiliary", "kmeans"), ("auxiliary", "instance"), ("kmeans", "instance"),
                          ("sinkhorn", "kmeans")],
    "contrasting against predicting": [("auxiliary", "predicted auxiliary"), ("kmeans", "predicted kmeans")],
    "against supervision": [("auxiliary", "supcon"), ("auxiliary", "predicted labels")],
}  # fmt: skip


def _known(folder: Path, config: Config, data: str) -> Outcome | None:
    """The outcome that a folder holds; None where it is not finished. It must be free, or of this config and data."""
    path = folder / "config.json"
    try:
        if not (folder / "checkpoint.pt").exists():
            return None
        stored = vars(Config(**json.loads(path.read_text())))
        differ = [name for name, value in vars(config).items() if name != "device" and stored[name] != value]
        path = folder / "probes.json"
        outcome: Outcome = json.loads(path.read_text()) if path.exists() else {}
        stale = bool(outcome) and outcome.pop("data") != {"sha256": data}
        if outcome and outcome.pop("numbers") != {"sha256": _digest(outcome)}:
            raise ValueError("the file is damaged: its numbers do not have the hash that is beside them")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise OptionError(f"--out holds {path}, which cannot be used: {type(error).__name__}: {error}") from error
    if differ:
        option = "--" + differ[0].replace("_", "-")
        raise OptionError(f"--out holds {folder}, trained with {option} {stored[differ[0]]}: choose another folder")
    if stale:
        raise OptionError(f"--out holds {folder}, trained on other images: choose another folder")
    return outcome or None


def _digest(outcome: Outcome) -> str:
    return hashlib.sha256(json.dumps(outcome, sort_keys=True).encode()).hexdigest()


def _outcome(config: Config, folder: Path, columns: Sequence[str]) -> Outcome:
    """Train what is left to train, then probe: accuracies, and what the clusters trained with tell about the labels."""
    from fastcl.train.evaluate import cluster_information, probe
    from fastcl.train.files import claimed, write
    from fastcl.train.loop import Run

    with claimed(folder):
        run = Run(config, folder, resumed=(folder / "checkpoint.pt").exists())
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):  # the bar goes to stderr
            run.train()
        outcome: Outcome = {}
        for column in columns:
            values = probe(run.representation(column), run.images, config.n_clusters, config.seed)[0]
            outcome[column] = {name: values[name] for name in PROBES}
        information = cluster_information(run.images.train_labels, run.last_clusters())
        outcome["trained"].update(zip(INFORMATION, information, strict=True))
        hashes = {"data": {"sha256": run.fingerprint}, "numbers": {"sha256": _digest(outcome)}}
        write(folder / "probes.json", json.dumps({**outcome, **hashes}, indent=2) + "\n")
    return outcome


def measure(base: Config, chosen: dict[str, Contestant], seeds: Sequence[int], out: Path) -> dict[str, Rows]:
    """Train and probe what is not done yet, seed by seed. What can be refused, be it the last seed's, is refused first.

    Returns the probes, a line a seed, under the contestants' names, ``raw`` (pixels) and ``untrained``.
    """
    from fastcl.train.batches import check_batch_classes
    from fastcl.train.data import fingerprint, prepared
    from fastcl.train.loop import check_n_clusters
    from fastcl.train.methods.clusterings import fixed_clusters

    plan = []
    for seed in seeds:
        images = prepared(dataclasses.replace(base, seed=seed))
        for contestant in chosen.values():
            check_n_clusters(contestant.n_clusters or base.n_clusters, images)
        if base.batch_classes is not None:
            check_batch_classes(base.batch_classes, min(base.batch_size, len(images.train_labels)), images)
        if "auxiliary" in chosen:
            auxiliary = str(chosen["auxiliary"].clusters)
            try:
                clusters = fixed_clusters(auxiliary, images)
            except OptionError as error:
                raise OptionError(str(error).replace("--clusters", "--auxiliary")) from error
            if clusters.max() < 0:
                raise OptionError(f"--auxiliary must give images a cluster; {auxiliary} has none")
        data = fingerprint(images)
        for name, contestant in chosen.items():
            folder = out / f"{contestant.folder}-seed{seed}"
            options = {option: value for option, value in vars(contestant).items() if value is not None}
            config = settle(dataclasses.replace(base, seed=seed, **options))
            plan.append((name, folder, config, _known(folder, config, data)))
    rows: dict[str, Rows] = {name: [] for name in (*BASELINES, *chosen)}
    for number, (name, folder, config, outcome) in enumerate(plan):
        place = number % len(chosen) + 1
        known = " is there" if outcome else ""
        print(f"seed {config.seed}, {place} of {len(chosen)}: {folder}{known}", flush=True)
        if outcome is None:  # what training does not change is probed once a seed
            outcome = _outcome(config, folder, (*BASELINES, "trained") if place == 1 else ("trained",))
        rows[name].append(outcome["trained"])
        for baseline in BASELINES if place == 1 else ():
            rows[baseline].append(outcome[baseline])
    return rows


def spread(values: Sequence[float], scale: float, sign: bool = False) -> str:
    """Mean and standard deviation over the seeds."""
    mean = f"{scale * np.mean(values):{'+' if sign else ''}.{1 if scale == 100 else 2}f}"
    return mean if len(values) == 1 else f"{mean} ± {scale * np.std(values, ddof=1):.{1 if scale == 100 else 2}f}"


def aligned(lines: list[list[str]]) -> str:
    """A Markdown table whose columns also stand below each other on a terminal."""
    widths = [max(len(line[place]) for line in lines) for place in range(len(lines[0]))]
    lines = [lines[0], ["-" * width for width in widths], *lines[1:]]
    return "\n".join("| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines)


def tables(rows: dict[str, Rows], chosen: dict[str, Contestant], base: Config) -> str:
    """The report in Markdown: every contestant, then the paper's comparisons as differences seed by seed."""
    count = len(rows["raw"])
    every = [["loss", "clusters", *PROBES.values(), *INFORMATION.values()]]
    titles = {"raw": ("", "raw pixels"), "untrained": ("", "untrained encoder")}
    titles |= {name: (contestant.loss, contestant.title) for name, contestant in chosen.items()}
    for name, title in titles.items():
        accuracies = [spread([row[probe] for row in rows[name]], 100) for probe in PROBES]
        nats = [spread([row[key] for row in rows[name]], 1) if name in chosen else "" for key in INFORMATION]
        every.append([*title, *accuracies, *nats])
    differences = [["comparison", "difference", *PROBES.values()]]
    for what, pairs in COMPARISONS.items():
        for one, other in pairs:
            points = [[a[probe] - b[probe] for a, b in zip(rows[one], rows[other], strict=True)] for probe in PROBES]
            names = [f"{chosen[name].loss}, {chosen[name].title}" for name in (one, other)]
            differences.append([what, " minus ".join(names), *(spread(values, 100, sign=True) for values in points)])
    over = f"mean ± standard deviation over {count} seeds" if count > 1 else "one seed"
    what = f"{Path(base.data).stem}, {counted(base.epochs, 'epoch')}"
    return (
        f"Held-out accuracy in %, information in nats; {over}; {what}.\n\n"
        f"{aligned(every)}\n\nDifferences in points of accuracy, each of the same seed's two runs.\n\n"
        f"{aligned(differences)}\n"
    )


def _parser() -> Parser:
    parser = Parser(PROG, str(__doc__), EXAMPLES)
    group = parser.add_argument_group("comparison")

    def add(name: str, text: str, **settings: Any) -> None:
        group.add_argument(name, help=text, **settings)

    add("--auxiliary", "attributes or FILE.csv:COLUMN, as the trainer's --clusters (default: attributes)",
        default="attributes", metavar="CLUSTERS")  # fmt: skip
    add("--n-clusters", "of k-means; the first is compared, and has as many prototypes, the others are only in the "
        "table and on the plane (default: 20 10 50)", nargs="+", type=at_least(int, 2), metavar="COUNT")  # fmt: skip
    add("--seeds", "runs of each (default: 3)", type=at_least(int, 1), metavar="COUNT")
    add("--quick", "2 epochs, 2 seeds, 5 clusters unless said otherwise: to see that all works", action="store_true")
    add("--out", "the same command goes on with what it holds (default: runs/compare-DATA, with --quick "
        "runs/compare-DATA-quick)", metavar="DIR")  # fmt: skip
    add_options(parser, DEFAULT, OPTIONS)
    return parser


def _check(base: Config, chosen: dict[str, Contestant], folder: Path) -> None:
    """Raise what can be refused before any image is read."""
    from fastcl.train.data import check_clusters

    auxiliary = str(chosen["auxiliary"].clusters)
    if auxiliary in ("kmeans", "tags", "labels", "sinkhorn"):
        raise OptionError(f"--auxiliary must be attributes or FILE.csv:COLUMN; got {auxiliary}")
    try:
        check_clusters(auxiliary, base.data)
    except OptionError as error:
        raise OptionError(str(error).replace("--clusters", "--auxiliary")) from error
    check(base, folder)


def check(base: Config, folder: Path, made: str = "*-seed*") -> None:
    """Raise where the options do not go together, the device cannot be used, or the folder is no comparison's: one
    holds what it `made`, a pattern."""
    from fastcl.train.files import LOCK, PART
    from fastcl.train.loop import usable_device
    from fastcl.train.processes import Processes

    settle(base)
    usable_device(base.device, Processes())
    if folder.exists() and not folder.is_dir():
        raise OptionError(f"--out must be a new folder or a comparison's; {folder} is a file")
    if (folder / "config.json").exists():
        raise OptionError(f"--out must be a new folder or a comparison's; {folder} is a run of the trainer")
    if folder.exists():
        held = sorted(path.name for path in folder.iterdir() if path.name != LOCK and not path.name.endswith(PART))
        if held and not any(folder.glob(made)):
            raise OptionError(f"--out must be a new folder or a comparison's; {folder} holds {held[0]}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code (0, or 130 after Ctrl-C), exits with 2 on an option it cannot use."""
    require_packages()
    from fastcl.train.files import claimed

    parser = _parser()
    given = vars(parser.parse_args(argv))
    auxiliary, counts, seeds, quick, out = (
        given.pop(name) for name in ("auxiliary", "n_clusters", "seeds", "quick", "out")
    )
    counts, seeds = counts or ([5] if quick else [20, 10, 50]), seeds or (2 if quick else 3)
    base = dataclasses.replace(DEFAULT, **{**({"epochs": 2, "renew": 1} if quick else {}), **given})
    chosen = contestants(auxiliary, list(dict.fromkeys(counts)))
    folder = Path(out or f"runs/compare-{Path(base.data).stem}{'-quick' if quick else ''}")

    def work() -> None:
        _check(base, chosen, folder)
        with claimed(folder):
            _report(measure(base, chosen, range(seeds), folder), chosen, base, folder)

    return concluded(parser, work)


def concluded(parser: Parser, work: Callable[[], None]) -> int:
    """The exit code of work that goes on from where it was interrupted."""
    try:
        work()
    except WriteError as error:
        parser.error(f"{error}. The same command goes on from here")
    except OptionError as error:
        parser.error(" ".join(str(error).split()))
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return INTERRUPTED
    return 0


def _report(rows: dict[str, Rows], chosen: dict[str, Contestant], base: Config, folder: Path) -> None:
    """Write and print the tables, and draw the plane."""
    from fastcl.train.files import write
    from fastcl.train.report import draw_information

    text = tables(rows, chosen, base)
    write(folder / "compare.md", text + "\n![The plane of information](information.png)\n")
    panels: dict[str, dict[str, Rows]] = {}
    for name, contestant in chosen.items():
        panels.setdefault(contestant.loss, {})[contestant.title] = rows[name]
    draw_information(folder / "information.png", f"{Path(base.data).stem}, {counted(base.epochs, 'epoch')}", panels)
    print(f"\n{text}\nwrote {folder}/compare.md and information.png")


if __name__ == "__main__":
    run(PROG, main)
