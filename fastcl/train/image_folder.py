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
SIXTEEN_BITS = 65535 // 255
HELD_OUT = ("test", "testing", "val", "valid", "validation")  # the first that is there

Identity = tuple[int, int]  # of a folder, by whichever path: its device and its number there
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
    classes = _folders(folder)
    owners = _owners(folder, classes)
    for path in classes:
        found = sorted(file for file in _below(path, owners) if _is_image(file))
        if not found:
            raise OptionError(f"--root {folder}: the class folder {path} holds no image ({', '.join(ENDINGS)})")
        images += [_square(file) for file in found]
        labels += [path.name] * len(found)
    if not images:
        raise OptionError(f"--root {folder} holds no image folder: there must be a folder per class, with its images")
    return np.stack(images), np.array(labels)


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _identity(folder: Path) -> Identity:
    status = folder.stat()
    return status.st_dev, status.st_ino


def _owners(root: Path, classes: list[Path]) -> dict[Identity, Path]:
    """The class of each folder that is below a class folder without a link between; `root` of those above them."""
    owners = dict.fromkeys(map(_identity, (root, *root.resolve().parents)), root)
    for path in classes:
        other = owners.setdefault(_identity(path), path)
        if other is not path:
            what = f"a folder that holds {root}" if other is root else str(other)
            raise OptionError(f"--root {root}: the class folder {path} must be one of its own; it is a link to {what}")
    for path in classes:
        for place, names, _ in os.walk(path):
            for below in (Path(place, name) for name in names):
                if not below.is_symlink():
                    owners.setdefault(_identity(below), path)
    return owners


def _below(folder: Path, owners: dict[Identity, Path]) -> Iterable[Path]:
    """The files below a class folder, each folder once. Links to what another class, or none, owns are not followed."""
    seen = {_identity(folder)}
    for place, names, files in os.walk(folder, followlinks=True):
        candidates, names[:] = sorted(names), []
        for name in candidates:
            identity = _identity(Path(place, name))
            if identity not in seen and owners.get(identity, folder) is folder:
                seen.add(identity)
                names.append(name)
        yield from (Path(place, name) for name in files)


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in ENDINGS and not path.name.startswith(".")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 bits scaled to 8; Pillow would cut its values off at 255."""
    # Some versions of Pillow read the 16 bits of PNG and PGM as mode I, which has room for 32.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        return Image.fromarray(np.rint(np.asarray(image) / SIXTEEN_BITS).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels must have 8 or 16 bits a channel; got mode {image.mode}, 32 bits of no known range")
    return image


def _square(path: Path) -> NDArray[np.uint8]:
    """The image's middle, its shorter side made SIDE pixels long: torchvision's Resize and CenterCrop."""
    try:
        with Image.open(path) as file:
            image = _eight_bits(file).convert("RGB")
    except Exception as error:  # a damaged file may raise anything in its decoder
        what = f"{type(error).__name__}: {error}"
        raise OptionError(f"--root: {path} cannot be read as an image: {what}") from error
    short = min(image.size)
    width, height = (SIDE if side == short else int(SIDE * side / short) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = round((width - SIDE) / 2), round((height - SIDE) / 2)
    return np.asarray(image.crop((left, top, left + SIDE, top + SIDE)))
