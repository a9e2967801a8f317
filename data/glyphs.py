"""Characters in CIFAR-100's shape without a download: 100 of them, drawn in the fonts that come with matplotlib.

A character is warped (turned, sheared, stretched, moved) and lies, in a brighter colour, over a textured background
with parts of other characters and lines; a line or a disc may lie over it; the whole is blurred and noisy. An image is
a function of its split and its index, and its class is its index modulo 100. Both splits are drawn alike, from random
numbers of their own.

Of characters that look the same when they are warped only one is among the 100: O (not o or 0), C (not c), P (not p).
"""

from __future__ import annotations

import functools
import importlib.util
import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from data import obtain
from data.decoded import ignore_stop_signals
from repopt.errors import UserError

DEFAULT = "output/glyphs"
SIZE = 32
PER_CLASS = {"train": 500, "val": 100}

# Measured on the 50,000 training images.
MEAN = (0.3866, 0.2899, 0.4577)
STD = (0.2605, 0.2357, 0.2749)

_LATIN = "ABCDEFGHJKLMNOPQRSTUVWXYZabdefghijmnqrt123456789"
CHARACTERS = _LATIN + "ΓΔΘΛΞΠΣΦΨΩβγδεζλμξσωБДЖИЦЧШЭЮЯЂЫЉЊÆŒÞØ&@$%#?§¶©£¥€‡½"
NUM_CLASSES = len(CHARACTERS)

_VERSION = "glyphs 1"
_FONTS = (
    *(f"{family}{style}" for family in ("DejaVuSans", "DejaVuSansMono", "DejaVuSerif") for style in ("", "-Bold")),
    *(f"{family}-{style}Oblique" for family in ("DejaVuSans", "DejaVuSansMono") for style in ("", "Bold")),
    *(f"DejaVuSerif-{style}Italic" for style in ("", "Bold")),
    *(f"STIXGeneral{style}" for style in ("", "Bol", "Italic", "BolIta")),
)
# Computer Modern has Latin letters and digits alone at their places in Unicode.
_LATIN_FONTS = (*_FONTS, "cmb10", "cmr10", "cmss10", "cmti10", "cmtt10")

# Lengths are in pixels of a canvas of twice the image's size.
_SIDE = 2 * SIZE
_FONT_SIZE = 48
_GLYPH_SIZES = (32, 58)  # of the longer side, before it is stretched and turned
_MAX_BRIGHTNESS = 110  # of the background, 0..255
_MIN_CONTRAST = 80  # by which a character is brighter than the background
_CHUNK = 250  # images that a worker draws at a time

Pixels = np.ndarray
Colour = tuple[int, int, int]


def fonts_of(character: str) -> tuple[str, ...]:
    """Return the fonts in which a character is drawn: names of files, without their ending."""
    return _LATIN_FONTS if character in _LATIN else _FONTS


def load(root: str, split: str) -> tuple[Tensor, Tensor]:
    """Return uint8 images [N, 3, 32, 32] and int64 labels [N] of 'train' or 'val'.

    A set that is absent from `root` (empty: `DEFAULT`) is made by the first process of each node while the others wait.

    Raises:
        UserError: the folder holds something else, another version, or a damaged file.
    """
    folder = Path(root or DEFAULT)
    obtain.once_per_node(lambda: make(folder))
    if not obtain.stands(folder, _VERSION):
        raise UserError(f"{str(folder)!r} is absent: the first process of this node could not make it")
    try:
        images = np.load(folder / f"{split}.npy")
        if (images.dtype, images.shape) != (np.uint8, (_count(split), 3, SIZE, SIZE)):
            raise ValueError("other images")
    except (OSError, EOFError, ValueError):  # what numpy raises at files that are absent, empty, cut off, or others
        damaged = f"'{split}.npy' in {str(folder)!r} is damaged: remove the folder, and it is made anew"
        raise UserError(damaged) from None
    return torch.from_numpy(images), torch.arange(len(images)) % NUM_CLASSES


def make(root: Path, workers: int | None = None) -> None:
    """Draw all images, unless they are there: `train.npy` and `val.npy`, uint8 [N, 3, 32, 32].

    The bytes are the same every time, and for any number of workers.

    Args:
        root: the folder.
        workers: processes; None: one per core, 0: this one alone.

    Raises:
        UserError: the folder holds something else or another version; matplotlib has no fonts.
    """
    count = len(os.sched_getaffinity(0)) if workers is None else workers
    obtain.make(root, _VERSION, lambda folder: _write(folder, count))


def _write(root: Path, workers: int) -> None:
    if absent := [font for font in _LATIN_FONTS if not _file_of(font).is_file()]:
        raise UserError(f"glyphs are drawn in matplotlib's fonts, and {str(_file_of(absent[0]))!r} is not there")
    with tqdm(total=sum(map(_count, PER_CLASS)), desc="drawing glyphs", unit="image", disable=None) as bar:
        for split in PER_CLASS:
            chunks: DataLoader = DataLoader(
                range(_count(split)),  # type: ignore[arg-type]  # any sequence will do
                batch_size=_CHUNK,
                collate_fn=functools.partial(_draw_all, split),
                num_workers=workers,
                worker_init_fn=ignore_stop_signals,
                generator=torch.Generator(),  # or the training's own would be drawn from
            )
            drawn = []
            for chunk in chunks:
                drawn.append(chunk.numpy())
                bar.update(len(chunk))
            np.save(root / f"{split}.npy", np.concatenate(drawn))


def _count(split: str) -> int:
    return PER_CLASS[split] * NUM_CLASSES


def _draw_all(split: str, indices: Sequence[int]) -> Tensor:
    return torch.from_numpy(np.stack([draw(split, index).transpose(2, 0, 1) for index in indices]))


def draw(split: str, index: int) -> Pixels:
    """Return an image: uint8 [32, 32, 3]."""
    rng = np.random.default_rng((list(PER_CLASS).index(split), index))
    ground, ink = _colours(rng)
    canvas = _surface(ground, rng)
    for cover in [_part] * rng.integers(0, 3) + [_line] * rng.integers(0, 3):
        canvas.paste(_colour(rng), mask=cover(rng))
    x, y = _SIDE / 2 + rng.uniform(-7, 7, 2)
    canvas.paste(_surface(ink, rng), mask=_placed(CHARACTERS[index % NUM_CLASSES], x, y, rng))
    if rng.random() < 0.5:
        canvas.paste(_colour(rng), mask=(_line, _disc)[rng.integers(2)](rng))
    image = canvas.filter(ImageFilter.GaussianBlur(rng.uniform(0, 1.5))).reduce(2)
    noise = rng.standard_normal((SIZE, SIZE, 3), np.float32) * rng.uniform(2, 16)
    return (np.asarray(image) + noise).round().clip(0, 255).astype(np.uint8)


def _colour(rng: np.random.Generator) -> Colour:
    return tuple(rng.integers(0, 256, 3).tolist())


def _colours(rng: np.random.Generator) -> tuple[Colour, Colour]:
    """Return the colours of the background and of the character."""
    while True:
        ground, ink = _colour(rng), _colour(rng)
        brightness = _brightness(ground)
        if brightness <= _MAX_BRIGHTNESS and _brightness(ink) >= brightness + _MIN_CONTRAST:
            return ground, ink


def _brightness(colour: Sequence[float]) -> float:
    red, green, blue = colour
    return 0.299 * red + 0.587 * green + 0.114 * blue


def _surface(colour: Colour, rng: np.random.Generator) -> Image.Image:
    """Return a texture between a colour and one near it."""
    other = (colour + rng.normal(0, 25, 3)).clip(0, 255).astype(int)
    surface = Image.new("RGB", (_SIDE, _SIDE), colour)
    surface.paste(tuple(other.tolist()), mask=_texture(rng))
    return surface


def _texture(rng: np.random.Generator) -> Image.Image:
    """Return a gradient, waves, a chequered pattern or clouds, of grey levels 0..255."""
    angle, count = rng.uniform(0, 2 * math.pi), rng.uniform(1, 8)
    place = np.arange(_SIDE, dtype=np.float32) / _SIDE - 0.5
    along = place * math.cos(angle) + place[:, None] * math.sin(angle)
    match rng.integers(4):
        case 0:
            share = 0.5 + along / math.sqrt(2)
        case 1:
            share = 0.5 + 0.5 * np.sin(2 * math.pi * count * along)
        case 2:
            across = place[:, None] * math.cos(angle) - place * math.sin(angle)
            share = (np.floor(count * along) + np.floor(count * across)) % 2
        case _:
            side = rng.integers(4, 17)
            coarse = Image.fromarray(rng.integers(0, 256, (side, side)).astype(np.uint8))
            return coarse.resize((_SIDE, _SIDE), Image.Resampling.BICUBIC)
    return Image.fromarray((255 * share).astype(np.uint8))


# Shapes are masks of the canvas, 0..255.


def _part(rng: np.random.Generator) -> Image.Image:
    """Return a character that reaches over the border, or lies near it."""
    angle, distance = rng.uniform(0, 2 * math.pi), rng.uniform(30, 44)
    x, y = _SIDE / 2 + distance * math.cos(angle), _SIDE / 2 + distance * math.sin(angle)
    return _placed(CHARACTERS[rng.integers(NUM_CLASSES)], x, y, rng)


def _line(rng: np.random.Generator) -> Image.Image:
    mask = Image.new("L", (_SIDE, _SIDE))
    ends = rng.uniform(-8, _SIDE + 8, 4)
    ImageDraw.Draw(mask).line(ends.tolist(), fill=255, width=int(rng.integers(1, 6)))
    return mask


def _disc(rng: np.random.Generator) -> Image.Image:
    mask = Image.new("L", (_SIDE, _SIDE))
    middle, radii = rng.uniform(8, _SIDE - 8, 2), rng.uniform(3, 9, 2)
    ImageDraw.Draw(mask).ellipse([*(middle - radii), *(middle + radii)], fill=255)
    return mask


def _placed(character: str, x: float, y: float, rng: np.random.Generator) -> Image.Image:
    """Return a character in one of its fonts, warped, with its middle at (x, y)."""
    fonts = fonts_of(character)
    glyph = _glyph(character, fonts[rng.integers(len(fonts))])
    angle, shear = math.radians(rng.uniform(-20, 20)), rng.uniform(-0.25, 0.25)
    scale, stretch = rng.uniform(*_GLYPH_SIZES) / max(glyph.size), math.exp(rng.uniform(-0.25, 0.25))
    wide, high = scale * stretch, scale / stretch
    cos, sin = math.cos(angle), math.sin(angle)
    # From the canvas to the glyph, as Pillow wants it: the inverse of turning after shearing after stretching.
    a, b = (cos + shear * sin) / wide, (sin - shear * cos) / wide
    d, e = -sin / high, cos / high
    width, height = glyph.size
    coefficients = (a, b, width / 2 - a * x - b * y, d, e, height / 2 - d * x - e * y)
    return glyph.transform((_SIDE, _SIDE), Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR)


@functools.cache
def _glyph(character: str, font: str) -> Image.Image:
    """Return a character as its font has it: its mask, cut out."""
    face = ImageFont.truetype(str(_file_of(font)), _FONT_SIZE, layout_engine=ImageFont.Layout.BASIC)
    left, top, right, bottom = map(int, face.getbbox(character))  # whole numbers already
    glyph = Image.new("L", (right - left + 2, bottom - top + 2))
    ImageDraw.Draw(glyph).text((1 - left, 1 - top), character, font=face, fill=255)
    return glyph


def _file_of(font: str) -> Path:
    return _font_folder() / f"{font}.ttf"


@functools.cache
def _font_folder() -> Path:
    """Return the folder of matplotlib's fonts; it is not imported for them."""
    found = importlib.util.find_spec("matplotlib")
    assert found is not None and found.origin is not None  # the project requires it
    return Path(found.origin).parent / "mpl-data" / "fonts" / "ttf"
