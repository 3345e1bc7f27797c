"""The trainer and the example in several processes, as torchrun starts them."""

import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from torch import distributed as dist

from fastcl.train import OptionError
from fastcl.train.__main__ import main
from fastcl.train.loop import Run
from fastcl.train.methods import METHODS, contrastive
from fastcl.train.processes import Processes
from tests.support.training import metrics, options, weights

ROOT = Path(__file__).parents[2]


def torchrun(count: int, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True, timeout=240)


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_available(), reason="torch is built without torch.distributed")
def test_more_processes_go_on_to_the_same_numbers(npz, tmp_path, monkeypatch) -> None:
    """One epoch by one process, the others by three, which share batches of 40 unevenly."""
    command = [
        *options(npz, tmp_path / "whole", epochs=3),
        "--method",
        "clinfonce",
        "--clusters",
        "labels",
        "--lr",
        "1e-3",
    ]
    assert main(command) == 0
    epoch = Run._epoch

    def interrupted(self, number, bar):
        if number == 1:
            raise KeyboardInterrupt
        return epoch(self, number, bar)

    command[command.index(str(tmp_path / "whole"))] = str(tmp_path / "parts")
    with monkeypatch.context() as patch:
        patch.setattr(Run, "_epoch", interrupted)
        assert main(command) == 130
    done = torchrun(3, "-m", "fastcl.train", "--resume", tmp_path / "parts")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("epochs of") == 1, done.stdout  # the first process alone speaks
    for line, expected in zip(metrics(tmp_path / "parts"), metrics(tmp_path / "whole"), strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], rel=1e-4)
    for name, value in weights(tmp_path / "whole").items():
        torch.testing.assert_close(weights(tmp_path / "parts")[name], value, rtol=1e-2, atol=1e-4)
    assert (tmp_path / "parts" / "results.json").exists()


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_available(), reason="torch is built without torch.distributed")
def test_the_example_runs_under_torchrun_and_alone() -> None:
    script = ROOT / "examples" / "clip_torchrun.py"
    alone = subprocess.run([sys.executable, script], env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True)
    together = torchrun(2, script)
    assert together.returncode == 0, together.stderr
    losses = [
        [float(line.split()[3]) for line in text.splitlines()] for text in (alone.stdout.decode(), together.stdout)
    ]
    assert len(losses[0]) == 3
    assert losses[0][-1] < losses[0][0] / 1.5
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_shares_of_a_batch_are_the_batch(count: int) -> None:
    index = np.random.default_rng(0).permutation(20)
    shares = [Processes(rank, count).share(index) for rank in range(count)]
    assert np.array_equal(np.concatenate(shares), index)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_methods_gather_or_refuse() -> None:
    shape = torch.Size([1, 8, 8])
    several = Processes(0, 2)
    method = METHODS["clinfonce"](shape, 0.1)
    several.gathering(method)
    assert method.loss.gather is True
    method.projector.append(torch.nn.BatchNorm1d(128))
    Processes().gathering(method)
    with pytest.raises(OptionError, match="the statistics of BatchNorm1d would be each process's own"):
        several.gathering(method)


def test_predicting_clusters_is_averaged_over_all_processes(monkeypatch) -> None:
    """As if this process held the first images, and the only other one the rest, two of which are in no cluster."""
    method = METHODS["cluster-ce"](torch.Size([1, 8, 8]), 0.1, classes=3)
    views, clusters = torch.rand(5, 2, 1, 8, 8), torch.tensor([0, 2, -1, 1, -1])
    whole = method(views, clusters, torch.arange(5))
    method.gather = True
    world = Mock(size=2, total=lambda count: torch.tensor(6))
    monkeypatch.setattr(contrastive.World, "of", lambda gather: world)
    shares = [method(views[part], clusters[part], torch.arange(5)[part]) for part in (slice(2), slice(2, 5))]
    torch.testing.assert_close(sum(shares) / 2, whole)
