"""Kill the trainer at random moments, resume it, and compare with a run that nothing stopped.

    python -m tests.train.kills --kills 50

Each run is killed once (a third of them again while they go on), at a moment drawn over the whole time that a run
takes, so that any line of the trainer may be its last. A run that left a config.json goes on with --resume, one that
left less begins again with the same --out. Every number must then be the uninterrupted run's: metrics.jsonl and
results.json to the byte, the checkpoint to the bit.

The process that starts them has imported everything and computed nothing: each run is a fork of it.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from threadpoolctl import threadpool_limits

from fastcl import command
from fastcl.train import __main__ as cli
from fastcl.train import evaluate, loop, processes, report  # noqa: F401 - what the forks would import
from fastcl.train.files import load_checkpoint

IMAGES, EPOCHS = 60, 6


def start(arguments: list[str], log: Path, pictures: bool) -> int:
    """The process that runs the trainer."""
    child = os.fork()
    if child:
        return child
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        torch.set_num_threads(1)
        threadpool_limits(1)
        evaluate.DRAWS = 1
        if not pictures:  # most of the time is theirs
            report.draw = lambda *_: None
        command.run(cli.PROG, lambda: cli.main(arguments))
    except SystemExit as ending:
        os._exit(int(ending.code or 0))
    finally:
        os._exit(99)


def finish(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def differences(folder: Path, whole: Path) -> list[str]:
    """The files whose numbers are others than the uninterrupted run's."""
    found = [
        name for name in ("metrics.jsonl", "results.json")
        if not (folder / name).exists() or (folder / name).read_bytes() != (whole / name).read_bytes()
    ]  # fmt: skip
    one, other = (load_checkpoint(place / "checkpoint.pt") for place in (folder, whole))
    if not _equal(one, other):
        found.append("checkpoint.pt")
    unknown = {path.name for path in folder.iterdir()} - {path.name for path in whole.iterdir()}
    return found + sorted(unknown)


def _equal(one, other) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_equal(value, other[key]) for key, value in one.items())
    if isinstance(one, list):
        return len(one) == len(other) and all(map(_equal, one, other))
    return one == other


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--seed", type=int, default=None, help="of the moments; drawn, and printed, where not given")
    parser.add_argument("--pictures", action="store_true", help="draw them too")
    parser.add_argument("--method", default="clinfonce")
    options = parser.parse_args()
    seed = options.seed if options.seed is not None else random.SystemRandom().randrange(10**6)
    draw = random.Random(seed)
    torch.optim.AdamW([torch.zeros(1)])  # imports much when first asked for one
    with tempfile.TemporaryDirectory() as place:
        return _run(options, draw, seed, Path(place))


def _run(options: argparse.Namespace, draw: random.Random, seed: int, place: Path) -> int:
    digits = load_digits()
    np.savez(
        place / "few.npz", images=(digits.images[:IMAGES] * 15.9).astype(np.uint8), labels=digits.target[:IMAGES] % 3
    )
    run = ["--data", str(place / "few.npz"), "--method", options.method, "--epochs", str(EPOCHS), "--renew", "2",
           "--batch-size", "14", "--n-clusters", "4"]  # fmt: skip
    log, whole = place / "log", place / "whole"

    def begin(folder: Path) -> int:
        resumable = (folder / "config.json").exists()
        return start(["--resume", str(folder)] if resumable else [*run, "--out", str(folder)], log, options.pictures)

    before = time.monotonic()
    if finish(begin(whole)):
        print(log.read_text())
        return 1
    length = time.monotonic() - before
    print(f"seed {seed}; a whole run takes {length:.1f} s", flush=True)
    kills = same = number = 0
    while kills < options.kills:
        number += 1
        folder = place / f"run{number}"
        moments, states = 1 + (draw.random() < 1 / 3), []
        for _ in range(min(moments, options.kills - kills)):
            child = begin(folder)
            moment = draw.uniform(0, length)
            time.sleep(moment)
            os.kill(child, signal.SIGKILL)
            if finish(child) != -signal.SIGKILL:
                continue  # it was over before
            kills += 1
            held = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
            done = len(load_checkpoint(folder / "checkpoint.pt")["history"]) if "checkpoint.pt" in held else None
            states.append({"s": round(moment, 2), "epochs": done, "files": held})
        code = finish(begin(folder))
        wrong = [f"exit code {code}"] if code else differences(folder, whole)
        same += 0 if wrong else len(states)
        print(f"run {number}, killed at {json.dumps(states)}: {', '.join(wrong) or 'the same numbers'}", flush=True)
    print(f"{same} of {kills} kills ended with the numbers of the uninterrupted run")
    if same != kills:
        print(log.read_text()[-5000:])
    return int(same != kills)


if __name__ == "__main__":
    sys.exit(main())
