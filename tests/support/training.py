"""Shared by the trainer's tests: the options of a short run, and the contents of its folder."""

import csv
import json
from pathlib import Path

import pytest
import torch

COUNT = 150  # images in the fixture `npz`


def options(npz: Path, out: Path, epochs: int = 4) -> list[str]:
    few = ["--epochs", str(epochs), "--batch-size", "40", "--n-clusters", "5", "--renew", "1"]
    return ["--data", str(npz), "--out", str(out), *few]


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "checkpoint.pt", weights_only=True)["method"]


def write_csv(path: Path, rows: int) -> Path:
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["name", "kind"])
        writer.writerows([f"image{i}", ("", "cat", "dog", "7")[i % 4]] for i in range(rows))
    return path


def refused(capsys, command, *arguments) -> str:
    """The one line with which a command refuses its arguments."""
    with pytest.raises(SystemExit) as exit_:
        command([str(argument) for argument in arguments])
    assert exit_.value.code == 2
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1
    return errors
