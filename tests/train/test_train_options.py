"""The trainer's command line refuses what it cannot use, in one line, and overwrites nothing."""

import json

import numpy as np
import pytest
import torch

from fastcl.train import evaluate, report
from fastcl.train.__main__ import main
from tests.support.training import options


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch) -> None:
    """They take most of the time, and are not the subject here."""
    monkeypatch.setattr(report, "draw", lambda *_: None)
    monkeypatch.setattr(evaluate, "DRAWS", 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "mocha"], "invalid choice: 'mocha'"),
        (["--clusters", "labels"], "--clusters needs a method that uses them"),
        (
            ["--method", "clinfonce", "--clusters", "colour"],
            "--clusters must be kmeans, attributes, tags, labels, sinkhorn, labels made worse",
        ),
        (["--method", "clinfonce", "--clusters", "none.csv:kind"], "none.csv cannot be read"),
        (["--data", "mnist"], "--data must be digits, glyphs, cifar10, cifar100, imagefolder or FILE.npz"),
        (["--data", "none.npz"], "none.npz cannot be read"),
        (["--data", "cifar10"], "--data cifar10 needs --root"),
        (["--root", "."], "--root goes with"),
        (["--epochs", "0"], "expected an integer of at least 1, got '0'"),
        (["--seed", "4294967296"], "expected an integer of at least 0 and below 4294967296"),
        (["--out", f"{__file__}/below"], "cannot be made"),
        (["--batch-size", "1"], "expected an integer of at least 2"),
        (["--temperature", "0"], "expected a number above 1e-30 and below 1e+30, got '0'"),
        (["--lr", "1e300"], "expected a number above 1e-30 and below 1e+30, got '1e300'"),
        (["--device", "abacus"], "--device abacus cannot be used"),
        (["--device", "meta"], "--device meta cannot be used"),
        (["--precision", "float8"], "invalid choice: 'float8'"),
        (["--n-clusters", "5000"], "--n-clusters must be at most the number of training images"),
        (["--resume", "nowhere"], "--resume must name a run folder"),
    ],
)
def test_bad_options_end_in_one_line(arguments, message, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    errors = capsys.readouterr().err
    assert message in errors
    assert errors.count("\n") == 1
    assert not list(tmp_path.glob("runs/*/config.json"))


def test_a_run_never_overwrites_another(npz, tmp_path, capsys) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "note").write_text("mine")
    with pytest.raises(SystemExit):
        main(options(npz, tmp_path / "run"))
    assert "--out must be a new or an empty folder" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["note"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "mocha"}, "invalid choice: 'mocha'"),
        ({"epochs": "x"}, "expected an integer of at least 1, got 'x'"),
        ({"method": "clinfonce", "clusters": 5}, "--clusters must be kmeans"),
        ({"colour": 1}, "--resume must name a run folder with its config.json"),
    ],
)
def test_resume_checks_an_edited_config(change, message, npz, tmp_path, capsys) -> None:
    assert main(options(npz, tmp_path / "run", epochs=1)) == 0
    path = tmp_path / "run" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(SystemExit) as exit_:
        main(["--resume", str(tmp_path / "run")])
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"", b"no checkpoint", "other"])
def test_resume_refuses_what_is_no_checkpoint(content, npz, tmp_path, capsys) -> None:
    assert main(options(npz, tmp_path / "run", epochs=1)) == 0
    if content == "other":
        torch.save({"state": torch.ones(2)}, tmp_path / "run" / "checkpoint.pt")
    else:
        (tmp_path / "run" / "checkpoint.pt").write_bytes(content)
    with pytest.raises(SystemExit) as exit_:
        main(["--resume", str(tmp_path / "run")])
    assert exit_.value.code == 2
    assert "--resume found no usable checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize("change", ["images", "labels", "test_images", "test_labels", "shape", "names", "channels"])
def test_resume_refuses_other_data(change, npz, tmp_path, capsys) -> None:
    with np.load(npz) as given:
        images, labels = given["images"], given["labels"]
    arrays = {"images": images[:100], "labels": labels[:100], "test_images": images[100:], "test_labels": labels[100:]}
    data = tmp_path / "data.npz"
    np.savez(data, **arrays)
    assert main(options(data, tmp_path / "run", epochs=1)) == 0
    if change == "shape":
        arrays |= {name: arrays[name].reshape(-1, 4, 16) for name in ("images", "test_images")}
    elif change == "names":
        arrays |= {name: arrays[name] + 1 for name in ("labels", "test_labels")}
    elif change == "channels":
        arrays |= {name: arrays[name][..., None].repeat(3, 3) for name in ("images", "test_images")}
    else:
        arrays[change] = arrays[change][::-1]
    np.savez(data, **arrays)
    with pytest.raises(SystemExit):
        main(["--resume", str(tmp_path / "run")])
    assert "no longer holds the images" in capsys.readouterr().err


def test_a_learning_rate_that_blows_up_is_said_to(npz, tmp_path, capsys) -> None:
    with pytest.raises(SystemExit):
        main([*options(npz, tmp_path / "run"), "--lr", "1e29"])
    assert "try a lower --lr" in capsys.readouterr().err


def test_resume_refuses_options_that_contradict_the_run(npz, tmp_path, capsys) -> None:
    assert main(options(npz, tmp_path / "run", epochs=1)) == 0
    with pytest.raises(SystemExit):
        main(["--resume", str(tmp_path / "run"), "--temperature", "0.5"])
    assert "--temperature 0.5 contradicts the resumed run's 0.1" in capsys.readouterr().err
