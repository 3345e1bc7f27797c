"""Letters and digits drawn from the fonts that matplotlib ships: as many images as wanted, with facts about each."""

import contextlib
import io
import os
import string
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from fastcl.train import OptionError

COUNT, SIDE = 6200, 28  # images, pixels high and wide, unless the options say otherwise
CHARACTERS = string.digits + string.ascii_uppercase + string.ascii_lowercase
RECIPE = 1  # of the drawing; a change of it is another number, and old files in the cache are no longer read
LARGE = 96  # pixels of a font in which no hole is too small to be seen
FINE = 2  # pixels are drawn for one of the image, in height and in width
FACES = {  # file -> family, bold, slanted
    **{f"DejaVu{family.replace(' ', '')}{style}": (f"DejaVu {family}", "Bold" in style, slanted in style)
       for family, slanted in (("Sans", "Oblique"), ("Sans Mono", "Oblique"), ("Serif", "Italic"))
       for style in ("", "-Bold", f"-{slanted}", f"-Bold{slanted}")},
    "STIXGeneral": ("STIX", False, False), "STIXGeneralBol": ("STIX", True, False),
    "STIXGeneralItalic": ("STIX", False, True), "STIXGeneralBolIta": ("STIX", True, True),
    "cmr10": ("Computer Modern", False, False), "cmb10": ("Computer Modern", True, False),
    "cmss10": ("Computer Modern Sans", False, False), "cmtt10": ("Computer Modern Typewriter", False, False),
}  # fmt: skip
# Of the printed character, as a hand draws it: lines, arcs and dots.
STROKES = {
    1: "01236789CIJLOSUcelos", 2: "45BDGPQTVXabdfghijnpqrtuvxy", 3: "AFHKNRYZkmz", 4: "EMWw"
}  # fmt: skip
FACTS = ("family", "weight", "slant", "case", "holes", "strokes")
OF_CHARACTERS = ("case", "holes", "strokes")  # the facts that tell which character it is; the others tell of the face

Arrays = dict[str, NDArray[Any]]


def glyphs(count: int, side: int) -> Arrays:
    """Images uint8 ``[count, side, side]``, labels ``[count]``, and each of FACTS, ids int64 ``[count]``.

    From the cache, where they have been drawn before.
    """
    path = cache() / f"glyphs-{count}-{side}-{RECIPE}.npz"
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as stored:
            found = {name: stored[name] for name in ("images", "labels", *FACTS)}
        if found["images"].shape == (count, side, side):
            return found
    except Exception:  # not there, or damaged, which may raise anything on its way through zip, zlib and numpy
        pass
    drawn = draw(count, side)
    with contextlib.suppress(OSError):  # where it cannot be kept, it is drawn again
        _keep(path, drawn)
    return drawn


def cache() -> Path:
    """$FASTCL_CACHE, else the folder ``fastcl`` among the user's caches."""
    own = os.environ.get("FASTCL_CACHE")
    return Path(own).expanduser() if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "fastcl")


def _keep(path: Path, drawn: Arrays) -> None:
    """All or nothing, also where several processes draw at once: each has a file of its own until it is whole."""
    content = io.BytesIO()
    np.savez_compressed(content, allow_pickle=False, **drawn)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")  # others may read the file; mkstemp's could not be read
    try:
        part.write_bytes(content.getbuffer())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def draw(count: int, side: int) -> Arrays:
    """What :func:`glyphs` returns, the same at each call: characters in turn, the rest drawn at random."""
    generator = np.random.default_rng(0)
    fonts, large = ([_font(file, size) for file in FACES] for size in (FINE * side, LARGE))
    strokes = {character: number for number, members in STROKES.items() for character in members}
    families = sorted({family for family, _, _ in FACES.values()})
    known: dict[tuple[int, str], tuple[int, ...]] = {}
    images, facts = np.empty((count, side, side), dtype=np.uint8), np.empty((count, len(FACTS)), dtype=np.int64)
    labels = np.array([CHARACTERS[number % len(CHARACTERS)] for number in range(count)])
    for number, character in enumerate(labels):
        face = int(generator.integers(len(FACES)))
        if (face, character) not in known:
            family, bold, slanted = list(FACES.values())[face]
            case = 0 if character in string.digits else 1 if character in string.ascii_uppercase else 2
            about = (families.index(family), bold, slanted, case, _holes(large[face], character), strokes[character])
            known[face, character] = tuple(map(int, about))
        facts[number] = known[face, character]
        images[number] = _image(fonts[face], character, side, generator)
    return {"images": images, "labels": labels, **dict(zip(FACTS, facts.T, strict=True))}


def _font(file: str, size: int) -> Any:
    path = Path(matplotlib.get_data_path(), "fonts", "ttf", f"{file}.ttf")
    try:  # from memory: where a path leads nowhere, Pillow takes a file of the same name from the system's fonts
        return ImageFont.truetype(io.BytesIO(path.read_bytes()), size, layout_engine=ImageFont.Layout.BASIC)
    except OSError as error:
        raise OptionError(f"--data glyphs needs the fonts that matplotlib ships; {path}: {error}") from error


def _holes(font: Any, character: str) -> int:
    size = 2 * LARGE
    sheet = Image.new("L", (size, size))
    ImageDraw.Draw(sheet).text((size // 2, size // 2), character, fill=255, font=font, anchor="mm")
    regions = np.bincount(ndimage.label(np.asarray(sheet) < 128)[0].ravel())[2:]  # without ink and surroundings
    return int((regions > 20).sum())  # a sharp corner may enclose some pixels


def _image(font: Any, character: str, side: int, generator: np.random.Generator) -> NDArray[np.uint8]:
    """The character in the middle of a line of text, turned, stretched, slanted and shifted a little, under noise."""
    size = 2 * FINE * side
    sheet = Image.new("L", (size, size))
    pen, middle, baseline = ImageDraw.Draw(sheet), size / 2, size / 2 + 0.36 * font.size
    half = font.getlength(character) / 2
    pen.text((middle, baseline), character, fill=255, font=font, anchor="ms")
    before, after = (CHARACTERS[place] for place in generator.integers(len(CHARACTERS), size=2))
    shown = generator.random(2) < 0.3  # neighbours are not always there
    for neighbour, there, place, anchor in ((before, shown[0], -half, "rs"), (after, shown[1], half, "ls")):
        if there:
            pen.text((middle + place, baseline), neighbour, fill=255, font=font, anchor=anchor)

    turn, shear, aspect, right, down = generator.uniform(-1, 1, size=5)
    zoom, strength, noise = generator.uniform((0.85, 0.55, 0.0), (1.2, 1.0, 0.12))
    cosine, sine = np.cos(0.25 * turn), np.sin(0.25 * turn)
    # From places in the image to places on the sheet, both measured from their middles.
    matrix = np.array([[cosine, -sine], [sine, cosine]]) @ np.array([[1, 0.25 * shear], [0, 1]])
    matrix = matrix @ np.diag([1 + 0.15 * aspect, 1 - 0.15 * aspect]) / zoom
    offset = middle - matrix @ np.array([FINE * side / 2 * (1 + 0.2 * right), FINE * side / 2 * (1 + 0.2 * down)])
    places = (*matrix[0], offset[0], *matrix[1], offset[1])
    moved = sheet.transform((FINE * side, FINE * side), Image.Transform.AFFINE, places, Image.Resampling.BILINEAR)
    ink = strength * np.asarray(moved.reduce(FINE)) + 255 * noise * generator.standard_normal((side, side))
    pixels: NDArray[np.uint8] = np.clip(np.rint(ink), 0, 255).astype(np.uint8)
    return pixels
