"""Put the papers' claims to the test: ``python -m fastcl.train.study NAME``.

A study trains many small runs over several seeds, and makes a table (mean and standard deviation), differences seed by
seed, and a picture. It keeps each finished run as a row, a file, and goes on with what is there when it was
interrupted. ``compare`` has options of its own: ``python -m fastcl.train.study compare --help``.
"""

import contextlib
import csv
import dataclasses
import hashlib
import io
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastcl.command import Parser, run
from fastcl.train import Config, OptionError
from fastcl.train.compare import INFORMATION, OPTIONS, check, concluded
from fastcl.train.compare import main as compare
from fastcl.train.options import add_options, at_least, require_packages
from fastcl.train.studies import STUDIES, Entry, Row, Study, heading, settled, tables

if TYPE_CHECKING:
    from fastcl.train.loop import Run

PROG = "python -m fastcl.train.study"
EXAMPLES = """\
  python -m fastcl.train.study clusters --quick                     to see that all works
  python -m fastcl.train.study clusters                             scanned digits, three seeds, minutes
  python -m fastcl.train.study priors --seeds 5
  python -m fastcl.train.study clusters --data glyphs --side 16 --epochs 30"""
DEFAULT = Config(epochs=6, batch_size=64, renew=2, long_tail=20.0)
QUICK = {"epochs": 2, "renew": 1}
THIRD = 3  # of the classes, by their size: head and tail


def measured(run: "Run", seconds: float | None) -> Row:
    """The numbers of a trained run. seconds: of an epoch; None where all epochs were trained before."""
    import numpy as np

    from fastcl.train.evaluate import cluster_information, knn_accuracy, linear_accuracy, linear_hits
    from fastcl.train.methods.clustered import Clustered

    rows, images, seed = run.representation("trained"), run.images, run.config.seed
    hits = linear_hits(rows, images, 5, seed)
    clusters = run.last_clusters()
    row: Row = {
        "knn": knn_accuracy(rows, images), "linear_5": float(hits.mean()),
        "linear_all": linear_accuracy(rows, images, None, seed),
    }  # fmt: skip
    if seconds is not None:
        row["seconds"] = seconds
    if not isinstance(run.method, Clustered):  # which has several clusterings of its own
        row.update(zip(INFORMATION, cluster_information(images.train_labels, clusters), strict=True))
    if run.config.long_tail is not None:
        sizes = np.bincount(images.train_labels, minlength=len(images.classes))
        order, part = np.argsort(-sizes, kind="stable"), -(-len(sizes) // THIRD)
        for name, classes in (("head", order[:part]), ("tail", order[-part:])):
            row[name] = float(hits[np.isin(images.test_labels, classes)].mean())
    if run.config.prior is not None:
        row["used"] = len(np.unique(clusters)) / run.config.n_clusters
    return row


class Rows:
    """The finished runs of a study, a file each in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, entry: Entry, seed: int) -> Path:
        name = re.sub(r"[^\w.]+", "-", f"{entry.group}-{entry.what}")
        return self.folder / f"{name}-seed{seed}.json"

    def read(self, entry: Entry, config: Config, data: str) -> Row | None:
        """The row of this run; None where there is none. It must be of the same config and images, and undamaged."""
        path = self.path(entry, config.seed)
        if not path.exists():
            return None
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
            seal = kept.pop("sha256")
            row: Row = kept["row"]
            stored = vars(Config(**kept["config"]))
            if seal != _digest(kept):
                raise ValueError("the file is damaged: its numbers do not have the hash that is beside them")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise OptionError(f"--out holds {path}, which cannot be used: {type(error).__name__}: {error}") from error
        differ = [name for name, value in vars(config).items() if name != "device" and stored[name] != value]
        if differ:
            option = "--" + differ[0].replace("_", "-")
            raise OptionError(f"--out holds {path}, trained with {option} {stored[differ[0]]}: choose another folder")
        if kept["data"] != data:
            raise OptionError(f"--out holds {path}, trained on other images: choose another folder")
        return row

    def write(self, entry: Entry, config: Config, data: str, row: Row) -> None:
        from fastcl.train.files import write

        kept = {"row": row, "config": dataclasses.asdict(config), "data": data}
        write(self.path(entry, config.seed), json.dumps({**kept, "sha256": _digest(kept)}, indent=1) + "\n")


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _trained(config: Config, folder: Path) -> Row:
    """Train what is left to train, and measure it."""
    from fastcl.train.files import claimed
    from fastcl.train.loop import Run

    with claimed(folder):
        run = Run(config, folder, resumed=(folder / "checkpoint.pt").exists())
        # On the CPU the process's own time, to which other processes add little.
        clock = time.process_time if run.device.type == "cpu" else time.perf_counter
        left, begun = config.epochs - len(run.history), clock()
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):  # the bar goes to stderr
            run.train()
        return measured(run, (clock() - begun) / left if left else None)


def conduct(entries: Sequence[Entry], base: Config, seeds: Sequence[int], out: Path) -> list[Row]:
    """Train what is not done yet, seed by seed; returns all rows.

    What can be refused, be it the last seed's, is refused before anything is trained.
    """
    from fastcl.train.batches import check_batch_classes
    from fastcl.train.data import fingerprint, prepared
    from fastcl.train.loop import check_n_clusters
    from fastcl.train.methods.clusterings import fixed_clusters
    from fastcl.train.methods.prototypes import prototype_masses

    kept, plan = Rows(out / "rows"), []
    for seed in seeds:
        data = {}
        for entry in entries:
            config = settled(base, entry, seed)
            if config.long_tail not in data:
                images = prepared(config)
                data[config.long_tail] = images, fingerprint(images)
            images, digest = data[config.long_tail]
            check_n_clusters(config.n_clusters, images)
            if (most := len(images.train_labels)) < config.batch_size:
                raise OptionError(f"--batch-size: {most} images to train on are fewer than a step of {entry.what}")
            if config.batch_classes is not None:
                check_batch_classes(config.batch_classes, min(config.batch_size, len(images.train_labels)), images)
            if config.clusters not in (None, "kmeans", "sinkhorn"):
                fixed_clusters(config.clusters, images)
            if config.prior is not None:
                prototype_masses(config.prior, config.n_clusters, images.train_labels)
            plan.append((entry, config, digest, kept.read(entry, config, digest)))
    kept.folder.mkdir(exist_ok=True)  # by which the folder is known as a study's from now on
    rows = []
    for place, (entry, config, digest, row) in enumerate(plan, 1):
        path = kept.path(entry, config.seed)
        print(f"{place} of {len(plan)}: {path.stem}{' is there' if row else ''}", flush=True)
        if row is None:
            row = _trained(config, out / path.stem)
            kept.write(entry, config, digest, row)
            shutil.rmtree(out / path.stem)
        rows.append({"group": entry.group, "what": entry.what, "seed": config.seed, **row})
    return rows


def as_csv(rows: Sequence[Row]) -> str:
    """The rows as a file of all their numbers."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    return text.getvalue()


def read_csv(path: Path) -> list[Row]:
    """The rows that :func:`as_csv` wrote."""
    words = {"group", "what"}
    with open(path, newline="", encoding="utf-8") as file:
        return [
            {k: v if k in words else int(v) if k == "seed" else float(v) for k, v in line.items() if v != ""}
            for line in csv.DictReader(file)
        ]


def report(name: str, study: Study, rows: Sequence[Row], what: str, folder: Path) -> str:
    """Write NAME.csv, NAME.md and NAME.png into the folder; returns the tables."""
    from fastcl.train.files import write
    from fastcl.train.study_pictures import PICTURES

    write(folder / f"{name}.csv", as_csv(rows))
    rows = read_csv(folder / f"{name}.csv")  # so that the file and the tables agree to the last digit
    text = tables(study, rows, what)
    write(folder / f"{name}.md", f"{text}\n![{study.about}]({name}.png)\n")
    PICTURES[name](folder / f"{name}.png", f"{name}: {what}", rows)
    return text


def _parser() -> Parser:
    listed = "; ".join(f"{name}: {study.about}" for name, study in STUDIES.items())
    parser = Parser(PROG, str(__doc__), EXAMPLES)
    group = parser.add_argument_group("study")
    group.add_argument("name", help=f"{listed}; compare", choices=[*STUDIES, "compare"], metavar="NAME",
                       nargs="?")  # fmt: skip
    group.add_argument("--seeds", help="runs of each (default: 3)", type=at_least(int, 1), metavar="COUNT")
    group.add_argument("--quick", help="2 epochs, 1 seed unless said otherwise: to see that all works",
                       action="store_true")  # fmt: skip
    group.add_argument("--out", help="the same command goes on with what it holds (default: runs/study-NAME-DATA, with "
                       "--quick runs/study-NAME-DATA-quick)", metavar="DIR")  # fmt: skip
    add_options(parser, DEFAULT, [*(name for name in OPTIONS if name != "batch-classes"), "n-clusters"])
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code (0, or 130 after Ctrl-C), exits with 2 on an option it cannot use."""
    require_packages()
    from fastcl.train.files import claimed

    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["compare"]:
        return compare(argv[1:])
    parser = _parser()
    given = vars(parser.parse_args(argv))
    name, seeds, quick, out = (given.pop(option) for option in ("name", "seeds", "quick", "out"))
    if name is None:
        parser.error(f"expected a study: {', '.join(STUDIES)} or compare")
    if name == "compare":
        parser.error("compare comes first, its options after it")
    if "long_tail" in given and name != "priors":
        parser.error("--long-tail goes with the study priors")
    base = dataclasses.replace(DEFAULT, **{**(QUICK if quick else {}), **given})
    folder = Path(out or f"runs/study-{name}-{Path(base.data).stem}{'-quick' if quick else ''}")
    study = STUDIES[name]

    def work() -> None:
        settled_base = settled(base, Entry("", "", {}), 0)
        check(settled_base, folder, "rows")
        for other in STUDIES.keys() - {name}:
            if (folder / f"{other}.csv").exists():
                raise OptionError(f"--out must be a new folder or this study's; {folder} holds {other}.csv")
        entries = study.entries(base)
        for entry in entries:
            settled(base, entry, 0)
        with claimed(folder):
            rows = conduct(entries, base, range(seeds or (1 if quick else 3)), folder)
            text = report(name, study, rows, heading(study, settled_base), folder)
            print(f"\n{text}\nwrote {folder}/{name}.csv, {name}.md and {name}.png")

    return concluded(parser, work)


if __name__ == "__main__":
    run(PROG, main)
