"""Every method of the trainer beside the others: ``python -m fastcl.train.systems``.

Each is a run of the trainer per seed, with the clusters that the method takes by default; the table has the mean and
standard deviation over seeds.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from fastcl.command import Parser, run
from fastcl.train import Config, counted
from fastcl.train.compare import (
    BASELINES,
    OPTIONS,
    PROBES,
    Contestant,
    Rows,
    aligned,
    check,
    concluded,
    measure,
    spread,
)
from fastcl.train.options import add_options, at_least, require_packages

PROG = "python -m fastcl.train.systems"
DEFAULT = Config(epochs=10, batch_size=128, renew=2)
EXAMPLES = """\
  python -m fastcl.train.systems --quick                            two epochs each, to see that all works
  python -m fastcl.train.systems                                    the digits, three seeds
  python -m fastcl.train.systems --methods simclr vicreg --seeds 5"""


def table(rows: dict[str, Rows], base: Config) -> str:
    """The report in Markdown: a line a method."""
    lines = [["method", *PROBES.values()]]
    names = {"raw": "raw pixels", "untrained": "untrained encoder"}
    for name, found in rows.items():
        lines.append([names.get(name, f"`{name}`"), *(spread([row[probe] for row in found], 100) for probe in PROBES)])
    count = len(rows["raw"])
    over = f"mean ± standard deviation over {count} seeds" if count > 1 else "one seed"
    what = f"{Path(base.data).stem}, {counted(base.epochs, 'epoch')}"
    return f"Held-out accuracy in %; {over}; {what}.\n\n{aligned(lines)}\n"


def _parser() -> Parser:
    from fastcl.train.methods import METHODS

    parser = Parser(PROG, str(__doc__), EXAMPLES)
    group = parser.add_argument_group("comparison")
    group.add_argument("--methods", help=f"some of {', '.join(METHODS)} (default: all)", nargs="+",
                       choices=list(METHODS), metavar="METHOD")  # fmt: skip
    group.add_argument("--seeds", help="runs of each (default: 3)", type=at_least(int, 1), metavar="COUNT")
    group.add_argument("--quick", help="2 epochs, 2 seeds unless said otherwise: to see that all works",
                       action="store_true")  # fmt: skip
    group.add_argument("--out", help="the same command goes on with what it holds (default: runs/systems-DATA, with "
                       "--quick runs/systems-DATA-quick)", metavar="DIR")  # fmt: skip
    add_options(parser, DEFAULT, (*OPTIONS, "n-clusters"))
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code (0, or 130 after Ctrl-C), exits with 2 on an option it cannot use."""
    require_packages()
    from fastcl.train.files import claimed, write
    from fastcl.train.methods import METHODS

    parser = _parser()
    given = vars(parser.parse_args(argv))
    methods, seeds, quick, out = (given.pop(name) for name in ("methods", "seeds", "quick", "out"))
    base = dataclasses.replace(DEFAULT, **{**({"epochs": 2, "renew": 1} if quick else {}), **given})
    chosen = {name: Contestant(name) for name in methods or METHODS}
    folder = Path(out or f"runs/systems-{Path(base.data).stem}{'-quick' if quick else ''}")

    def work() -> None:
        check(base, folder)
        with claimed(folder):
            rows = measure(base, chosen, range(seeds or (2 if quick else 3)), folder)
            rows = {name: rows[name] for name in (*BASELINES, *chosen)}
            text = table(rows, base)
            write(folder / "systems.json", json.dumps({"config": vars(base), "rows": rows}, indent=1) + "\n")
            write(folder / "systems.md", text)
            print(f"\n{text}\nwrote {folder}/systems.md and systems.json")

    return concluded(parser, work)


if __name__ == "__main__":
    run(PROG, main)
