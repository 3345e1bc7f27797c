"""The command line: ``python -m fastcl.train --help``."""

import argparse
import dataclasses
import importlib.util
import json
import math
import re
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import fastcl.train
from fastcl.train import Config, OptionError

if TYPE_CHECKING:
    from fastcl.train.processes import Processes

# Methods, loop and pictures are imported where they are used: without these packages the command says what to install.
NEEDED = {"sklearn": "scikit-learn", "matplotlib": "matplotlib", "tqdm": "tqdm"}


class Parser(argparse.ArgumentParser):
    """Whose complaints are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")  # one line, without the usage that argparse puts before it


def at_least(kind: type[Any], low: float, exclusive: bool = False, below: float = math.inf) -> Any:
    """An argument's type: numbers of at least `low` (exclusive: above it), and below `below`."""

    def convert(text: str) -> Any:
        wanted = f"{'an integer' if kind is int else 'a number'} {'above' if exclusive else 'of at least'} {low}"
        wanted += "" if below == math.inf else f" and below {below}"
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and (value > low or (value == low and not exclusive)) and value < below):
            raise argparse.ArgumentTypeError(f"expected {wanted}, got {text!r}")
        return value

    return convert


def add_options(parser: Parser, default: Config, only: Collection[str] | None = None) -> None:
    """Give the parser the trainer's options, or `only` those of these names."""
    from fastcl.train.methods import METHODS, PRIORS

    def add(name: str, text: str, **settings: Any) -> None:
        if only is not None and name[2:] not in only:
            return
        value = getattr(default, name[2:].replace("-", "_"), None)
        shown = "" if value is None else f" (default: {value})"
        # Options that were not given are absent, so that --resume can tell them from given ones.
        parser.add_argument(name, help=text + shown, default=argparse.SUPPRESS, **settings)

    add("--method", "what to train with", choices=list(METHODS))
    add("--clusters", "kmeans (default where the method needs clusters; supcon: labels), attributes, labels, sinkhorn "
        "(clinfonce: soft assignments to learned prototypes) or FILE.csv:COLUMN: one row per image in the order of the "
        "data, before any split; blank: no cluster")  # fmt: skip
    add("--n-clusters", "clusters of k-means, in training and in the final probes; prototypes", type=at_least(int, 2))
    add("--renew", "epochs between two k-means; before the first, each image is its own cluster (cluster-ce: the first "
        "is of the untrained encoder)", type=at_least(int, 1))  # fmt: skip
    add(
        "--prior",
        "masses of the prototypes: equal, falling as rank ** -0.25, or as large as the classes (default: power_law for "
        "pmsn, else uniform)",
        choices=PRIORS,
    )
    add("--data", "digits, cifar10, cifar100, imagefolder or FILE.npz with images [n, h, w(, c)] and labels [n]")
    add("--root", "folder of the CIFAR files (never downloaded), or the image folder", metavar="DIR")
    add("--long-tail", "thin the training classes to a power law, the largest so many times the smallest; the held-out "
        "images stay as they are", type=at_least(float, 1, exclusive=True), metavar="RATIO")  # fmt: skip
    add("--epochs", "passes over the training images", type=at_least(int, 1))
    add("--batch-size", "images a step, two views each; at most all", type=at_least(int, 2))
    add("--temperature", "of the loss; cluster-ce has none", type=at_least(float, 1e-30, exclusive=True, below=1e30))
    add("--lr", "highest learning rate of AdamW", type=at_least(float, 1e-30, exclusive=True, below=1e30))
    add(
        "--seed",
        "decides the split, the weights, the batches and the augmentation",
        type=at_least(int, 0, below=2**32),
    )
    add("--device", "where to train, for instance cuda")
    add("--precision", "of the forward and backward pass", choices=["float32", "bfloat16"])
    add(
        "--out",
        "run folder; new or empty (default: runs/DATA[-long_tail]-METHOD[-PRIOR][-CLUSTERS]-seedSEED)",
        metavar="DIR",
    )
    add(
        "--beside",
        "a finished swav or pmsn run, whose prototypes' sizes are drawn beside this one's",
        metavar="RUN_FOLDER",
    )
    add("--resume", "go on with this run, with the options it was started with; only --device may differ (another "
        "--epochs would be another schedule of the learning rate)", metavar="RUN_FOLDER")  # fmt: skip


def _parser() -> Parser:
    parser = Parser(prog="python -m fastcl.train", description=fastcl.train.__doc__)
    add_options(parser, Config())
    return parser


def settle(config: Config) -> Config:
    """The config with what its method takes where nothing was said, checked for options that do not go together."""
    from fastcl.train.methods import METHODS, PrototypeMethod, SupCon, kind_of

    kind = METHODS[config.method]
    if not kind.needs_clusters:
        if config.clusters is not None:
            raise OptionError(f"--clusters needs a method that uses them; got --method {config.method}")
    elif config.clusters is None:
        config = dataclasses.replace(config, clusters="labels" if kind is SupCon else "kmeans")
    elif kind is SupCon and config.clusters != "labels":
        raise OptionError(f"--method supcon has the labels for clusters; got --clusters {config.clusters}")
    kind = kind_of(config.method, config.clusters)
    if issubclass(kind, PrototypeMethod):
        config = dataclasses.replace(config, prior=config.prior or kind.prior)
    elif config.prior is not None:
        raise OptionError(
            "--prior needs a method with prototypes: swav, pmsn, or clinfonce with --clusters sinkhorn; got --method "
            f"{config.method}"
        )
    if config.data not in ("digits", "cifar10", "cifar100", "imagefolder") and not config.data.endswith(".npz"):
        raise OptionError(f"--data must be digits, cifar10, cifar100, imagefolder or FILE.npz; got {config.data}")
    if config.root is not None and config.data not in ("cifar10", "cifar100", "imagefolder"):
        raise OptionError(f"--root goes with --data cifar10, cifar100 or imagefolder; got --data {config.data}")
    return config


def _configure(given: dict[str, Any]) -> tuple[Config, Path, bool]:
    """Config, run folder and whether the run is resumed, from the options that were given."""
    out, resume = given.pop("out", None), given.pop("resume", None)
    if resume is not None:
        folder = Path(resume)
        if out is not None:
            raise OptionError(f"--out cannot be given with --resume, which goes on in its own folder; got {out}")
        try:
            stored = Config(**json.loads((folder / "config.json").read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise OptionError(f"--resume must name a run folder with its config.json; got {resume}: {error}") from error
        # Through the command line's own checks: the file may have been edited.
        kept = [f"--{name.replace('_', '-')}={value}" for name, value in vars(stored).items() if value is not None]
        stored = Config(**vars(_parser().parse_args(kept)))
        for name, value in given.items():
            if name != "device" and value != getattr(stored, name):
                option = "--" + name.replace("_", "-")
                raise OptionError(f"{option} {value} contradicts the resumed run's {getattr(stored, name)}")
        return dataclasses.replace(stored, device=given.get("device", stored.device)), folder, True
    config = settle(Config(**given))
    if out is not None:
        folder = Path(out)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise OptionError(
                f"--out must be a new or an empty folder; {out} is not (to go on with it: --resume {out})"
            )
        return config, folder, False
    tail = config.long_tail and f"long_tail{config.long_tail:g}"
    parts = (
        Path(config.data).stem,
        tail,
        config.method,
        config.prior,
        config.clusters and config.clusters.rpartition(":")[2],
    )
    name = re.sub(r"[^\w.-]+", "_", "-".join(part for part in parts if part)) + f"-seed{config.seed}"
    folder, number = Path("runs", name), 1
    while folder.exists():
        number += 1
        folder = Path("runs", f"{name}-{number}")
    return config, folder, False


def require_packages() -> None:
    """Exit with a line that says what to install, where something is missing."""
    missing = [package for module, package in NEEDED.items() if importlib.util.find_spec(module) is None]
    if missing:
        sys.exit(f'fastcl.train needs {", ".join(missing)}: pip install "fastcl[train]"')


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code (0, or 130 after Ctrl-C), exits with 2 on an option it cannot use."""
    require_packages()
    from fastcl.train.processes import started

    parser = _parser()
    given = vars(parser.parse_args(argv))
    with started() as processes:
        return _run(parser, given, processes)


def _run(parser: Parser, given: dict[str, Any], processes: "Processes") -> int:
    from fastcl.train import report
    from fastcl.train.loop import Run, other_prototypes

    run, beside = None, given.pop("beside", None)
    try:
        if beside is not None:
            other_prototypes(Path(beside))  # before training, not after it
        config, folder, resumed = processes.from_first(lambda: _configure(given))
        run = Run(config, folder, resumed, processes)
        if processes.first:
            print(run.summary(), flush=True)
        run.train()
        if not processes.first:
            return 0
        print(report.table(run.finish(beside and Path(beside))))
        pictures = ["accuracy.png", "embedding.png", *(["prototypes.png"] if config.prior else []), "neighbours.png"]
        print(f"wrote {folder}/results.json, {', '.join(pictures[:-1])} and {pictures[-1]}")
    except OptionError as error:
        if not processes.first:  # the first says it
            return 2
        parser.error(" ".join(str(error).split()))
    except KeyboardInterrupt:
        if not processes.first:
            return 130
        if run is None:
            print("interrupted before training began", file=sys.stderr)
        else:
            print(
                f"interrupted; kept {run.keep()} of {config.epochs} epochs. "
                f"Go on with: python -m fastcl.train --resume {folder}",
                file=sys.stderr,
            )
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
