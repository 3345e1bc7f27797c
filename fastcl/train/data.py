"""Images in memory: where they come from, what is read off them, and their augmented views."""

import contextlib
import csv
import dataclasses
import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy import ndimage
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

from fastcl.train import Config, OptionError
from fastcl.train.glyphs import COUNT, FACTS, SIDE, glyphs
from fastcl.train.image_folder import read_image_folder
from fastcl.train.known import is_worse_labels

HELD_OUT = 0.3  # the share of a source without a test set of its own
VIEWS = 2
NAMED = 10  # classes in an error, at most
_CIFAR = "Download https://www.cs.toronto.edu/~kriz/{}.tar.gz and unpack it there: it makes the folder {}"
_ROOT = {  # what --root must hold
    "imagefolder": "It must hold a folder per class, or such folders in train and test (or val)",
    "cifar10": _CIFAR.format("cifar-10-python", "cifar-10-batches-py"),
    "cifar100": _CIFAR.format("cifar-100-python", "cifar-100-python"),
}


@dataclass(frozen=True)
class ImageData:
    """A training set and a held-out set.

    Images are ``[n, C, H, W]``, C = 1 or 3, uint8 in 0..255 or float32 in [0, 1] (see :func:`as_float`); labels are
    int64 ``[n]``, indices into ``classes``. ``source_index`` int64 ``[n]`` is each training image's place among the
    ``source_size`` images of the file or data set it was taken from, before any split. ``facts`` are ids int64 ``[n]``
    of what is known of the training images besides, by name.
    """

    train_images: Tensor
    train_labels: NDArray[np.int64]
    test_images: Tensor
    test_labels: NDArray[np.int64]
    classes: tuple[str, ...]
    source_index: NDArray[np.int64]
    source_size: int
    facts: Mapping[str, NDArray[np.int64]] = dataclasses.field(default_factory=dict)


def fingerprint(images: ImageData) -> str:
    """A hash of everything in it, by which a resumed run knows its data again."""
    pixels = [images.train_images.numpy(), images.test_images.numpy()]
    numbers = [images.train_labels, images.test_labels, images.source_index, *images.facts.values()]
    digest = hashlib.sha256(repr((images.classes, images.source_size)).encode())
    for part in (*pixels, *numbers):
        digest.update(f"{part.dtype} {part.shape}".encode())
        digest.update(np.ascontiguousarray(part).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def as_float(images: Tensor) -> Tensor:
    """Pixels as float32 in [0, 1], same shape: uint8 stays uint8 in memory and is converted by the batch."""
    return images.float() / 255 if images.dtype == torch.uint8 else images


def prepared(config: Config) -> ImageData:
    """The images that a run of this config trains on and is probed with."""
    glyphs_only = () if config.glyphs is None or config.side is None else (config.glyphs, config.side)
    images = load(config.data, config.root, config.seed, *glyphs_only)
    return images if config.long_tail is None else long_tailed(images, config.long_tail, config.seed)


def load(data: str, root: str | None, seed: int, count: int = COUNT, side: int = SIDE) -> ImageData:
    """Read ``digits``, ``cifar10``, ``cifar100``, ``imagefolder`` (the last three below ``root``) or an ``.npz`` file,
    or draw ``glyphs``, so many of ``side`` pixels.

    A source without a test set is split by ``seed``, stratified by label, 30 % held out.
    """
    if data == "digits":
        digits = load_digits()
        return _assemble((digits.images / 16.0, digits.target), None, seed)
    if data == "glyphs":
        drawn = glyphs(count, side)
        images = _assemble((drawn["images"], drawn["labels"]), None, seed)
        return dataclasses.replace(images, facts={name: drawn[name][images.source_index] for name in FACTS})
    if data.endswith(".npz"):
        return _load_npz(Path(data), seed)
    if root is None or not Path(root).is_dir():
        raise OptionError(f"--data {data} needs --root, an existing folder; got {root}. {_ROOT[data]}")
    if data == "imagefolder":
        return _assemble(*read_image_folder(Path(root)), seed)
    try:
        from torchvision import datasets
    except ImportError as error:
        raise OptionError(f'--data {data} needs torchvision: pip install "fastcl[vision]"') from error
    source = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[data]
    try:
        parts = [source(root, train=train, download=False) for train in (True, False)]
    except RuntimeError as error:  # whose words advise an option that the command line has not
        raise OptionError(f"--data {data} is not, or not whole, in --root {root}. {_ROOT[data]}") from error
    train, test = ((part.data, np.array(part.classes)[part.targets]) for part in parts)
    return _assemble(train, test, seed)


def long_tailed(images: ImageData, ratio: float, seed: int) -> ImageData:
    """Fewer training images: classes as large as a power law of their rank, the first `ratio` times the last.

    The ranks are drawn by `seed`, which images stay as well; at least one of each class. Held-out images all stay.
    """
    generator = np.random.default_rng([seed, 1])
    ranks = generator.permutation(len(images.classes)) + 1
    exponent = np.log(ratio) / np.log(max(len(images.classes), 2))
    present = np.bincount(images.train_labels, minlength=len(images.classes))
    wanted = np.maximum(1, np.rint(present[present > 0].min() * ranks**-exponent)).astype(np.int64)
    order = generator.permutation(len(images.train_labels))
    kept = np.concatenate([order[images.train_labels[order] == label][:count] for label, count in enumerate(wanted)])
    kept.sort()
    return dataclasses.replace(
        images,
        train_images=images.train_images[torch.from_numpy(kept)],
        train_labels=images.train_labels[kept],
        source_index=images.source_index[kept],
        facts={name: values[kept] for name, values in images.facts.items()},
    )


def _load_npz(path: Path, seed: int) -> ImageData:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            content = {name: arrays[name] for name in arrays.files}
    except Exception as error:  # a damaged file may raise anything on its way through zip, zlib and numpy
        raise OptionError(f"--data {path} cannot be read: {type(error).__name__}: {error}") from error
    sets: list[tuple[NDArray[Any], NDArray[Any]]] = []
    given = ("", "test_") if "test_images" in content or "test_labels" in content else ("",)
    for prefix in given:
        images, labels = (content.get(prefix + name) for name in ("images", "labels"))
        if images is None or labels is None:
            raise OptionError(
                f"--data {path} needs arrays '{prefix}images' and '{prefix}labels'; got {sorted(content)}"
            )
        size = sets[0][0].shape[1:] if sets else images.shape[1:]
        if images.shape[1:] != size or len(size) not in (2, 3) or size[2:] not in ((), (1,), (3,)):
            raise OptionError(
                f"--data {path}: '{prefix}images' must be [n, h, w] or [n, h, w, 1 or 3], test and training images of "
                f"one size; got {list(images.shape)}"
            )
        if labels.shape != images.shape[:1]:
            raise OptionError(f"--data {path}: '{prefix}labels' must be [{len(images)}]; got {list(labels.shape)}")
        if not images.size:
            raise OptionError(f"--data {path}: '{prefix}images' must hold images; got {list(images.shape)}")
        _check_range(images, f"--data {path}: '{prefix}images'")
        if np.issubdtype(labels.dtype, np.floating) and not np.isfinite(labels).all():
            raise OptionError(f"--data {path}: '{prefix}labels' must be finite; got NaN or infinity")
        sets.append((images, labels))
    return _assemble(sets[0], sets[1] if len(sets) == 2 else None, seed)


def _check_range(images: NDArray[Any], name: str) -> None:
    """uint8, or float in [0, 1]; else an error that says what came, and what makes it fit."""
    if images.dtype == np.uint8:
        return
    came, advice = str(images.dtype), ""
    if images.dtype.kind in "iuf":
        bad = ~np.isfinite(images)
        if bad.any():
            came += f" with NaN or infinity in {int(bad.reshape(len(images), -1).any(1).sum())} of {len(images)} images"
        else:
            low, high = images.min(), images.max()
            if images.dtype.kind == "f" and low >= 0 and high <= 1:
                return
            came += f" from {low:g} to {high:g}"
            if low >= 0 and 1 < high <= 255:
                advice = ": images.astype(np.uint8) fits" if images.dtype.kind in "iu" else ": images / 255 fits"
    elif images.dtype == np.bool_:
        advice = ": images.astype(np.float32) fits"
    raise OptionError(f"{name} must be uint8 or float in [0, 1]; got {came}{advice}")


def _assemble(
    train: tuple[NDArray[Any], NDArray[Any]], test: tuple[NDArray[Any], NDArray[Any]] | None, seed: int
) -> ImageData:
    """Split where there is no test set, number the labels, and put the channels where torch wants them."""
    images, labels = train
    index = np.arange(len(images))
    if test is None:
        try:
            index, held_out = train_test_split(index, test_size=HELD_OUT, random_state=seed, stratify=labels)
        except ValueError as error:  # a class with one image, or fewer images than classes
            raise OptionError(f"--data cannot be split into training and held-out images: {error}") from error
        index.sort()
        test = images[held_out], labels[held_out]
    if len(np.unique(labels[index])) < 2 or not len(test[1]):
        raise OptionError("--data must hold training images of at least two classes, and held-out images")
    classes, numbers = np.unique(np.concatenate([labels[index], test[1]]), return_inverse=True)
    unknown = np.setdiff1d(numbers[len(index) :], numbers[: len(index)])
    if len(unknown):
        names = ", ".join(map(repr, classes[unknown[:NAMED]].tolist())) + (", ..." if len(unknown) > NAMED else "")
        raise OptionError(f"--data must hold training images of every held-out class; it has none of {names}")

    def channels_first(array: NDArray[Any]) -> Tensor:
        array = array[:, None] if array.ndim == 3 else array.transpose(0, 3, 1, 2)
        return torch.from_numpy(np.ascontiguousarray(array, dtype=np.uint8 if array.dtype == np.uint8 else np.float32))

    return ImageData(
        train_images=channels_first(images[index]),
        train_labels=numbers[: len(index)],
        test_images=channels_first(test[0]),
        test_labels=numbers[len(index) :],
        classes=tuple(str(name) for name in classes),
        source_index=index,
        source_size=len(images),
    )


def check_clusters(option: str, data: str) -> None:
    """Raise what is wrong with --clusters as far as it can be known without the images."""
    if option in ("kmeans", "attributes", "tags", "labels", "sinkhorn") or is_worse_labels(option):
        return
    if set(option.split("+")) <= set(FACTS):
        if data != "glyphs":
            raise OptionError(f"--clusters {option} is known of --data glyphs only; got --data {data}")
        return
    _read_csv(option)


def _read_csv(option: str) -> tuple[str, list[str], list[list[str]], str]:
    """Path, header, rows and the chosen column of ``FILE.csv:COLUMN``."""
    match = re.fullmatch(r"(.+\.csv):(.+)", option)
    if match is None:
        known = (
            "kmeans, attributes, tags, labels, sinkhorn, labels made worse (merged2, split4 up to "
            "9999, noisy30 up to 100), facts of glyphs or FILE.csv:COLUMN"
        )
        raise OptionError(f"--clusters must be {known}; got {option}")
    path, column = match.groups()
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            header, *rows = list(csv.reader(file)) or [[]]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise OptionError(f"--clusters {path} cannot be read: {error}") from error
    if column not in header:
        raise OptionError(f"--clusters {path} has no column '{column}'; it has {header}")
    return path, header, rows, column


def read_csv_clusters(option: str, source_size: int) -> NDArray[np.int64]:
    """Cluster ids ``[source_size]`` from ``FILE.csv:COLUMN``: one row per image in the order of the file or data set
    that --data names, before the split.

    Equal values make a cluster. Blank is "no cluster", -1, and so are negative numbers in a column of integers.
    """
    path, header, rows, column = _read_csv(option)
    place = header.index(column)
    # The csv module reads a blank line as a row without cells: in a file of one column that is a blank value, but for
    # one at the end, with which some programs close a file.
    values = [row[place].strip() if place < len(row) else "" for row in rows if row or len(header) == 1]
    if len(header) == 1 and len(values) == source_size + 1 and not values[-1]:
        values.pop()
    if len(values) != source_size:
        raise OptionError(f"--clusters {path} must have one row per image, {source_size}; got {len(values)}")
    keys: list[Any] = values
    with contextlib.suppress(ValueError):  # not all are integers: compare them as they are written
        keys = [int(value) if value else "" for value in values]
    names = sorted({key for key in keys if key != "" and not (isinstance(key, int) and key < 0)})
    numbers = {key: number for number, key in enumerate(names)}
    return np.array([numbers.get(key, -1) for key in keys], dtype=np.int64)


def count_holes(image: NDArray[Any]) -> int:
    """Regions of background enclosed by ink, in one image ``[H, W]`` of bright ink on a dark ground.

    Judged at four times the resolution, so that in an 8x8 scan a hole of one pixel counts and a dent does not.
    """
    fine = ndimage.zoom(image.astype(np.float64), 4, order=1)
    background = np.pad(fine < 0.5 * fine.max(), 1, constant_values=True)  # the padding joins all that is outside
    return int(ndimage.label(background)[1]) - 1


def attributes(images: Tensor) -> NDArray[np.int64]:
    """Cluster ids ``[n]``: images whose three facts agree are a cluster."""
    combined: NDArray[np.int64] = np.ravel_multi_index(tuple(_facts(images)), (3, 3, 3)).astype(np.int64)
    return combined


def attribute_tags(images: Tensor) -> NDArray[np.bool_]:
    """Tags ``[n, 9]``: each of the three values of each fact is a tag, so that an image has three."""
    facts = np.stack(_facts(images), axis=1)
    tags: NDArray[np.bool_] = (facts[:, :, None] == np.arange(3)).reshape(len(facts), -1)
    return tags


def _facts(images: Tensor) -> list[NDArray[np.int64]]:
    """Three facts read off each image ``[n, C, H, W]``, none of them the label; each ``[n]``, 0, 1 or 2.

    One channel: number of holes (0, 1, more), ink (mean intensity), height over width of the ink's bounding box. Three
    channels: brightness, colourfulness, edge density. All but the holes are cut at their terciles.
    """
    pixels = as_float(images).numpy()
    if pixels.shape[1] == 1:
        grey = pixels[:, 0]
        inked = grey >= 0.5 * grey.max(axis=(1, 2), keepdims=True)
        height, width = (_extent(inked.any(axis=axis)) for axis in (2, 1))
        holes = np.minimum([count_holes(image) for image in grey], 2)
        return [holes, *map(_terciles, (grey.mean(axis=(1, 2)), height / width))]
    red, green, blue = pixels.transpose(1, 0, 2, 3)
    # Hasler and Suesstrunk's measure: spread and mean of the two opponent channels.
    opponents = np.stack([red - green, 0.5 * (red + green) - blue])
    spread, mean = (np.hypot(*statistic(opponents, axis=(2, 3))) for statistic in (np.std, np.mean))
    grey = pixels.mean(axis=1)
    edges = sum(np.abs(np.diff(grey, axis=axis)).mean(axis=(1, 2)) for axis in (1, 2))
    return [_terciles(fact) for fact in (grey.mean(axis=(1, 2)), spread + 0.3 * mean, edges)]


def _extent(occupied: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Length from the first to the last True of each row ``[n, length]``; every row has one."""
    length: NDArray[np.int64] = occupied.shape[1] - occupied.argmax(axis=1) - occupied[:, ::-1].argmax(axis=1)
    return length


def _terciles(fact: NDArray[Any]) -> NDArray[np.int64]:
    bins: NDArray[np.int64] = np.searchsorted(np.quantile(fact, [1 / 3, 2 / 3]), fact, side="right")
    return bins


def uniforms(seed: int, epoch: int, index: NDArray[np.int64], view: int, count: int) -> Tensor:
    """Numbers in [0, 1), float32 ``[B, count]``, a function of (seed, epoch, index[b], view) alone.

    Counter-based (splitmix64's finaliser over the key and the counter), so no sample's draw depends on its batch.
    """

    def mix(state: NDArray[np.uint64]) -> NDArray[np.uint64]:
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state ^= state >> np.uint64(31)
        return state

    golden = np.uint64(0x9E3779B97F4A7C15)
    state = np.zeros((len(index), 1), dtype=np.uint64)
    for word in (seed, epoch, index[:, None], view, np.arange(count)):
        state = mix((state + np.asarray(word).astype(np.uint64) + np.uint64(1)) * golden)
    return torch.from_numpy((state >> np.uint64(40)).astype(np.float32) * np.float32(2**-24))


def augment(images: Tensor, index: NDArray[np.int64], seed: int, epoch: int, view: int) -> Tensor:
    """One augmented view, float32 ``[B, C, H, W]``, of images ``[B, C, H, W]`` with training-set places index ``[B]``.

    Rotation, scale, shear, shift, contrast, brightness and an erased rectangle; colour images are also mirrored, tinted
    and sometimes made grey. Only sums, products and quotients of a sample's own numbers: those are rounded alike in the
    body and in the tail of a vector loop (library sines are not), so that a sample gets the same bits in any batch.
    """
    batch, channels, height, width = images.shape
    colour = channels == 3
    draws = uniforms(seed, epoch, index, view, 20).to(images.device)
    unit = draws.T.reshape(20, batch, 1, 1)  # in [0, 1)
    sign = 2 * unit - 1  # in [-1, 1)

    tangent = sign[0] * (0.09 if colour else 0.14)  # of half the angle: +-10 or +-16 degrees
    cosine, sine = (1 - tangent * tangent) / (1 + tangent * tangent), 2 * tangent / (1 + tangent * tangent)
    # How much of the image the view spans along x and y: photographs are cropped, drawings keep their outline.
    low, high = (0.45, 1.0) if colour else (0.8, 1.25)
    span = low + (high - low) * unit[1]
    span_x, span_y = span * (1 + 0.15 * sign[2]), span * (1 - 0.15 * sign[2])
    room = 1 - span if colour else torch.full_like(span, 0.2)
    if colour:
        span_x = torch.where(unit[3] < 0.5, -span_x, span_x)
    y, x = (((2 * torch.arange(n, device=images.device) + 1) / n - 1) for n in (height, width))
    x, y = x.reshape(1, 1, width) * span_x, y.reshape(1, height, 1) * span_y
    x = x + 0.2 * sign[4] * y
    grid = torch.stack([cosine * x - sine * y + room * sign[5], sine * x + cosine * y + room * sign[6]], dim=-1)
    padding = "reflection" if colour else "zeros"
    out = F.grid_sample(as_float(images), grid, mode="bilinear", padding_mode=padding, align_corners=False)

    scalar = sign.unsqueeze(2)  # [20, B, 1, 1, 1]
    if colour:
        grey = (0.299 * out[:, 0] + 0.587 * out[:, 1] + 0.114 * out[:, 2]).unsqueeze(1)
        keep = torch.where(scalar[7] < -0.6, torch.zeros_like(scalar[7]), 1 + 0.4 * scalar[8])  # grey one time in five
        tint = 1 + 0.15 * torch.stack([scalar[9], scalar[10], scalar[11]], dim=1).reshape(batch, 3, 1, 1)
        out = (grey + (out - grey) * keep) * tint
    out = (out - 0.5) * (1 + 0.4 * scalar[12]) + 0.5 + 0.2 * scalar[13] if colour else out * (1 + 0.4 * scalar[12])

    top, left = (unit[i] * n for i, n in ((14, height), (15, width)))
    bottom, right = top + (0.1 + 0.3 * unit[16]) * height, left + (0.1 + 0.3 * unit[17]) * width
    rows = torch.arange(height, device=images.device).reshape(1, height, 1)
    columns = torch.arange(width, device=images.device).reshape(1, 1, width)
    erased = (rows >= top) & (rows < bottom) & (columns >= left) & (columns < right) & (unit[18] < 0.5)
    return out.clamp(0, 1).masked_fill(erased.unsqueeze(1), 0.5 if colour else 0.0)
