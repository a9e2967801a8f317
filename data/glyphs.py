"""Characters in CIFAR-100's shape without a download: 100 of them, drawn in the fonts that come with matplotlib.

A character is warped (turned, sheared, stretched, moved) and lies over a textured background with lines and parts of
other characters; lines, discs and more parts lie over it; the whole is blurred and noisy. An image is a function of its
split and its index, and its class is its index modulo 100. Both splits are drawn alike, from streams of their own.

Characters that a warp makes the same are not both among the 100 (o and O, c and C, p and P, I and l, N and its mirror
image are not turned into each other).
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
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from data import generated
from data.decoded import heed_only_the_loader
from data.download import once_per_node
from repopt.errors import UserError

DEFAULT = "output/glyphs"
SIZE = 32
PER_CLASS = {"train": 500, "val": 100}

# Measured on the 50,000 training images.
MEAN = (0.5, 0.5, 0.5)
STD = (0.25, 0.25, 0.25)

_LATIN = "ABCDEFGHJKLMNOPQRSTUVWXYZabdefghijmnqrt123456789"
_OTHERS = "ΓΔΘΛΞΠΣΦΨΩβγδεζλμξσωБДЖИЦЧШЭЮЯЂЫЉЊÆŒÞØ&@$%#?§¶©£¥€‡½"
CHARACTERS = _LATIN + _OTHERS
NUM_CLASSES = len(CHARACTERS)

_VERSION = "glyphs 1"
_FAMILIES = {"DejaVuSans": "Oblique", "DejaVuSansMono": "Oblique", "DejaVuSerif": "Italic"}
_FONTS = (
    *(f"{family}{style}" for family, slanted in _FAMILIES.items() for style in ("", "-Bold", f"-{slanted}", f"-Bold{slanted}")),
    *(f"STIXGeneral{style}" for style in ("", "Bol", "Italic", "BolIta")),
)
_LATIN_FONTS = ("cmb10", "cmr10", "cmss10", "cmti10", "cmtt10")  # whose other characters are not where Unicode has them

_SIDE = 2 * SIZE  # of the canvas, in pixels; positions and lengths below are in its pixels
_FONT_SIZE = 48
_LEAST_CONTRAST = 45  # in brightness, of the character with what it lies over
_TEXTURE_CONTRAST = 45
_CHUNK = 250  # images that a worker draws at a time

Pixels = np.ndarray
Colour = tuple[int, int, int]


def fonts_of(character: str) -> tuple[str, ...]:
    """Names of the font files in which a character is drawn."""
    return _FONTS + _LATIN_FONTS if character in _LATIN else _FONTS


def load(root: str, split: str) -> tuple[Tensor, Tensor]:
    """uint8 images [N, 3, 32, 32] and int64 labels [N] of 'train' or 'val'.

    A set that is absent from `root` (empty: `DEFAULT`) is made by the first process of each node while the others wait.

    Raises:
        UserError: the folder holds something else, another version, or a damaged file.
    """
    folder = Path(root or DEFAULT)
    once_per_node(lambda: make(folder))
    file = folder / f"{split}.npy"
    try:
        if not generated.stands(folder, _VERSION):
            raise UserError(f"{_VERSION} could not be made in {str(folder)!r}")
        images = np.load(file)
        if images.dtype != np.uint8 or images.shape != (PER_CLASS[split] * NUM_CLASSES, 3, SIZE, SIZE):
            raise ValueError
    except (OSError, EOFError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{str(file)!r} is damaged: remove {str(folder)!r}, and it is made anew") from None
    return torch.from_numpy(images), torch.arange(len(images)) % NUM_CLASSES


def make(root: Path, workers: int | None = None) -> None:
    """Draw all images, unless they are there; the bytes are the same every time and for any number of workers.

    Args:
        root: of `train.npy` and `val.npy`, uint8 [N, 3, 32, 32].
        workers: processes; None: one per core, 0: this one alone.

    Raises:
        UserError: the folder holds something else, or another version.
    """
    count = len(os.sched_getaffinity(0)) if workers is None else workers
    generated.make(root, _VERSION, lambda folder: _write(folder, count))


def _write(root: Path, workers: int) -> None:
    with tqdm(total=sum(PER_CLASS.values()) * NUM_CLASSES, desc="drawing glyphs", unit="image", disable=None) as bar:
        for split, per_class in PER_CLASS.items():
            images = np.empty((per_class * NUM_CLASSES, 3, SIZE, SIZE), np.uint8)
            done = 0
            loader = DataLoader(
                _Chunks(split), batch_size=None, num_workers=workers, worker_init_fn=heed_only_the_loader
            )
            for chunk in loader:
                images[done : done + len(chunk)] = chunk
                done += len(chunk)
                bar.update(len(chunk))
            np.save(root / f"{split}.npy", images)


class _Chunks(Dataset):
    """The images of a split, some at a time: uint8 [at most _CHUNK, 3, 32, 32]."""

    def __init__(self, split: str) -> None:
        self._split, self._total = split, PER_CLASS[split] * NUM_CLASSES

    def __len__(self) -> int:
        return math.ceil(self._total / _CHUNK)

    def __getitem__(self, chunk: int) -> Pixels:
        if chunk >= len(self):
            raise IndexError(chunk)
        indices = range(_CHUNK * chunk, min(_CHUNK * (chunk + 1), self._total))
        return np.stack([draw(self._split, index).transpose(2, 0, 1) for index in indices])


def draw(split: str, index: int) -> Pixels:
    """The image of an index: uint8 [32, 32, 3]."""
    rng = np.random.default_rng((list(PER_CLASS).index(split), index))
    canvas = _surface(_colour(rng), rng)
    below = _brightness(np.asarray(canvas).mean((0, 1)))
    for cover in [_part] * rng.integers(1, 4) + [_line] * rng.integers(0, 3):
        canvas.paste(_colour(rng), mask=cover(rng))
    ink = _colour(rng)
    while abs(_brightness(ink) - below) < _LEAST_CONTRAST:
        ink = _colour(rng)
    centre = _SIDE / 2 + rng.uniform(-10, 10, 2)
    canvas.paste(_surface(ink, rng), mask=_placed(CHARACTERS[index % NUM_CLASSES], centre, rng))
    for _ in range(rng.integers(0, 3)):
        canvas.paste(_colour(rng), mask=(_line, _disc)[rng.integers(2)](rng))
    small = canvas.filter(ImageFilter.GaussianBlur(rng.uniform(0, 2))).reduce(2)
    noise = rng.standard_normal((SIZE, SIZE, 3), np.float32) * rng.uniform(4, 28)
    return (np.asarray(small) + noise).round().clip(0, 255).astype(np.uint8)


def _colour(rng: np.random.Generator) -> Colour:
    return tuple(rng.integers(0, 256, 3).tolist())


def _brightness(colour: Sequence[float]) -> float:
    red, green, blue = colour
    return 0.299 * red + 0.587 * green + 0.114 * blue


def _surface(colour: Colour, rng: np.random.Generator) -> Image.Image:
    """A texture between a colour and one near it."""
    other = (colour + rng.normal(0, _TEXTURE_CONTRAST, 3)).clip(0, 255).astype(int)
    surface = Image.new("RGB", (_SIDE, _SIDE), colour)
    surface.paste(tuple(other.tolist()), mask=_texture(rng))
    return surface


def _texture(rng: np.random.Generator) -> Image.Image:
    """A gradient, waves, a chequered pattern or clouds, of grey levels 0..255."""
    kind = rng.integers(4)
    if kind == 3:
        side = int(rng.integers(4, 17))
        coarse = rng.integers(0, 256, (side, side)).astype(np.uint8)
        return Image.fromarray(coarse).resize((_SIDE, _SIDE), Image.Resampling.BICUBIC)
    angle, count = rng.uniform(0, 2 * math.pi), rng.uniform(1, 8)
    place = np.arange(_SIDE, dtype=np.float32) / _SIDE - 0.5
    x, y = place, place[:, None]
    along = x * math.cos(angle) + y * math.sin(angle)
    match kind:
        case 0:
            share = 0.5 + along / math.sqrt(2)
        case 1:
            share = 0.5 + 0.5 * np.sin(2 * math.pi * count * along)
        case _:
            across = y * math.cos(angle) - x * math.sin(angle)
            share = (np.floor(count * along) + np.floor(count * across)) % 2
    return Image.fromarray((255 * share).astype(np.uint8))


def _part(rng: np.random.Generator) -> Image.Image:
    """A character that begins at the border and is mostly outside."""
    angle, distance = rng.uniform(0, 2 * math.pi), rng.uniform(30, 44)
    centre = _SIDE / 2 + distance * np.array([math.cos(angle), math.sin(angle)])
    return _placed(CHARACTERS[rng.integers(NUM_CLASSES)], centre, rng)


def _line(rng: np.random.Generator) -> Image.Image:
    mask = Image.new("L", (_SIDE, _SIDE))
    ends = rng.uniform(-8, _SIDE + 8, 4)
    ImageDraw.Draw(mask).line(ends.tolist(), fill=255, width=int(rng.integers(1, 6)))
    return mask


def _disc(rng: np.random.Generator) -> Image.Image:
    mask = Image.new("L", (_SIDE, _SIDE))
    x, y = rng.uniform(8, _SIDE - 8, 2)
    width, height = rng.uniform(3, 9, 2)
    ImageDraw.Draw(mask).ellipse([x - width, y - height, x + width, y + height], fill=255)
    return mask


def _placed(character: str, centre: Pixels, rng: np.random.Generator) -> Image.Image:
    """The opacity of a character in one of its fonts, warped."""
    fonts = fonts_of(character)
    mask = _opacity(character, fonts[rng.integers(len(fonts))])
    angle, shear, stretch = math.radians(rng.uniform(-25, 25)), rng.uniform(-0.35, 0.35), math.exp(rng.uniform(-0.25, 0.25))
    scale = rng.uniform(28, 54) / max(mask.size)
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    warp = turn @ [[1, shear], [0, 1]] @ np.diag([scale * stretch, scale / stretch])
    back = np.linalg.inv(warp)
    offset = np.array(mask.size) / 2 - back @ centre
    coefficients = np.column_stack([back, offset]).ravel().tolist()
    return mask.transform((_SIDE, _SIDE), Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR)


@functools.cache
def _opacity(character, font):
    """The opacity of a character, cut out."""
    face = ImageFont.truetype(str(_font_folder() / f"{font}.ttf"), _FONT_SIZE, layout_engine=ImageFont.Layout.BASIC)
    left, top, right, bottom = face.getbbox(character)
    image = Image.new("L", (right - left + 2, bottom - top + 2))
    ImageDraw.Draw(image).text((1 - left, 1 - top), character, font=face, fill=255)
    return image


@functools.cache
def _font_folder() -> Path:
    (package,) = importlib.util.find_spec("matplotlib").submodule_search_locations
    return Path(package, "mpl-data", "fonts", "ttf")
