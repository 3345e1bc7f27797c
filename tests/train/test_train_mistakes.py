"""Mistakes of people who use the trainer: what is said to them, and when."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from fastcl.train import compare, data, evaluate, loop, report
from fastcl.train.__main__ import main
from fastcl.train.files import save_figure
from tests.support.training import metrics, options, refused, write_csv

PIXELS = np.random.default_rng(0).integers(0, 256, (20, 8, 8))
LABELS = np.arange(20) % 2


@pytest.mark.parametrize(
    ("images", "came"),
    [
        (PIXELS, "got int64 from 0 to 255: images.astype(np.uint8) fits"),
        (PIXELS.astype(np.int32) - 1, "got int32 from -1 to 254\n"),
        (PIXELS * 300, "got int64 from 0 to 76500\n"),
        (PIXELS.astype(np.float32), "got float32 from 0 to 255: images / 255 fits"),
        (PIXELS / 127.5 - 1, "got float64 from -1 to 1\n"),
        (np.where(PIXELS[3, 0, 0] == PIXELS, np.nan, 0.5).astype(np.float32)[3:5], "with NaN or infinity in"),
        (np.where(np.arange(20) == 7, np.inf, 0.5)[:, None, None] + np.zeros((20, 8, 8)), "infinity in 1 of 20 images"),
        (PIXELS > 100, "got bool: images.astype(np.float32) fits"),
        (PIXELS.astype(np.complex64), "got complex64\n"),
    ],
)
def test_images_of_the_wrong_kind_are_described(images, came, tmp_path, capsys) -> None:
    np.savez(tmp_path / "bad.npz", images=images, labels=LABELS[: len(images)])
    message = refused(capsys, main, "--data", tmp_path / "bad.npz", "--out", tmp_path / "run")
    assert "bad.npz: 'images' must be uint8 or float in [0, 1]; got" in message
    assert came in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("fits", [PIXELS.astype(np.uint8), PIXELS / 255, (PIXELS / 255).astype(np.float16)])
def test_images_of_the_right_kind_are_read(fits, tmp_path) -> None:
    np.savez(tmp_path / "good.npz", images=fits, labels=LABELS)
    assert len(data.load(str(tmp_path / "good.npz"), None, 0).train_labels) == 14


def test_labels_that_are_no_numbers_are_refused(tmp_path, capsys) -> None:
    np.savez(tmp_path / "bad.npz", images=PIXELS.astype(np.uint8), labels=np.where(LABELS, np.nan, 1.0))
    assert "'labels' must be finite; got NaN" in refused(capsys, main, "--data", tmp_path / "bad.npz")


def test_out_says_what_is_in_the_way(npz, tmp_path, capsys) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "note").touch()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    for command in (main, compare.main):
        messages = [
            refused(capsys, command, "--data", npz, "--out", tmp_path / name) for name in ("file", "folder", "run")
        ]
        assert f"{tmp_path / 'file'} is a file" in messages[0]
        assert f"{tmp_path / 'folder'} holds note" in messages[1]
        assert "--resume" not in messages[0] + messages[1]
        assert f"{tmp_path / 'run'} is a run" in messages[2]
    assert f"--resume {tmp_path / 'run'}" in refused(capsys, main, "--data", npz, "--out", tmp_path / "run")


@pytest.mark.parametrize("command", [main, compare.main])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "abacus"], "--device abacus cannot be used"),
        (["--out", f"{__file__}/below"], "cannot be made"),
        (["--data", "mnist"], "--data must be digits"),
        (["--data", "cifar10", "--root", "nowhere"], "needs --root, an existing folder; got nowhere. Download https"),
        (["CLUSTERS", "none.csv:kind"], "none.csv cannot be read"),
        (["CLUSTERS", "FILE:sort"], "has no column 'sort'"),
    ],
)
def test_what_can_be_refused_early_is(command, arguments, message, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    if "nowhere" not in arguments:
        monkeypatch.setattr(data, "load", lambda *_: pytest.fail("read the images first"))
        monkeypatch.setattr(loop, "prepared", lambda *_: pytest.fail("read the images first"))
    option = "--auxiliary" if command is compare.main else "--clusters"
    path = write_csv(tmp_path / "c.csv", 3)
    given = [argument.replace("CLUSTERS", option).replace("FILE", str(path)) for argument in arguments]
    if option in given and command is main:
        given += ["--method", "clinfonce"]
    line = refused(capsys, command, *given)
    assert message in line
    assert option not in given or option in line
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_without_its_files_cifar_says_where_they_come_from(name, tmp_path, monkeypatch, capsys) -> None:
    def reader(root: str, train: bool, download: bool):
        raise RuntimeError("Dataset not found or corrupted. You can use download=True to download it")

    datasets = SimpleNamespace(CIFAR10=reader, CIFAR100=reader)
    monkeypatch.setitem(sys.modules, "torchvision", SimpleNamespace(datasets=datasets))
    line = refused(capsys, main, "--data", name, "--root", tmp_path, "--out", tmp_path / "run")
    address = f"https://www.cs.toronto.edu/~kriz/{name[:5]}-{name[5:]}-python.tar.gz"
    assert f"is not, or not whole, in --root {tmp_path}. Download {address} and unpack it there" in line
    assert "download=True" not in line


def test_beside_needs_prototypes_and_numbers(tmp_path, npz, capsys) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for content, message in (
        (
            {"name": "uniform", "prior": [0.5, "x"], "sizes": [1.0]},
            "--beside must name the folder of a finished run with",
        ),
        ({"name": "uniform", "prior": [0.5, 0.5], "sizes": [1, 0]}, "--beside needs a method with prototypes"),
    ):
        (other / "results.json").write_text(json.dumps({"prototypes": content}))
        assert message in refused(capsys, main, *options(npz, tmp_path / "run"), "--beside", other)


def test_the_picture_of_a_single_epoch_shows_it(tmp_path) -> None:
    history = [{"epoch": 1, "step": 2, "loss": 4.0, "lr": 1e-3, "knn": 0.5}]
    knn = {"raw": 0.9, "untrained": 0.8, "trained": 0.5}
    save_figure(report._accuracy("title", history, knn), tmp_path / "accuracy.png")
    pixels = np.asarray(Image.open(tmp_path / "accuracy.png").convert("RGB")).astype(int)
    right = pixels[60:-60, pixels.shape[1] // 2 + 90 : -20]  # within the axes of the loss
    blue = (right[..., 2] - right[..., 0] > 80).sum()
    assert 5 < blue < 500  # a dot, and no more


class Writer:
    """In the place of TensorBoard's, which need not be there."""

    def __init__(self, folder: str) -> None:
        self.lines: list[tuple[str, float, int]] = []
        Writer.last = self

    def add_scalar(self, *line) -> None:
        self.lines.append(line)

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self.lines.append(("closed", 0, 0))


def test_tensorboard_has_the_metrics_of_the_whole_run(npz, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(report, "draw", lambda *_: None)
    monkeypatch.setattr(evaluate, "DRAWS", 1)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    line = refused(capsys, main, *options(npz, tmp_path / "run", epochs=2), "--tensorboard")
    assert "--tensorboard needs tensorboard: pip install tensorboard" in line
    assert not (tmp_path / "run").exists()
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer))
    assert main([*options(npz, tmp_path / "run", epochs=2), "--tensorboard"]) == 0
    expected = [
        (name, epoch[name], epoch["step"]) for epoch in metrics(tmp_path / "run") for name in ("loss", "knn", "lr")
    ]
    assert Writer.last.lines == [*expected, ("closed", 0, 0)]
    assert main(["--resume", str(tmp_path / "run"), "--tensorboard"]) == 0
    assert Writer.last.lines == [*expected, ("closed", 0, 0)]


@pytest.mark.parametrize(
    ("place", "rest"), [("_initial", ""), ("_write_metrics", ". Go on with: python -m fastcl.train --resume {}")]
)
def test_an_interrupt_before_training_says_what_is_left(place, rest, npz, tmp_path, monkeypatch, capsys) -> None:
    def interrupted(self):
        raise KeyboardInterrupt

    out = tmp_path / "run"
    monkeypatch.setattr(loop.Run, place, interrupted)
    assert main(options(npz, out)) == 130
    assert capsys.readouterr().err == f"interrupted before training began{rest.format(out)}\n"
    assert out.exists() == bool(rest)


def test_training_goes_on_without_standard_error(npz, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(loop.Run, "finish", lambda *_: None)
    monkeypatch.setattr(report, "table", lambda _: "")
    monkeypatch.setattr(sys, "stderr", None)  # as Python has it where a shell closed it: 2>&-
    assert main(options(npz, tmp_path / "run", epochs=1)) == 0
    assert "epoch 1/1  loss" in capsys.readouterr().out


@pytest.mark.parametrize("when", ["training", "end"])
def test_features_that_overflow_are_refused(when, npz, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(evaluate, "DRAWS", 1)
    out = tmp_path / "run"
    overflow = lambda *_: evaluate.Representation(np.zeros((2, 3)), np.array([[0.0, np.inf, 0.0]]))  # noqa: E731
    if when == "training":
        monkeypatch.setattr(loop, "represent", overflow)
    else:
        finish = loop.Run.finish
        monkeypatch.setattr(
            loop.Run, "finish", lambda *given: monkeypatch.setattr(loop, "represent", overflow) or finish(*given)
        )
    with pytest.raises(SystemExit):
        main(options(npz, out, epochs=1))
    assert "error: the features are no longer finite: try a lower --lr than 0.002\n" in capsys.readouterr().err
    assert len(metrics(out)) == (when == "end")
    assert not (out / "results.json").exists()
