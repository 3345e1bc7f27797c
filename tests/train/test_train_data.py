"""The trainer's data: sources, splits, clusters read off images and files, and augmentation that no batch changes."""

import hashlib
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from fastcl.train import OptionError
from fastcl.train.__main__ import main
from fastcl.train.data import attributes, augment, count_holes, fingerprint, load, read_csv_clusters, uniforms
from tests.support.training import write_csv


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

    def __init__(self, root: str, train: bool, download: bool) -> None:
        assert not download
        g = np.random.default_rng(train)
        self.classes = ["cat", "dog"]
        self.targets = [i % 2 for i in range(24 if train else 8)]
        self.data = g.integers(0, 256, (len(self.targets), 32, 32, 3), dtype=np.uint8)


@pytest.fixture
def torchvision(monkeypatch) -> None:
    readers = SimpleNamespace(CIFAR10=Photographs, CIFAR100=Photographs)
    monkeypatch.setitem(sys.modules, "torchvision", SimpleNamespace(datasets=readers))


@pytest.mark.usefixtures("torchvision")
def test_cifar(tmp_path) -> None:
    data = load("cifar10", str(tmp_path), 0)
    assert data.train_images.shape == (24, 3, 32, 32)
    assert data.test_images.shape == (8, 3, 32, 32)
    assert data.classes == ("cat", "dog")
    assert data.train_labels.tolist() == [0, 1] * 12
    assert np.array_equal(data.train_images[3].permute(1, 2, 0), Photographs("", True, False).data[3])
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


@pytest.mark.parametrize(
    ("labels", "names"),
    [("abcd", "'c', 'd'"), ([3, 1, 0, 7], "0, 7"), (range(20, 50), "24, 25, 26, 27, 28, 29, 30, 31, 32, 33, ...")],
)
def test_held_out_classes_without_training_images_are_named(labels, names, tmp_path) -> None:
    labels = np.array(list(labels))
    few = labels[: min(4, len(labels) - 2)] if len(labels) > 4 else labels[:2]
    pixels = np.zeros((len(labels), 8, 8), dtype=np.uint8)
    path = tmp_path / "few.npz"
    np.savez(path, images=pixels[: len(few)], labels=few, test_images=pixels, test_labels=labels)
    with pytest.raises(OptionError) as error:
        load(str(path), None, 0)
    assert str(error.value) == f"--data must hold training images of every held-out class; it has none of {names}"
    np.savez(path, images=pixels, labels=labels, test_images=pixels[:1], test_labels=labels[:1])
    assert len(load(str(path), None, 0).test_labels) == 1  # the other way round, nothing is wrong


def test_the_fingerprint_is_of_every_byte() -> None:
    data = load("digits", None, 0)
    digest = hashlib.sha256(repr((data.classes, data.source_size)).encode())
    for part in (
        data.train_images.numpy(),
        data.test_images.numpy(),
        data.train_labels,
        data.test_labels,
        data.source_index,
    ):
        digest.update(f"{part.dtype} {part.shape}".encode() + part.tobytes())
    assert fingerprint(data) == digest.hexdigest()  # as checkpoints have it
    strided = data.test_images.transpose(2, 3)
    assert fingerprint(replace(data, test_images=strided)) == fingerprint(
        replace(data, test_images=strided.contiguous())
    )
    data.test_images[-1, 0, 7, 7] += 1
    assert fingerprint(data) != digest.hexdigest()


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
