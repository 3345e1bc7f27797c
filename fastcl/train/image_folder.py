"""Images in a folder per class, as --data imagefolder reads them."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fastcl.train import OptionError

SIDE = 64  # pixels
ENDINGS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
TRAINING = ("train", "training")
HELD_OUT = ("test", "testing", "val", "valid", "validation")  # the first that is there

Labelled = tuple[NDArray[Any], NDArray[Any]]  # images uint8 [n, SIDE, SIDE, 3], names of their classes [n]


def read_image_folder(root: Path) -> tuple[Labelled, Labelled | None]:
    """The training images below `root`, and the held-out ones, where a split lies there.

    A split is a folder of class folders named as in TRAINING beside one named as in HELD_OUT. Where images lie directly
    in the folder ``train``, it is a class.
    """
    folders = {path.name.lower(): path for path in _folders(root)}
    training = next((folders[name] for name in TRAINING if name in folders), None)
    if training is None or not _folders(training):
        return _read(root), None
    if any(_is_image(path) for path in training.iterdir()):
        raise OptionError(f"--root {root}: {training} holds images and folders; it must be a class or hold the classes")
    held_out = [folders[name] for name in HELD_OUT if name in folders]
    for folder in held_out:
        if _folders(folder):
            return _read(training), _read(folder)
    if held_out:
        raise OptionError(f"--root {root}: {held_out[0]} must hold a folder per class, as {training} does")
    raise OptionError(
        f"--root {root} holds class folders in {training}, and no test or val beside it; to hold out some of the "
        f"training images: --root {training}"
    )


def _read(folder: Path) -> Labelled:
    """Every image below each class folder, in the order of their paths."""
    images, labels = [], []
    for path in _folders(folder):
        found = sorted(file for file in _below(path) if _is_image(file))
        if not found:
            raise OptionError(f"--root {folder}: the class folder {path} holds no image ({', '.join(ENDINGS)})")
        images += [_square(file) for file in found]
        labels += [path.name] * len(found)
    if not images:
        raise OptionError(f"--root {folder} holds no image folder: there must be a folder per class, with its images")
    return np.stack(images), np.array(labels)


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _below(folder: Path) -> Iterable[Path]:
    for place, _, names in os.walk(folder, followlinks=True):
        yield from (Path(place, name) for name in names)


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in ENDINGS and not path.name.startswith(".")


def _square(path: Path) -> NDArray[np.uint8]:
    """The image's middle, its shorter side made SIDE pixels long: torchvision's Resize and CenterCrop."""
    try:
        with Image.open(path) as file:
            image = file.convert("RGB")
    except Exception as error:  # a damaged file may raise anything in its decoder
        what = f"{type(error).__name__}: {error}"
        raise OptionError(f"--root: {path} cannot be read as an image: {what}") from error
    short = min(image.size)
    width, height = (SIDE if side == short else int(SIDE * side / short) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = round((width - SIDE) / 2), round((height - SIDE) / 2)
    return np.asarray(image.crop((left, top, left + SIDE, top + SIDE)))
