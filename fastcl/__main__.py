"""``python -m fastcl``: the commands there are."""

from __future__ import annotations

from collections.abc import Sequence

from . import __version__
from .command import Parser, run

PROG = "python -m fastcl"
COMMANDS = {
    "fastcl.info": "what was found on this machine, what will be used, and why anything is missing",
    "fastcl.train": "train an encoder on images with any of the losses, probe it, draw what it learned",
    "fastcl.train.systems": "every method of the trainer, as a table over seeds",
    "fastcl.train.study": "the papers' claims put to the test, as tables and pictures over seeds",
    "fastcl.train.compare": "Cl-InfoNCE's comparisons of clusters and losses: the study compare",
}


def listing() -> str:
    """The text that ``python -m fastcl`` prints."""
    width = 2 + max(map(len, COMMANDS))
    lines = [f"  python -m {name:<{width}}{what}" for name, what in COMMANDS.items()]
    return "\n".join([f"fastcl {__version__}: fused contrastive and clustering losses for PyTorch. Commands:", "",
                      *lines, "", "Each has --help, with examples."])  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = Parser(PROG, f"{__doc__}\n\n{listing()}")
    parser.parse_args(argv)
    print(listing())
    return 0


if __name__ == "__main__":
    run(PROG, main)
