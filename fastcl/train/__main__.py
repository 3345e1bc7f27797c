"""The command line: ``python -m fastcl.train --help``."""

import contextlib
import dataclasses
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fastcl.train
from fastcl.command import INTERRUPTED, PIPE_CLOSED, Parser, run
from fastcl.train import Config, OptionError, WriteError, counted
from fastcl.train.options import add_options, check_out, require_packages, settle

# Methods, loop and pictures are imported where they are used: without these packages the command says what to install.
if TYPE_CHECKING:
    from fastcl.train.loop import Run
    from fastcl.train.processes import Processes

PROG = "python -m fastcl.train"
EXAMPLES = """\
  python -m fastcl.train                                            SimCLR on the digits, about a minute
  python -m fastcl.train --method clinfonce --clusters kmeans       clusters of k-means, renewed while training
  python -m fastcl.train --method supcon --data photographs.npz     on the labels, your own images
  python -m fastcl.train --data imagefolder --root photographs      a folder per class, or train/ and val/ of such
  python -m fastcl.train --method pmsn --long-tail 20 --device cuda
  python -m fastcl.train --method supcon --batch-classes 2          two classes a batch
  python -m fastcl.train --resume runs/digits-simclr-seed0          go on with a run that was interrupted
  torchrun --nproc-per-node 4 -m fastcl.train                       several processes share each batch"""


def _parser() -> Parser:
    parser = Parser(PROG, str(fastcl.train.__doc__), EXAMPLES)
    add_options(parser, Config())
    return parser


def _configure(
    given: dict[str, Any], processes: "Processes", claims: contextlib.ExitStack
) -> tuple[Config, Path, bool]:
    """Config, run folder and whether it holds a checkpoint, from the options that were given.

    The folder is claimed until `claims` is closed, and what can be refused before the images are read, is.
    """
    from fastcl.train.files import claimed
    from fastcl.train.loop import usable_device

    out, resume = given.pop("out", None), given.pop("resume", None)
    if resume is not None:
        folder = Path(resume)
        if out is not None:
            raise OptionError(f"--out cannot be given with --resume, which goes on in its own folder; got {out}")
        config = _stored(folder, given)
        usable_device(config.device, processes)
        claims.enter_context(claimed(folder, "--resume"))
        return config, folder, _has_checkpoint(folder)
    config = settle(Config(**given))
    usable_device(config.device, processes)
    if out is not None:
        check_out(Path(out))
        claims.enter_context(claimed(Path(out)))
        check_out(Path(out))  # again, now that the folder is locked
        return config, Path(out), False
    tail = config.long_tail and f"long_tail{config.long_tail:g}"
    parts = (
        Path(config.data).stem,
        tail,
        config.method,
        config.prior,
        config.clusters and config.clusters.rpartition(":")[2],
        config.batch_classes and f"{config.batch_classes}classes",
    )
    name = re.sub(r"[^\w.-]+", "_", "-".join(part for part in parts if part)) + f"-seed{config.seed}"
    folder, number = Path("runs", name), 1
    while folder.exists():
        number += 1
        folder = Path("runs", f"{name}-{number}")
    claims.enter_context(claimed(folder))
    check_out(folder)
    return config, folder, False


def _stored(folder: Path, given: dict[str, Any]) -> Config:
    """The config of a run folder, which the options that were given must not contradict."""
    try:
        stored = Config(**json.loads((folder / "config.json").read_text()))
    except (OSError, ValueError, TypeError) as error:
        what = f"--resume must name a run folder with its config.json; got {folder}: {error}"
        if isinstance(error, FileNotFoundError) and folder.is_dir():
            what = f"--resume must name a run folder with its config.json; {folder} has none: nothing was trained there"
        raise OptionError(what) from error
    # Through the command line's own checks: the file may have been edited.
    kept = [f"--{name.replace('_', '-')}={value}" for name, value in vars(stored).items() if value is not None]
    stored = Config(**vars(_parser().parse_args(kept)))
    for name, value in given.items():
        if name != "device" and value != getattr(stored, name):
            option = "--" + name.replace("_", "-")
            raise OptionError(f"{option} {value} contradicts the resumed run's {getattr(stored, name)}")
    return dataclasses.replace(stored, device=given.get("device", stored.device))


def _has_checkpoint(folder: Path) -> bool:
    """False for a run that was killed before its first checkpoint, which then begins at its beginning."""
    if (folder / "checkpoint.pt").exists():
        return True
    metrics = folder / "metrics.jsonl"
    if metrics.exists() and metrics.stat().st_size:
        raise OptionError(f"--resume found no checkpoint.pt in {folder}, which has metrics: it was removed")
    return False


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code (0, 130 after Ctrl-C, 141 where the reader of its output is gone).

    Exits with 2 on an option it cannot use, and on a file that it cannot write.
    """
    require_packages()
    from fastcl.train.processes import started

    parser = _parser()
    given = vars(parser.parse_args(argv))
    with started() as processes, contextlib.ExitStack() as claims:
        return _run(parser, given, processes, claims)


def _run(parser: Parser, given: dict[str, Any], processes: "Processes", claims: contextlib.ExitStack) -> int:
    from fastcl.train import report
    from fastcl.train.loop import Run, other_prototypes
    from fastcl.train.tensorboard import Board

    run, folder = None, None
    beside, tensorboard = given.pop("beside", None), given.pop("tensorboard", False)
    try:
        if beside is not None:
            other_prototypes(Path(beside))  # before training, not after it
        if tensorboard:
            Board.require()
        config, folder, resumed = processes.from_first(lambda: _configure(given, processes, claims))
        if beside is not None and config.prior is None:
            raise OptionError(f"--beside needs a method with prototypes; got --method {config.method}")
        run = Run(config, folder, resumed, processes)
        if processes.first:
            print(run.summary(), flush=True)
            if tensorboard:
                run.board = claims.enter_context(Board(folder, run.history))
        run.train()
        if not processes.first:
            return 0
        print(report.table(run.finish(beside and Path(beside))))
        pictures = ["accuracy.png", "embedding.png", *(["prototypes.png"] if config.prior else []), "neighbours.png"]
        print(f"wrote {folder}/results.json, {', '.join(pictures[:-1])} and {pictures[-1]}", flush=True)
    except WriteError as error:
        if not processes.first:
            return 2
        parser.error(f"{error}. {_how_to_go_on(folder)}" if folder and _begun(folder) else str(error))
    except OptionError as error:
        if not processes.first:  # the first says it
            return 2
        parser.error(" ".join(str(error).split()))
    except (KeyboardInterrupt, BrokenPipeError) as error:
        pipe = isinstance(error, BrokenPipeError)
        if processes.first:
            what = "standard output was closed" if pipe else "interrupted"
            print(f"{what}{_kept(run, folder)}", file=sys.stderr)
        return PIPE_CLOSED if pipe else INTERRUPTED
    return 0


def _begun(folder: Path) -> bool:
    return (folder / "config.json").exists()


def _how_to_go_on(folder: Path) -> str:
    return f"Go on with: {PROG} --resume {folder}"


def _kept(run: "Run | None", folder: Path | None) -> str:
    """What is left of a run that was ended, for the line that says so."""
    if run is None or folder is None:
        return f" before training began{f'. {_how_to_go_on(folder)}' if folder and _begun(folder) else ''}"
    try:
        return f"; kept {run.keep()} of {counted(run.config.epochs, 'epoch')}. {_how_to_go_on(folder)}"
    except (OptionError, OSError, ValueError) as error:
        return f"; {error}. {_how_to_go_on(folder)}"


if __name__ == "__main__":
    run(PROG, main)
