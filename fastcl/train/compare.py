"""Cl-InfoNCE's comparisons of clusters and losses: ``python -m fastcl.train.compare``.

The same command as ``python -m fastcl.train.study compare``.
"""

import sys
from collections.abc import Sequence

from fastcl.command import run
from fastcl.train import study

PROG = "python -m fastcl.train.compare"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line of the study; returns the exit code, exits with 2 on an option it cannot use."""
    return study.main(["compare", *(sys.argv[1:] if argv is None else argv)])


if __name__ == "__main__":
    run(PROG, main)
