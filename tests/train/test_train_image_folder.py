"""--data imagefolder: classes, splits, and files that are no images."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastcl.train import OptionError
from fastcl.train.data import load
from fastcl.train.image_folder import SIDE, read_image_folder


def paint(folder: Path, count: int, shade: int, size: tuple[int, int] = (80, 70)) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        Image.new("RGB", size, (shade, number, 0)).save(folder / f"{number}.png")


@pytest.mark.parametrize("held_out", ["test", "val", "Valid", "validation"])
@pytest.mark.parametrize("training", ["train", "Training"])
def test_a_split_is_read_as_one(tmp_path, training, held_out) -> None:
    paint(tmp_path / training / "cat", 4, 10)
    paint(tmp_path / training / "dog", 3, 20)
    paint(tmp_path / held_out / "cat", 2, 30)
    paint(tmp_path / held_out / "dog", 1, 40)
    data = load("imagefolder", str(tmp_path), 0)
    assert data.classes == ("cat", "dog")
    assert data.train_labels.tolist() == [0] * 4 + [1] * 3
    assert data.test_labels.tolist() == [0, 0, 1]
    assert data.train_images.shape == (7, 3, SIDE, SIDE)
    assert data.train_images[:, 0, 0, 0].tolist() == [10] * 4 + [20] * 3
    assert data.test_images[:, 0, 0, 0].tolist() == [30, 30, 40]


def test_of_test_and_val_the_first_with_classes_is_held_out(tmp_path) -> None:
    for name, count in (("train", 4), ("val", 2), ("test", 3)):
        for kind in "ab":
            paint(tmp_path / name / kind, count, 0)
    assert len(load("imagefolder", str(tmp_path), 0).test_labels) == 6
    for kind in "ab":
        for path in (tmp_path / "test" / kind).iterdir():
            path.rename(tmp_path / "test" / f"{kind}{path.name}")  # without labels, as some data sets have it
        (tmp_path / "test" / kind).rmdir()
    assert len(load("imagefolder", str(tmp_path), 0).test_labels) == 4


def test_folders_of_images_are_classes_whatever_their_names(tmp_path) -> None:
    paint(tmp_path / "train", 5, 0)
    paint(tmp_path / "val", 5, 0)
    paint(tmp_path / "car" / "red", 5, 0)
    (tmp_path / ".ipynb_checkpoints").mkdir()
    assert load("imagefolder", str(tmp_path), 0).classes == ("car", "train", "val")


def test_half_a_split_is_refused(tmp_path) -> None:
    paint(tmp_path / "train" / "cat", 4, 0)
    paint(tmp_path / "train" / "dog", 4, 0)
    paint(tmp_path / "other", 1, 0)
    with pytest.raises(OptionError, match=r"no test or val beside it; to hold out .*: --root .*/train$"):
        read_image_folder(tmp_path)
    assert len(load("imagefolder", str(tmp_path / "train"), 0).test_labels) == 3
    paint(tmp_path / "val", 2, 0)
    with pytest.raises(OptionError, match=r"val must hold a folder per class, as .*train does"):
        read_image_folder(tmp_path)
    paint(tmp_path / "train", 1, 0)
    with pytest.raises(OptionError, match="holds images and folders"):
        read_image_folder(tmp_path)


def test_empty_folders_are_named(tmp_path) -> None:
    with pytest.raises(OptionError, match="holds no image folder"):
        load("imagefolder", str(tmp_path), 0)
    paint(tmp_path / "cat", 4, 0)
    (tmp_path / "dog").mkdir()
    (tmp_path / "dog" / "note.txt").touch()
    with pytest.raises(OptionError, match=r"the class folder .*/dog holds no image \(\.jpg"):
        load("imagefolder", str(tmp_path), 0)


def test_links_repeat_no_image_and_mix_no_classes(tmp_path) -> None:
    root, outside = tmp_path / "data", tmp_path / "elsewhere"
    paint(root / "cat" / "tabby", 4, 10)
    paint(root / "dog" / "brown", 3, 20)
    paint(outside / "more", 2, 30)
    (outside / "more" / "loop").symlink_to(outside)
    (root / "cat" / "tabby" / "loop").symlink_to(root / "cat")
    (root / "cat" / "twice").symlink_to(root / "cat" / "tabby")
    (root / "cat" / "up").symlink_to("..")
    (root / "cat" / "above").symlink_to(tmp_path)
    (root / "cat" / "a dog").symlink_to(root / "dog" / "brown")
    (root / "dog" / "a cat").symlink_to(root / "cat")
    (root / "dog" / "more").symlink_to(outside / "more")
    (root / "fish").symlink_to(outside)  # a class, which owns what is in it
    (images, labels), _ = read_image_folder(root)
    assert labels.tolist() == ["cat"] * 4 + ["dog"] * 3 + ["fish"] * 2
    assert images[:, 0, 0, 0].tolist() == [10] * 4 + [20] * 3 + [30] * 2
    (root / "fish").unlink()
    assert read_image_folder(root)[0][1].tolist() == ["cat"] * 4 + ["dog"] * 5
    for target, message in ((root / "cat", "a link to .*/data/cat$"), (tmp_path, "a link to a folder that holds")):
        (root / "hound").symlink_to(target)
        with pytest.raises(OptionError, match=rf"the class folder .*/hound must be one of its own; it is {message}"):
            read_image_folder(root)
        (root / "hound").unlink()


def test_grey_of_16_bits_is_scaled_and_of_32_is_refused(tmp_path) -> None:
    (tmp_path / "a").mkdir()
    grey = np.full((SIDE, SIDE), 514, dtype=np.uint16)
    grey[:, 32:] = 65535
    for name in ("a.png", "b.tif", "c.pgm"):
        Image.fromarray(grey).save(tmp_path / "a" / name)
    Image.fromarray(grey.astype(">u2")).save(tmp_path / "a" / "d.tif")
    (images, _), _ = read_image_folder(tmp_path)
    assert images.shape[0] == 4
    assert (images[:, :, :32] == 2).all()
    assert (images[:, :, 32:] == 255).all()
    for kind, mode in ((np.int32, "I"), (np.float32, "F")):
        Image.fromarray(grey.astype(kind)).save(tmp_path / "a" / "e.tif")
        with pytest.raises(OptionError, match=f"e.tif cannot be read .* 8 or 16 bits a channel; got mode {mode}, 32 "):
            read_image_folder(tmp_path)


@pytest.mark.parametrize("damage", ["empty", "text", "cut", "flipped"])
@pytest.mark.parametrize("ending", ["png", "jpg"])
def test_a_damaged_image_is_named(tmp_path, damage, ending) -> None:
    g = np.random.default_rng(0)
    for kind in "ab":
        (tmp_path / kind).mkdir()
        for number in range(3):
            pixels = g.integers(0, 256, (80, 80, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / kind / f"{number}.{ending}")
    path = tmp_path / "b" / f"1.{ending}"
    data = path.read_bytes()
    flipped = bytes(byte ^ 255 for byte in data[10:40])
    damaged = {
        "empty": b"",
        "text": b"<html>",
        "cut": data[: len(data) // 2],
        "flipped": data[:10] + flipped + data[40:],
    }
    path.write_bytes(damaged[damage])
    with pytest.raises(OptionError, match=f"{path} cannot be read as an image: "):
        load("imagefolder", str(tmp_path), 0)


def test_images_are_scaled_and_cut_to_their_middle(tmp_path) -> None:
    """As torchvision's Resize and CenterCrop do it: shorter side to 64, bilinear with antialiasing."""
    (tmp_path / "a").mkdir()
    stripes = np.zeros((128, 256, 3), dtype=np.uint8)
    stripes[:, 64:192] = 200
    Image.fromarray(stripes).save(tmp_path / "a" / "wide.png")
    Image.fromarray(stripes.transpose(1, 0, 2)).convert("L").save(tmp_path / "a" / "high.png")
    Image.fromarray(stripes[:, 64:192]).convert("RGBA").save(tmp_path / "a" / "square.png")
    (images, labels), held_out = read_image_folder(tmp_path)
    assert held_out is None
    assert labels.tolist() == ["a"] * 3
    assert images.shape == (3, SIDE, SIDE, 3)
    assert images.dtype == np.uint8
    assert (images[:, 2:-2, 2:-2] == 200).all()
