"""The reference trainer's runs: their numbers depend on no interruption, and their folder holds everything."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastcl.train import loop
from fastcl.train.__main__ import main
from fastcl.train.loop import Run
from fastcl.train.methods.clusterings import kmeans
from fastcl.train.methods.encoder import Encoder
from tests.support.training import COUNT, metrics, options, weights, write_csv

ROOT = Path(__file__).parents[2]
PROBES = {"knn", "linear_1", "linear_5", "linear_all", "mutual_information", "conditional_entropy", "rankme"}


@pytest.mark.parametrize("method", [["simclr"], ["clinfonce", "--clusters", "kmeans"]])
def test_a_resumed_run_has_the_numbers_of_an_uninterrupted_one(npz, tmp_path, monkeypatch, capsys, method) -> None:
    assert main([*options(npz, tmp_path / "whole"), "--method", *method]) == 0

    step, calls = Run._step, 0

    def interrupted(self, *args):
        nonlocal calls
        calls += 1
        if calls == 6:  # the second step of the third epoch: 105 images make two batches of 40
            raise KeyboardInterrupt
        return step(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "_step", interrupted)
        assert main([*options(npz, tmp_path / "parts"), "--method", *method]) == 130
    message = capsys.readouterr().err
    assert f"--resume {tmp_path / 'parts'}" in message
    assert "kept 2 of 4 epochs" in message
    assert len(metrics(tmp_path / "parts")) == 2
    assert not (tmp_path / "parts" / "results.json").exists()

    assert main(["--resume", str(tmp_path / "parts")]) == 0
    assert metrics(tmp_path / "parts") == metrics(tmp_path / "whole")
    for name, value in weights(tmp_path / "whole").items():
        assert torch.equal(value, weights(tmp_path / "parts")[name]), name
    results = [json.loads((tmp_path / part / "results.json").read_text()) for part in ("whole", "parts")]
    assert results[0] == results[1]


def test_a_real_interrupt_keeps_what_was_done(npz, tmp_path) -> None:
    out = tmp_path / "run"
    command = [sys.executable, "-m", "fastcl.train", *options(npz, out, epochs=100_000)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    # A shell's background jobs ignore interrupts, and so would their children.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=tmp_path, env=environment)
    finally:
        signal.signal(signal.SIGINT, before)
    deadline = time.monotonic() + 120
    try:
        while process.poll() is None and time.monotonic() < deadline:
            if (out / "metrics.jsonl").exists() and len((out / "metrics.jsonl").read_text().splitlines()) >= 2:
                break
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    done = len(metrics(out))
    assert done >= 2
    assert f"kept {done} of 100000 epochs" in errors
    assert len(torch.load(out / "checkpoint.pt", weights_only=True)["history"]) == done


def test_the_run_folder_holds_everything(npz, tmp_path, capsys) -> None:
    out = tmp_path / "run"
    assert main([*options(npz, out, epochs=2), "--method", "clinfonce", "--clusters", "labels", "--seed", "3"]) == 0
    config = json.loads((out / "config.json").read_text())
    assert (config["method"], config["clusters"], config["seed"], config["epochs"]) == ("clinfonce", "labels", 3, 2)
    assert [line["epoch"] for line in metrics(out)] == [1, 2]
    assert all(math.isfinite(line["loss"]) for line in metrics(out))
    results = json.loads((out / "results.json").read_text())
    assert set(results) == PROBES | {"training_clusters", "prototypes"}
    for name in PROBES:
        assert set(results[name]) == {"raw", "untrained", "trained"}
        assert all(math.isfinite(value) for value in results[name].values())
    for name in ("knn", "linear_1", "linear_5", "linear_all"):
        assert all(0 < value <= 1 for value in results[name].values())
    # Labels as clusters: all is known of the label, and nothing else is in the cluster.
    assert results["training_clusters"]["count"] == 10
    assert results["training_clusters"]["conditional_entropy"] == pytest.approx(0, abs=1e-12)
    assert results["training_clusters"]["mutual_information"] == pytest.approx(math.log(10), abs=0.01)
    for name in ("accuracy", "embedding", "neighbours"):
        pixels = np.asarray(Image.open(out / f"{name}.png").convert("RGB"))
        assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20, f"{name}.png is blank"
    assert "1 label a class" in capsys.readouterr().out


def test_training_teaches(tmp_path) -> None:
    """With labels as clusters and little time, few-label probes pass raw pixels and the untrained encoder by far."""
    out = tmp_path / "run"
    assert main(["--method", "clinfonce", "--clusters", "labels", "--epochs", "30", "--out", str(out)]) == 0
    results = json.loads((out / "results.json").read_text())
    for probe in ("linear_1", "linear_5"):
        raw, untrained, trained = (results[probe][name] for name in ("raw", "untrained", "trained"))
        assert trained > max(raw, untrained) + 0.05
    losses = [line["loss"] for line in metrics(out)]
    assert losses[-1] < losses[0] - 1


@pytest.mark.parametrize("kind", ["attributes", "labels", "csv"])
def test_every_kind_of_fixed_clusters_trains(npz, tmp_path, kind) -> None:
    if kind == "csv":
        kind = f"{write_csv(tmp_path / 'of:colons.csv', COUNT)}:kind"
    arguments = ["--method", "clinfonce", "--clusters", kind, "--precision", "bfloat16"]
    assert main([*options(npz, tmp_path / "run", epochs=1), *arguments]) == 0
    assert json.loads((tmp_path / "run" / "results.json").read_text())["training_clusters"]["count"] > 1


def test_default_folders_do_not_collide(npz, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Run, "train", lambda self: None)
    monkeypatch.setattr(Run, "finish", lambda *_: pytest.fail("not reached"))
    names = []
    for _ in range(2):
        with pytest.raises(pytest.fail.Exception):
            main(["--data", str(npz), "--seed", "7", "--n-clusters", "5"])
        names = sorted(path.name for path in Path("runs").iterdir())
    assert names == ["few-simclr-seed7", "few-simclr-seed7-2"]


def test_kmeans_is_renewed_as_often_as_told(npz, tmp_path, monkeypatch) -> None:
    fitted = []
    monkeypatch.setattr(loop, "kmeans", lambda rows, count, seed: fitted.append(len(rows)) or kmeans(rows, count, seed))
    monkeypatch.setattr(Run, "finish", lambda *_: pytest.fail("trained"))
    with pytest.raises(pytest.fail.Exception, match="trained"):
        main([*options(npz, tmp_path / "run", epochs=7), "--method", "clinfonce", "--renew", "3"])
    assert fitted == [105, 105]  # before the fourth and the seventh epoch, on the training images


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32), (3, 9, 7), (1, 2, 2)])
def test_the_encoder_takes_any_image_size_and_does_not_mix_the_batch(shape) -> None:
    encoder = Encoder(*shape)
    images = torch.rand(5, *shape)
    features = encoder(images)
    assert features.shape == (5, encoder.features)
    images[1:] = torch.rand(4, *shape)
    torch.testing.assert_close(encoder(images)[0], features[0])
