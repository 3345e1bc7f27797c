"""The options of the trainer and of the comparison, and what is wrong with them before any image is read."""

import argparse
import dataclasses
import importlib.util
import math
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from fastcl.command import Parser
from fastcl.train import Config, OptionError

# Methods, loop and pictures are imported where they are used: without these packages the command says what to install.
NEEDED = {"sklearn": "scikit-learn", "matplotlib": "matplotlib", "PIL": "pillow", "tqdm": "tqdm"}


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
    """Give the parser the trainer's options in groups, or `only` those of these names."""
    from fastcl.train.methods import METHODS
    from fastcl.train.methods.prototypes import prior_name

    def group(title: str) -> Callable[..., None]:
        options = parser.add_argument_group(title)

        def add(name: str, text: str, **settings: Any) -> None:
            if only is not None and name[2:] not in only:
                return
            value = getattr(default, name[2:].replace("-", "_"), None)
            shown = "" if value is None else f" (default: {value})"
            # Options that were not given are absent, so that --resume can tell them from given ones.
            options.add_argument(name, help=text + shown, default=argparse.SUPPRESS, **settings)

        return add

    add = group("method")
    # A metavar, because argparse never breaks its own list of choices.
    add("--method", f"what to train with: {', '.join(METHODS)}", choices=list(METHODS), metavar="METHOD")
    add("--clusters", "kmeans (default where the method needs clusters; supcon: labels), attributes, tags (clinfonce, "
        "moco: images that share an attribute are positives), labels, labels made worse (merged4, split4, noisy30), "
        "facts of glyphs (family, weight, slant, case, holes, strokes, joined by +), sinkhorn (clinfonce: soft "
        "assignments to learned prototypes) or FILE.csv:COLUMN: one row per image in the order of the data, before any "
        "split; blank: no cluster")  # fmt: skip
    add("--n-clusters", "clusters of k-means, in training and in the final probes; prototypes", type=at_least(int, 2))
    add("--renew", "epochs between two k-means; before the first, each image is its own cluster (cluster-ce: the first "
        "is of the untrained encoder)", type=at_least(int, 1))  # fmt: skip
    add(
        "--prior",
        "masses of the prototypes: uniform, power_law (falling as rank ** -0.25), power_law:EXPONENT, or counts, as "
        "large as the classes (default: power_law for pmsn, else uniform)",
        type=prior_name,
    )
    add("--temperature", "of the loss; cluster-ce and methods without negatives have none",
        type=at_least(float, 1e-30, exclusive=True, below=1e30))  # fmt: skip
    add = group("images")
    add("--data", "digits, glyphs (letters and digits drawn from fonts), cifar10, cifar100, imagefolder or FILE.npz "
        "with images [n, h, w(, c)], uint8 or float in [0, 1], and labels [n]")  # fmt: skip
    add("--glyphs", "images that --data glyphs draws, held-out ones included (default: 6200)", type=at_least(int, 248),
        metavar="COUNT")  # fmt: skip
    add("--side", "pixels of each glyph in height and width (default: 28)", type=at_least(int, 8), metavar="PIXELS")
    add("--root", "folder of the CIFAR files (never downloaded), or the image folder: a folder per class, or such "
        "folders in train and test (or val)", metavar="DIR")  # fmt: skip
    add("--long-tail", "thin the training classes to a power law, the largest so many times the smallest; the held-out "
        "images stay as they are", type=at_least(float, 1, exclusive=True), metavar="RATIO")  # fmt: skip
    add = group("training")
    add("--epochs", "passes over the training images", type=at_least(int, 1))
    add("--batch-size", "images a step, two views each; at most all", type=at_least(int, 2))
    add("--batch-classes", "classes a step at most: each batch has images of so few of them, and an epoch still has "
        "every image (default: no limit)", type=at_least(int, 1), metavar="COUNT")  # fmt: skip
    add("--lr", "highest learning rate of AdamW", type=at_least(float, 1e-30, exclusive=True, below=1e30))
    add(
        "--seed",
        "decides the split, the weights, the batches and the augmentation",
        type=at_least(int, 0, below=2**32),
    )
    add("--device", "where to train, for instance cuda")
    add("--precision", "of the forward and backward pass", choices=["float32", "bfloat16"])
    add = group("run folder")
    add(
        "--out",
        "run folder; new or empty (default: runs/DATA[-long_tailRATIO]-METHOD[-PRIOR][-CLUSTERS][-Nclasses]-seedSEED)",
        metavar="DIR",
    )
    add(
        "--beside",
        "a finished run with prototypes (swav, msn, pmsn, dino), whose sizes are drawn beside this one's",
        metavar="RUN_FOLDER",
    )
    add("--resume", "go on with this run, with the options it was started with; only --device may differ (another "
        "--epochs would be another schedule of the learning rate)", metavar="RUN_FOLDER")  # fmt: skip
    add("--tensorboard", "write the metrics for TensorBoard too, into the run folder", action="store_true")


def settle(config: Config) -> Config:
    """The config with what its method takes where nothing was said, checked for options that do not go together."""
    from fastcl.train.data import check_clusters
    from fastcl.train.methods import METHODS, kind_of
    from fastcl.train.methods.contrastive import SupCon
    from fastcl.train.methods.prototypes import PrototypeMethod

    kind = METHODS[config.method]
    if config.clusters == "tags" and not kind.takes_tags:
        takers = " or ".join(name for name, other in METHODS.items() if other.takes_tags)
        raise OptionError(f"--clusters tags needs --method {takers}; got --method {config.method}")
    if not kind.needs_clusters:
        if config.clusters not in (None, "tags"):
            if kind.takes_tags:
                raise OptionError(f"--clusters must be tags with --method {config.method}; got {config.clusters}")
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
            "--prior needs a method with prototypes: swav, msn, pmsn, dino, or clinfonce with --clusters sinkhorn; got "
            f"--method {config.method}"
        )
    if config.clusters is not None:
        check_clusters(config.clusters, config.data)
    return _settle_images(config)


def _settle_images(config: Config) -> Config:
    from fastcl.train.glyphs import COUNT, SIDE

    named = ("digits", "glyphs", "cifar10", "cifar100", "imagefolder")
    if config.data not in named and not config.data.endswith(".npz"):
        raise OptionError(f"--data must be {', '.join(named)} or FILE.npz; got {config.data}")
    if config.root is not None and config.data not in ("cifar10", "cifar100", "imagefolder"):
        raise OptionError(f"--root goes with --data cifar10, cifar100 or imagefolder; got --data {config.data}")
    if config.data == "glyphs":
        return dataclasses.replace(config, glyphs=config.glyphs or COUNT, side=config.side or SIDE)
    for name in ("glyphs", "side"):
        if getattr(config, name) is not None:
            raise OptionError(f"--{name} goes with --data glyphs; got --data {config.data}")
    return config


def check_out(folder: Path) -> None:
    """Raise where a new run cannot have this folder: it holds anything but what a run that was killed at once left."""
    from fastcl.train.files import leftovers_only

    if not folder.exists():
        return
    if not folder.is_dir():
        raise OptionError(f"--out must be a new or an empty folder; {folder} is a file")
    if (folder / "config.json").exists():
        raise OptionError(
            f"--out must be a new or an empty folder; {folder} is a run (to go on with it: --resume {folder})"
        )
    if not leftovers_only(folder):
        held = sorted(path.name for path in folder.iterdir())
        raise OptionError(f"--out must be a new or an empty folder; {folder} holds {held[0]}, and is no run")


def require_packages() -> None:
    """Exit with a line that says what to install, where something is missing."""
    missing = [package for module, package in NEEDED.items() if importlib.util.find_spec(module) is None]
    if missing:
        sys.exit(f'fastcl.train needs {", ".join(missing)}: pip install "fastcl[train]"')
