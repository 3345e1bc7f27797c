"""The reference trainer: its numbers depend neither on interruptions nor on batches, its probes are what they say."""

import csv
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from fastcl.train import evaluate, loop
from fastcl.train.__main__ import main
from fastcl.train.data import ImageData, attributes, augment, count_holes, load, read_csv_clusters, uniforms
from fastcl.train.evaluate import Representation, cluster_information, knn_accuracy, linear_accuracy, rankme
from fastcl.train.loop import Run
from fastcl.train.methods import Encoder, kmeans

ROOT = Path(__file__).parent.parent
COUNT = 150
PROBES = {"knn", "linear_1", "linear_5", "linear_all", "mutual_information", "conditional_entropy", "rankme"}


@pytest.fixture(scope="module")
def npz(tmp_path_factory: pytest.TempPathFactory) -> Path:
    digits = load_digits()
    path = tmp_path_factory.mktemp("data") / "few.npz"
    np.savez(path, images=(digits.images[:COUNT] * 15.9).astype(np.uint8), labels=digits.target[:COUNT])
    return path


def options(npz: Path, out: Path, epochs: int = 4) -> list[str]:
    few = ["--epochs", str(epochs), "--batch-size", "40", "--n-clusters", "5", "--renew", "1"]
    return ["--data", str(npz), "--out", str(out), *few]


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "checkpoint.pt", weights_only=True)["method"]


# Runs


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


# Options


def write_csv(path: Path, rows: int) -> Path:
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["name", "kind"])
        writer.writerows([f"image{i}", ("", "cat", "dog", "7")[i % 4]] for i in range(rows))
    return path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "mocha"], "invalid choice: 'mocha'"),
        (["--clusters", "labels"], "--clusters needs a method that uses them"),
        (
            ["--method", "clinfonce", "--clusters", "colour"],
            "--clusters must be kmeans, attributes, labels or FILE.csv",
        ),
        (["--method", "clinfonce", "--clusters", "none.csv:kind"], "none.csv cannot be read"),
        (["--data", "mnist"], "--data must be digits, cifar10, cifar100, imagefolder or FILE.npz"),
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


# Data


def test_splits_are_stratified_disjoint_and_decided_by_the_seed() -> None:
    one, same, other = (load("digits", None, seed) for seed in (0, 0, 1))
    assert torch.equal(one.train_images, same.train_images)
    assert not torch.equal(one.train_images, other.train_images)
    assert len(one.train_labels) + len(one.test_labels) == 1797
    assert np.ptp(np.bincount(one.test_labels)) <= 4
    truth = load_digits()
    assert np.array_equal(one.train_labels, truth.target[one.source_index])
    assert torch.equal(one.train_images[:, 0].double() * 16, torch.tensor(truth.images[one.source_index]))


def test_npz_with_a_test_set_of_its_own_and_colours(tmp_path) -> None:
    g = np.random.default_rng(0)
    path = tmp_path / "colour.npz"
    np.savez(
        path,
        images=g.random((12, 9, 7, 3)),
        labels=np.array(list("abcabcabcabc")),
        test_images=g.random((3, 9, 7, 3)),
        test_labels=np.array(list("cab")),
    )
    data = load(str(path), None, 0)
    assert data.train_images.shape == (12, 3, 9, 7)
    assert data.test_labels.tolist() == [2, 0, 1]
    assert data.classes == ("a", "b", "c")
    assert attributes(data.train_images).shape == (12,)
    view = augment(data.train_images, np.arange(12), 0, 0, 0)
    assert view.shape == (12, 3, 9, 7)
    assert float(view.min()) >= 0
    assert float(view.max()) <= 1


class Photographs:
    """Stands in for torchvision's readers, which need files of hundreds of megabytes."""

    def __init__(self, root: str, train: bool = True, download: bool = True, transform=None) -> None:
        assert not download or transform
        g = np.random.default_rng(train)
        self.classes = ["cat", "dog"]
        self.targets = [i % 2 for i in range(24 if train else 8)]
        self.data = g.integers(0, 256, (len(self.targets), 32, 32, 3), dtype=np.uint8)

    def __iter__(self):
        return (
            (torch.from_numpy(image).permute(2, 0, 1), target)
            for image, target in zip(self.data, self.targets, strict=True)
        )


@pytest.fixture
def torchvision(monkeypatch) -> None:
    readers = SimpleNamespace(CIFAR10=Photographs, CIFAR100=Photographs, ImageFolder=Photographs)
    steps = SimpleNamespace(Compose=list, Resize=int, CenterCrop=int, PILToTensor=object)
    monkeypatch.setitem(sys.modules, "torchvision", SimpleNamespace(datasets=readers, transforms=steps))


@pytest.mark.usefixtures("torchvision")
def test_cifar_and_image_folders(tmp_path) -> None:
    data = load("cifar10", str(tmp_path), 0)
    assert data.train_images.shape == (24, 3, 32, 32)
    assert data.test_images.shape == (8, 3, 32, 32)
    assert data.classes == ("cat", "dog")
    assert data.train_labels.tolist() == [0, 1] * 12
    assert np.array_equal(data.train_images[3].permute(1, 2, 0), Photographs("", True, False).data[3])
    split = load("imagefolder", str(tmp_path), 0)
    assert (len(split.train_labels), len(split.test_labels)) == (16, 8)
    (tmp_path / "train").mkdir()
    (tmp_path / "test").mkdir()
    assert len(load("imagefolder", str(tmp_path), 0).train_labels) == 24
    arguments = ["--data", "cifar100", "--root", str(tmp_path), "--epochs", "1", "--n-clusters", "2"]
    assert main([*arguments, "--batch-size", "8", "--out", str(tmp_path / "run")]) == 0


def test_without_torchvision_the_error_says_what_to_install(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(SystemExit):
        main(["--data", "cifar10", "--root", str(tmp_path)])
    assert 'pip install "fastcl[vision]"' in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": np.zeros((4, 8, 8))}, "needs arrays 'images' and 'labels'"),
        ({"images": np.zeros((4, 8)), "labels": np.zeros(4)}, "'images' must be [n, h, w]"),
        ({"images": np.zeros((4, 8, 8)), "labels": np.zeros(5)}, "'labels' must be [4]"),
        ({"images": np.full((4, 8, 8), 2.0), "labels": np.zeros(4)}, "must be uint8 or float in [0, 1]"),
        ({"images": np.zeros((4, 8, 8)), "labels": np.arange(4)}, "cannot be split"),
        ({"images": np.zeros((0, 8, 8)), "labels": np.zeros(0)}, "must hold images"),
        ({"images": np.zeros((9, 8, 8)), "labels": np.zeros(9)}, "at least two classes"),
    ],
)
def test_unusable_npz_files_are_named(arrays, message, tmp_path, capsys) -> None:
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(SystemExit):
        main(["--data", str(tmp_path / "bad.npz"), "--out", str(tmp_path / "run")])
    assert message in capsys.readouterr().err


def test_csv_clusters(tmp_path) -> None:
    path = write_csv(tmp_path / "c.csv", 9)
    clusters = read_csv_clusters(f"{path}:kind", 9)
    assert clusters.tolist() == [-1, 1, 2, 0, -1, 1, 2, 0, -1]
    (tmp_path / "n.csv").write_text("id\n1\n1.0\n\n02\n")
    assert read_csv_clusters(f"{tmp_path / 'n.csv'}:id", 4).tolist() == [1, 2, -1, 0]  # text: 1.0 is no integer
    (tmp_path / "i.csv").write_text("id\n7\n-1\n9007199254740993\n9007199254740992\n07\n\n")
    assert read_csv_clusters(f"{tmp_path / 'i.csv'}:id", 5).tolist() == [0, -1, 2, 1, 0]
    with pytest.raises(ValueError, match="must have one row per image, 10; got 9"):
        read_csv_clusters(f"{path}:kind", 10)
    with pytest.raises(ValueError, match="has no column 'sort'"):
        read_csv_clusters(f"{path}:sort", 9)


def drawing(text: str) -> np.ndarray:
    return np.array([[float(pixel == "#") for pixel in line] for line in text.split()])


@pytest.mark.parametrize(
    ("holes", "text"),
    [
        (0, "........ ...##... ...##... ...##... ...##... ...##... ...##... ........"),
        (0, "..####.. ..#..... ..#..... ..####.. .....#.. .....#.. ..####.. ........"),
        (1, "..####.. .##..##. .#....#. .#....#. .#....#. .##..##. ..####.. ........"),
        (2, "..####.. .#....#. .#....#. ..####.. .#....#. .#....#. ..####.. ........"),
    ],
)
def test_holes(holes, text) -> None:
    assert count_holes(drawing(text)) == holes


def test_attributes_are_holes_ink_and_shape() -> None:
    images = load("digits", None, 0).train_images
    ids = attributes(images)
    assert set(np.unique(ids)) <= set(range(27))
    holes, ink, _ = np.unravel_index(ids, (3, 3, 3))
    assert [min(count_holes(image), 2) for image in images[:50, 0].numpy()] == holes[:50].tolist()
    mean = images.mean((1, 2, 3)).numpy()
    assert mean[ink == 0].max() < mean[ink == 1].max() < mean[ink == 2].max()
    assert mean[ink == 0].max() <= mean[ink == 2].min()
    assert np.array_equal(ids, attributes(images.clone()))


# Augmentation


def test_augmentation_does_not_depend_on_the_batch() -> None:
    images = load("digits", None, 0).train_images[:100]
    index = np.arange(100)
    whole = augment(images, index, seed=5, epoch=2, view=1)
    for parts in (np.split(index, [1, 14, 63]), [np.random.default_rng(0).permutation(100)]):
        for part in parts:
            assert torch.equal(augment(images[torch.from_numpy(part)], part, 5, 2, 1), whole[torch.from_numpy(part)])


def test_augmentation_differs_by_seed_epoch_sample_and_view() -> None:
    image = load("digits", None, 0).train_images[:1]
    keys = [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)]
    views = [augment(image, np.array([index]), seed, epoch, view) for seed, epoch, index, view in keys]
    for i, one in enumerate(views):
        assert not any(torch.equal(one, other) for other in views[:i])


def test_uniforms_are_uniform_and_uncorrelated() -> None:
    draws = uniforms(0, 0, np.arange(20_000), 0, 4).double()
    assert float(draws.min()) >= 0
    assert float(draws.max()) < 1
    assert torch.allclose(draws.mean(0), torch.full((4,), 0.5, dtype=torch.float64), atol=0.01)
    assert torch.allclose(torch.corrcoef(draws.T), torch.eye(4, dtype=torch.float64), atol=0.03)
    assert abs(float(torch.corrcoef(torch.stack([draws[:-1, 0], draws[1:, 0]]))[0, 1])) < 0.03


# Probes


def test_kmeans_is_renewed_as_often_as_told(npz, tmp_path, monkeypatch) -> None:
    fitted = []
    monkeypatch.setattr(loop, "kmeans", lambda rows, count, seed: fitted.append(len(rows)) or kmeans(rows, count, seed))
    monkeypatch.setattr(Run, "finish", lambda *_: pytest.fail("trained"))
    with pytest.raises(pytest.fail.Exception, match="trained"):
        main([*options(npz, tmp_path / "run", epochs=7), "--method", "clinfonce", "--renew", "3"])
    assert fitted == [105, 105]  # before the fourth and the seventh epoch, on the training images


def test_probes_learn_from_training_rows_alone(monkeypatch) -> None:
    """Held-out rows are scaled, clustered and classified by what was fitted to the training rows."""
    g = np.random.default_rng(0)
    data = made_data(np.arange(60) % 3, np.arange(30) % 3)
    rows = Representation(*(g.standard_normal((n, 4)).astype(np.float32) for n in (60, 30)))
    seen: dict[str, list[np.ndarray]] = {"scaler": [], "kmeans": [], "regression": []}

    class Scaler(evaluate.StandardScaler):
        def fit(self, x, *rest):
            seen["scaler"].append(x)
            return super().fit(x, *rest)

    class Regression(evaluate.LogisticRegression):
        def fit(self, x, y):
            seen["regression"].append(y)
            return super().fit(x, y)

    monkeypatch.setattr(evaluate, "StandardScaler", Scaler)
    monkeypatch.setattr(evaluate, "LogisticRegression", Regression)
    monkeypatch.setattr(evaluate, "kmeans", lambda x, *rest: seen["kmeans"].append(x) or kmeans(x, *rest))
    evaluate.probe(rows, data, 3, seed=1)
    first = [len(labels) for labels in seen["regression"]]
    assert first == [3] * 10 + [15] * 10 + [60]
    assert all(x is rows.train for x in (*seen["scaler"], *seen["kmeans"]))
    assert len(seen["kmeans"]) == 1


def test_few_label_draws_are_the_same_for_every_representation(monkeypatch) -> None:
    data = made_data(np.arange(60) % 3, np.arange(30) % 3)
    chosen: list[np.ndarray] = []

    class Regression(evaluate.LogisticRegression):
        def fit(self, x, y):
            chosen.append(np.sort(x[:, 0]))
            return super().fit(x, y)

    monkeypatch.setattr(evaluate, "LogisticRegression", Regression)
    place = np.arange(60, dtype=np.float32)[:, None]
    for seed in range(2):
        noise = np.random.default_rng(seed).standard_normal((60, 1)).astype(np.float32)
        rows = Representation(np.hstack([place, noise]), np.hstack([place, noise])[:30])
        linear_accuracy(rows, data, 1, seed=0)
    assert len(chosen) == 20
    for one, other in zip(chosen[:10], chosen[10:], strict=True):
        assert np.array_equal(one, other)
    assert not all(np.array_equal(chosen[0], other) for other in chosen[1:10])


def test_cluster_information_of_known_tables() -> None:
    labels = np.array([0, 0, 1, 1])
    assert cluster_information(labels, np.array([5, 5, 9, 9])) == pytest.approx((math.log(2), 0))
    assert cluster_information(labels, np.array([0, 1, 0, 1])) == pytest.approx((0, math.log(2)))
    assert cluster_information(labels, np.array([0, 1, 2, 3])) == pytest.approx((math.log(2), math.log(2)))
    assert cluster_information(labels, np.array([-1, -1, -1, -1])) == pytest.approx((math.log(2), math.log(2)))
    assert cluster_information(labels, np.array([7, 7, 7, 7])) == pytest.approx((0, 0))
    # Joint 3/8, 1/8, 1/8, 3/8: I = log 2 - h(1/4).
    eight = np.array([0, 0, 0, 0, 1, 1, 1, 1]), np.array([0, 0, 0, 1, 0, 1, 1, 1])
    h = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    assert cluster_information(*eight) == pytest.approx((math.log(2) - h, h))


def test_rankme_of_known_spectra() -> None:
    orthogonal = np.linalg.qr(np.random.default_rng(0).standard_normal((30, 6)))[0]
    assert rankme(orthogonal) == pytest.approx(6)
    assert rankme(orthogonal * [3, 0, 0, 0, 0, 0]) == pytest.approx(1)
    p = np.array([0.5, 0.25, 0.25, 0, 0, 0])
    assert rankme(orthogonal * p) == pytest.approx(math.exp(1.5 * math.log(2)))


def made_data(train_labels: np.ndarray, test_labels: np.ndarray) -> ImageData:
    blank = torch.zeros(1, 1, 8, 8)
    classes = tuple(map(str, range(int(train_labels.max()) + 1)))
    return ImageData(blank, train_labels, blank, test_labels, classes, np.arange(len(train_labels)), len(train_labels))


def test_accuracies_of_separable_and_of_meaningless_rows() -> None:
    g = np.random.default_rng(0)
    train, test = np.arange(300) % 3, np.arange(90) % 3
    data = made_data(train, test)
    corners = 20 * np.eye(3)
    clear = Representation(
        *((corners[ids] + g.standard_normal((len(ids), 3))).astype(np.float32) for ids in (train, test))
    )
    noise = Representation(*(g.standard_normal((len(ids), 8)).astype(np.float32) for ids in (train, test)))
    assert knn_accuracy(clear, data) == 1
    assert abs(knn_accuracy(noise, data) - 1 / 3) < 0.2
    for few in (1, 5, None):
        assert linear_accuracy(clear, data, few, 0) == 1
        assert abs(linear_accuracy(noise, data, few, 0) - 1 / 3) < 0.2


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32), (3, 9, 7), (1, 2, 2)])
def test_the_encoder_takes_any_image_size_and_does_not_mix_the_batch(shape) -> None:
    encoder = Encoder(*shape)
    images = torch.rand(5, *shape)
    features = encoder(images)
    assert features.shape == (5, encoder.features)
    images[1:] = torch.rand(4, *shape)
    torch.testing.assert_close(encoder(images)[0], features[0])
