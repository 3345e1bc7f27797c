"""Put the papers' claims to the test: ``python -m fastcl.train.study NAME``.

A study trains many small runs over several seeds, and makes a table (mean and standard deviation), differences seed by
seed, and a picture. It keeps each finished run as a row, a file, and goes on with what is there when it was
interrupted. compare has defaults of its own: 20 epochs, 256 images a step, k-means every 4 epochs. --long-tail goes
with priors, prototypes and compare; --batch-classes and --auxiliary with compare.
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
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastcl.command import INTERRUPTED, Parser, run
from fastcl.train import Config, OptionError, WriteError
from fastcl.train.comparison import AUXILIARY, COUNTS, check_auxiliary
from fastcl.train.options import add_options, at_least, require_packages, settle
from fastcl.train.studies import STUDIES, Plan, planned, settled
from fastcl.train.study_tables import DEFAULT, INFORMATION, Entry, Row, tables

if TYPE_CHECKING:
    from fastcl.train.loop import Run

PROG = "python -m fastcl.train.study"
EXAMPLES = """\
  python -m fastcl.train.study clusters --quick                     to see that all works
  python -m fastcl.train.study clusters                             scanned digits, three seeds, minutes
  python -m fastcl.train.study priors --seeds 5
  python -m fastcl.train.study priors --only batches                a part of it: the groups that begin so
  python -m fastcl.train.study compare --data photographs.npz --auxiliary tags.csv:camera --n-clusters 50
  python -m fastcl.train.study clusters --data glyphs --side 16 --epochs 30"""
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
QUICK, QUICK_COUNTS = {"epochs": 2, "renew": 1}, (5,)
GOES_WITH = {
    "long_tail": ("priors", "prototypes", "compare"), "batch_classes": ("compare",), "auxiliary": ("compare",)
}  # fmt: skip
THIRD = 3  # of the classes, by their size: head and tail


def measured(run: "Run", seconds: float | None, representation: str = "trained") -> Row:
    """The numbers of a run. seconds: of an epoch; None where all epochs were trained before, or none is."""
    import numpy as np

    from fastcl.train.evaluate import (
        cluster_information,
        knn_accuracy,
        linear_accuracy,
        linear_hits,
        prototype_use,
        scores,
    )
    from fastcl.train.methods.clustered import Clustered
    from fastcl.train.methods.prototypes import PrototypeMethod

    rows, images, seed = run.representation(representation), run.images, run.config.seed
    hits = linear_hits(rows, images, 5, seed)
    row: Row = {
        "knn": knn_accuracy(rows, images), "linear_1": linear_accuracy(rows, images, 1, seed),
        "linear_5": float(hits.mean()), "linear_all": linear_accuracy(rows, images, None, seed),
    }  # fmt: skip
    if representation != "trained":
        return row
    clusters = run.last_clusters()
    if seconds is not None:
        row["seconds"] = seconds
    if not isinstance(run.method, Clustered):  # which has several clusterings of its own
        row.update(zip(INFORMATION, cluster_information(images.train_labels, clusters), strict=True))
    if run.config.long_tail is not None:
        sizes = np.bincount(images.train_labels, minlength=len(images.classes))
        order, part = np.argsort(-sizes, kind="stable"), -(-len(sizes) // THIRD)
        for name, classes in (("head", order[:part]), ("tail", order[-part:])):
            row[name] = float(hits[np.isin(images.test_labels, classes)].mean())
    if isinstance(run.method, PrototypeMethod):
        row["used"] = len(np.unique(clusters)) / run.config.n_clusters
        cosines = scores(run.method, images.train_images, run.device)
        row.update(prototype_use(cosines, run.method.masses, run.batch, run.config.temperature))
    return row


class Rows:
    """The finished runs of a study, a file each in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, entry: Entry, seed: int) -> Path:
        name = re.sub(r"[^\w.]+", "-", f"{entry.group}-{entry.what}").strip("-")
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
        _check_same(path, config, stored, data, kept["data"])
        return row

    def write(self, entry: Entry, config: Config, data: str, row: Row) -> None:
        from fastcl.train.files import write

        kept = {"row": row, "config": dataclasses.asdict(config), "data": data}
        write(self.path(entry, config.seed), json.dumps({**kept, "sha256": _digest(kept)}, indent=1) + "\n")


def check_begun(folder: Path, config: Config, data: str) -> None:
    """Raise where a folder holds a half-trained run that cannot go on with this config and these images."""
    from fastcl.train.files import load_checkpoint

    path = folder / "checkpoint.pt"
    if not path.exists():
        return
    try:
        state = load_checkpoint(path)
        stored, images = vars(Config(**state["config"])), str(state["data"])
    except Exception as error:  # a damaged file may raise anything on its way through zip, pickle and torch
        what = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise OptionError(f"--out holds {path}, which cannot be used: {what}") from error
    _check_same(folder, config, stored, data, images)


def _check_same(path: Path, config: Config, stored: dict[str, Any], data: str, images: str) -> None:
    """Raise where what a path holds is of another config, or of images of another fingerprint."""
    differ = [name for name, value in vars(config).items() if name != "device" and stored[name] != value]
    if differ:
        option = "--" + differ[0].replace("_", "-")
        raise OptionError(f"--out holds {path}, trained with {option} {stored[differ[0]]}: choose another folder")
    if data != images:
        raise OptionError(f"--out holds {path}, trained on other images: choose another folder")


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _trained(entry: Entry, config: Config, folder: Path) -> Row:
    """Train what is left to train, and measure it."""
    from fastcl.train.files import claimed
    from fastcl.train.loop import Run

    with claimed(folder):
        run = Run(config, folder, resumed=(folder / "checkpoint.pt").exists())
        # On the CPU the process's own time, to which other processes add little.
        clock = time.process_time if run.device.type == "cpu" else time.perf_counter
        if entry.representation != "trained":
            return measured(run, None, entry.representation)
        left, begun = config.epochs - len(run.history), clock()
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):  # the bar goes to stderr
            run.train()
        return measured(run, (clock() - begun) / left if left else None)


def conduct(entries: Sequence[Entry], base: Config, seeds: Sequence[int], out: Path, whole: bool = False) -> list[Row]:
    """Train what is not done yet, seed by seed; returns all rows.

    What can be refused, be it the last seed's, is refused before anything is trained. whole: also data of fewer images
    than a step.
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
            if whole and (most := len(images.train_labels)) < config.batch_size:
                raise OptionError(f"--batch-size: {most} images to train on are fewer than a step of {entry.what}")
            if config.batch_classes is not None:
                check_batch_classes(config.batch_classes, min(config.batch_size, len(images.train_labels)), images)
            if config.clusters not in (None, "kmeans", "sinkhorn"):
                clusters = fixed_clusters(config.clusters, images)
                if config.method == "cluster-ce" and clusters.max() < 0:
                    raise OptionError(f"--clusters must give images a cluster; {config.clusters} has none")
            if config.prior is not None:
                prototype_masses(config.prior, config.n_clusters, images.train_labels)
            row = kept.read(entry, config, digest)
            if row is None:
                check_begun(out / kept.path(entry, seed).stem, config, digest)
            plan.append((entry, config, digest, row))
    kept.folder.mkdir(exist_ok=True)  # by which the folder is known as a study's from now on
    rows = []
    for place, (entry, config, digest, row) in enumerate(plan, 1):
        path = kept.path(entry, config.seed)
        print(f"{place} of {len(plan)}: {path.stem}{' is there' if row else ''}", flush=True)
        if row is None:
            row = _trained(entry, config, out / path.stem)
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

    def value(name: str, text: str) -> str | int | float:
        return text if name in ("group", "what") else int(text) if name == "seed" else float(text)

    with open(path, newline="", encoding="utf-8") as file:
        return [
            {name: value(name, text) for name, text in line.items() if text != "" or name == "group"}
            for line in csv.DictReader(file)
        ]


def report(name: str, plan: Plan, rows: Sequence[Row], about: dict[str, Any], folder: Path) -> str:
    """Write the rows and how to plan them again (.csv, .json), tables and picture into the folder; returns the tables.

    The files of a part are named NAME-part, so that none takes them for those of the whole study.
    """
    from fastcl.train.files import write
    from fastcl.train.study_pictures import PICTURES

    stem = part_or_whole(name, about)
    write(folder / f"{stem}.csv", as_csv(rows))
    write(folder / f"{stem}.json", json.dumps({"study": name, **about}, indent=1) + "\n")
    rows = read_csv(folder / f"{stem}.csv")  # so that the file and the tables agree to the last digit
    text = tables(plan.study, rows, plan.heading)
    write(folder / f"{stem}.md", f"{text}\n![{plan.study.about}]({stem}.png)\n")
    PICTURES[name](folder / f"{stem}.png", f"{name}: {plan.heading}", rows)
    return text


def part_or_whole(name: str, about: dict[str, Any]) -> str:
    """The name of the files."""
    return f"{name}-part" if about.get("only") else name


def check_folder(base: Config, folder: Path) -> None:
    """Raise where the options do not go together, the device cannot be used, or the folder is no comparison's."""
    from fastcl.train.files import LOCK, PART
    from fastcl.train.loop import usable_device
    from fastcl.train.processes import Processes

    settle(base)
    usable_device(base.device, Processes())
    if folder.exists() and not folder.is_dir():
        raise OptionError(f"--out must be a new folder or a comparison's; {folder} is a file")
    if (folder / "config.json").exists():
        raise OptionError(f"--out must be a new folder or a comparison's; {folder} is a run of the trainer")
    if folder.exists() and not (folder / "rows").is_dir():
        held = sorted(path.name for path in folder.iterdir() if path.name != LOCK and not path.name.endswith(PART))
        if held:
            raise OptionError(f"--out must be a new folder or a comparison's; {folder} holds {held[0]}")


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


@contextlib.contextmanager
def _auxiliary_named(name: str) -> Iterator[None]:
    """Errors about --clusters name the option that compare has for it."""
    try:
        yield
    except WriteError:
        raise
    except OptionError as error:
        if name != "compare":
            raise
        raise OptionError(str(error).replace("--clusters", "--auxiliary")) from error


def _parser() -> Parser:
    listed = "; ".join(f"{name}: {study.about}" for name, study in STUDIES.items())
    parser = Parser(PROG, str(__doc__), EXAMPLES)
    group = parser.add_argument_group("study")

    def add(name: str, text: str, **settings: Any) -> None:
        group.add_argument(name, help=text, **settings)

    add("name", listed, choices=list(STUDIES), metavar="NAME", nargs="?")
    add("--seeds", "runs of each (default: 3)", type=at_least(int, 1), metavar="COUNT")
    add("--only", "train only the groups of the study's table that begin so; the files are NAME-part", nargs="+",
        default=[], metavar="GROUP")  # fmt: skip
    add("--n-clusters", "clusters of k-means; prototypes (default: 20). With compare several, of which the first is "
        f"compared (default: {' '.join(map(str, COUNTS))})", nargs="+", type=at_least(int, 2),
        metavar="COUNT")  # fmt: skip
    add("--auxiliary", "with compare: attributes or FILE.csv:COLUMN, as the trainer's --clusters (default: "
        f"{AUXILIARY})", metavar="CLUSTERS")  # fmt: skip
    add("--quick", "2 epochs, 1 seed unless said otherwise: to see that all works", action="store_true")
    add("--out", "the same command goes on with what it holds (default: runs/study-NAME-DATA, with --quick "
        "runs/study-NAME-DATA-quick)", metavar="DIR")  # fmt: skip
    add_options(parser, DEFAULT, OPTIONS)
    return parser


def _about(parser: Parser, given: dict[str, Any], quick: bool) -> dict[str, Any]:
    """What :func:`~fastcl.train.studies.planned` takes, of the options that were given. Takes them out of `given`."""
    name, counts, only, auxiliary = (given.pop(option) for option in ("name", "n_clusters", "only", "auxiliary"))
    if name is None:
        parser.error(f"expected a study: {', '.join(STUDIES)}")
    for option, takers in GOES_WITH.items():
        if (option in given or (option == "auxiliary" and auxiliary)) and name not in takers:
            parser.error(f"--{option.replace('_', '-')} goes with {' and '.join(takers)}; got {name}")
    if name != "compare" and counts and len(counts) > 1:
        parser.error(f"--n-clusters takes several with compare; got {name}")
    options = {**(QUICK if quick else {}), **given}
    about: dict[str, Any] = {"only": only} if only else {}
    if name == "compare":
        counts = counts or (QUICK_COUNTS if quick else COUNTS)
        about |= {"auxiliary": auxiliary or AUXILIARY, "counts": list(counts)}
    if counts:
        options["n_clusters"] = counts[0]
    default = vars(STUDIES[name].default)
    return about | {"options": {option: value for option, value in options.items() if default[option] != value}}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code (0, or 130 after Ctrl-C), exits with 2 on an option it cannot use."""
    require_packages()
    from fastcl.train.files import claimed

    parser = _parser()
    given = vars(parser.parse_args(argv))
    name, seeds, quick, out = given["name"], *(given.pop(option) for option in ("seeds", "quick", "out"))
    about = _about(parser, given, quick)

    def work() -> None:
        data = about["options"].get("data", DEFAULT.data)
        folder = Path(out or f"runs/study-{name}-{Path(data).stem}{'-quick' if quick else ''}")
        if name == "compare":
            check_auxiliary(about["auxiliary"], data)
        plan = planned(name, about)
        check_folder(settled(plan.base, Entry("", "", {}), 0), folder)
        for other in STUDIES.keys() - {name}:
            for path in (folder / f"{other}.csv", folder / f"{other}-part.csv"):
                if path.exists():
                    raise OptionError(f"--out must be a new folder or this study's; {folder} holds {path.name}")
        for entry in plan.entries:
            settled(plan.base, entry, 0)
        with claimed(folder):
            counted = range(seeds or (1 if quick else 3))
            rows = conduct(plan.entries, plan.base, counted, folder, plan.study.whole)
            text = report(name, plan, rows, about, folder)
            print(f"\n{text}\nwrote {folder}/{part_or_whole(name, about)}.csv, .json, .md and .png")

    def named() -> None:
        with _auxiliary_named(name):
            work()

    return concluded(parser, named)


if __name__ == "__main__":
    run(PROG, main)
