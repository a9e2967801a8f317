"""raug15: two of sixteen operations per image, each with a magnitude of its own, m in 0..14 out of 10.

What is drawn is apart from what is done with it, which is done elsewhere too: on a GPU by data.raug15_batched.
The operations are Pillow's, up to a grey level of rounding. Those that Pillow does pixel by pixel in floating point are
written anew for whole arrays (torch's operations where they are faster than numpy's); the others are Pillow's own. They
are not timm's, which are all Pillow's, because the speed of the training input rests on them (docs/performance.md).
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps

NUM_OPERATIONS = 2
MAX_MAGNITUDE = 14

Pixels = np.ndarray
"""uint8 [H, W, 3]"""

Distances = TypeVar("Distances", np.ndarray, torch.Tensor)

FILL = (128, 128, 128)  # what geometric operations bring in at the border
CUTOUT = (125, 122, 113)


def _by_pillow(operation: Callable[[Image.Image], Image.Image], pixels: Pixels) -> Pixels:
    return np.array(operation(Image.fromarray(pixels)))


def _rotate(pixels: Pixels, degrees: float, kind: Image.Resampling) -> Pixels:
    return _by_pillow(lambda image: image.rotate(degrees, kind, fillcolor=FILL), pixels)


def _enhanced(enhance: type[ImageEnhance.Color | ImageEnhance.Contrast], pixels: Pixels, factor: float) -> Pixels:
    return _by_pillow(lambda image: enhance(image).enhance(factor), pixels)


def _shear_x(pixels: Pixels, slope: float, kind: Image.Resampling) -> Pixels:
    """Return an image whose (x, y) comes from input (x + slope y, y)."""
    return _shift_rows(pixels, slope * (np.arange(len(pixels)) + 0.5), kind)


def _shear_y(pixels: Pixels, slope: float, kind: Image.Resampling) -> Pixels:
    transpose = functools.partial(_by_pillow, lambda image: image.transpose(Image.Transpose.TRANSPOSE))
    return transpose(_shear_x(transpose(pixels), slope, kind))


def _translate_x(pixels: Pixels, share: float, kind: Image.Resampling) -> Pixels:
    """Return an image whose (x, y) comes from input (x + share of the width, y)."""
    return _shift_rows(pixels, np.full(len(pixels), share * pixels.shape[1]), kind)


def _translate_y(pixels: Pixels, share: float, kind: Image.Resampling) -> Pixels:
    one_row = pixels.reshape(1, len(pixels), -1)  # whose pixels are the rows
    return _shift_rows(one_row, np.array([share * len(pixels)]), kind).reshape(pixels.shape)


def _shift_rows(rows: np.ndarray, shifts: np.ndarray, kind: Image.Resampling) -> np.ndarray:
    """Return rows [N, L, C] in each of which output x comes from input x + shift, with shifts [N].

    All pixels of a row lie at the same distance from the pixel on their left, so they share their weights, and each tap
    is a stretch of the row's memory. As in Pillow, places whose centre is outside are filled, taps beyond the border
    are the border's pixel, and values are truncated.
    """
    count, length, depth = rows.shape
    left = np.floor(shifts).astype(int)
    weights = (bilinear if kind is Image.Resampling.BILINEAR else bicubic)(shifts - left)
    margin = int(np.abs(left).max()) + 3
    canvas = np.full((count, length + 2 * margin, depth), FILL[0], np.uint8)
    canvas[:, margin - 2 : margin] = rows[:, :1]
    canvas[:, margin:-margin] = rows
    canvas[:, -margin : 2 - margin] = rows[:, -1:]
    flat, stretch = torch.from_numpy(canvas).view(-1), length * depth
    stretches = flat.as_strided((flat.numel() - stretch + 1, stretch), (1, 1))
    starts = torch.from_numpy(np.arange(count) * canvas.shape[1] + margin + left)
    base = stretches.index_select(0, starts * depth).float()
    total = base
    for offset, weight in weights.items():  # as differences, so that what is even stays what it is
        tap = stretches.index_select(0, (starts + offset) * depth).float()
        total = torch.addcmul(total, tap.sub_(base), torch.from_numpy(weight).float()[:, None])
    shifted = _truncated(total.numpy())
    # The nearest places outside have met the border's pixels.
    first, end = np.ceil(-shifts - 0.5).astype(int), np.ceil(length - shifts - 0.5).astype(int)
    columns = np.stack([first - 4, first - 3, first - 2, first - 1, end, end + 1, end + 2, end + 3])
    places = (columns + np.arange(count) * length)[(columns >= 0) & (columns < length)]
    shifted.reshape(-1, depth)[places] = FILL[0]
    return shifted.reshape(rows.shape)


def bilinear(d: Distances) -> dict[int, Distances]:
    """Return the weights of pixels around a place, a distance d [N] right of a pixel, by their offset from that one."""
    return {1: d}


def bicubic(d: Distances) -> dict[int, Distances]:
    """Return the same of Pillow's cubic, whose slope parameter is -1."""
    return {-1: d * (-1 + d * (2 - d)), 1: d * (1 + d * (1 - d)), 2: d * d * (d - 1)}


def _solarize_add(pixels: Pixels, addend: int) -> Pixels:
    brighter = torch.from_numpy(pixels).clamp(max=255 - addend).numpy() + np.uint8(addend)
    return pixels + ((brighter - pixels) & -(pixels < 128).view(np.uint8))  # modulo 256


def _sharpness(pixels: Pixels, factor: float) -> Pixels:
    """Return a mixture with a smooth version: (3x3 box + 4 times the centre) / 13, the border as it is."""
    wide = pixels.astype(np.uint16)
    across = wide[:, :-2] + wide[:, 1:-1] + wide[:, 2:]
    box = across[:-2] + across[1:-1] + across[2:] + 4 * wide[1:-1, 1:-1]
    smooth = ((2 * box + 13) // 26).astype(np.float32)
    sharp = pixels.copy()
    sharp[1:-1, 1:-1] = _truncated((pixels[1:-1, 1:-1] - smooth) * np.float32(factor) + smooth)
    return sharp


def _truncated(values: np.ndarray) -> np.ndarray:
    return values.clip(0, 255, out=values).astype(np.uint8)


def _cutout(pixels: Pixels, top: int, left: int, side: int) -> Pixels:
    cut = pixels.copy()
    cut[max(0, top) : max(0, top + side), max(0, left) : max(0, left + side)] = CUTOUT
    return cut


def _factor(m: int, height: int, width: int) -> tuple[float]:
    return (1.8 * m / 10 + 0.1,)


def _signed(value: float) -> tuple[float, Image.Resampling]:
    """Return the value or its negative, and an interpolation."""
    sign = random.choice((-1, 1))
    return sign * value, random.choice((Image.Resampling.BILINEAR, Image.Resampling.BICUBIC))


def _square(side: int, height: int, width: int) -> tuple[int, int, int]:
    """Return the top and the left of a square whose centre lies in the image, and its side."""
    left = random.randrange(width) - side // 2
    return random.randrange(height) - side // 2, left, side


class Operation(NamedTuple):
    """One of the sixteen.

    Attributes:
        draw: (magnitude, height, width of the image) -> arguments, from Python's global generator.
        apply: (image, *arguments) -> image.
    """

    draw: Callable[[int, int, int], tuple[Any, ...]]
    apply: Callable[..., Pixels]


OPERATIONS: dict[str, Operation] = {
    "AutoContrast": Operation(lambda m, h, w: (), functools.partial(_by_pillow, ImageOps.autocontrast)),
    "Equalize": Operation(lambda m, h, w: (), functools.partial(_by_pillow, ImageOps.equalize)),
    "Invert": Operation(lambda m, h, w: (), lambda pixels: ~pixels),
    "Rotate": Operation(lambda m, h, w: _signed(30 * m / 10), _rotate),
    # Pillow refuses to keep 0 bits.
    "Posterize": Operation(lambda m, h, w: (0xFF00 >> (4 * m // 10) & 0xFF,), lambda pixels, mask: pixels & mask),
    # 255 - v is v ^ 255.
    "Solarize": Operation(
        lambda m, h, w: (256 * m // 10,), lambda pixels, least: pixels ^ -(pixels >= least).view(np.uint8)
    ),
    "SolarizeAdd": Operation(lambda m, h, w: (110 * m // 10,), _solarize_add),
    "Color": Operation(_factor, functools.partial(_enhanced, ImageEnhance.Color)),
    "Contrast": Operation(_factor, functools.partial(_enhanced, ImageEnhance.Contrast)),
    "Brightness": Operation(_factor, lambda pixels, factor: _truncated(pixels * np.float32(factor))),
    "Sharpness": Operation(_factor, _sharpness),
    "ShearX": Operation(lambda m, h, w: _signed(0.3 * m / 10), _shear_x),
    "ShearY": Operation(lambda m, h, w: _signed(0.3 * m / 10), _shear_y),
    "TranslateXRel": Operation(lambda m, h, w: _signed(0.45 * m / 10), _translate_x),
    "TranslateYRel": Operation(lambda m, h, w: _signed(0.45 * m / 10), _translate_y),
    "Cutout": Operation(lambda m, h, w: _square(max(2, 40 * m // 10), h, w), _cutout),
}

Drawn = tuple[str, tuple[Any, ...]]
"""An operation's name and arguments."""


def draw(height: int, width: int) -> list[Drawn]:
    """Draw operations uniformly, and their magnitudes, for an image of a size, from Python's global generator."""
    names = random.choices(tuple(OPERATIONS), k=NUM_OPERATIONS)
    return [(name, OPERATIONS[name].draw(random.randint(0, MAX_MAGNITUDE), height, width)) for name in names]


def apply(pixels: Pixels, drawn: Sequence[Drawn]) -> Pixels:
    """Return the image after the operations, one after the other."""
    for name, arguments in drawn:
        pixels = OPERATIONS[name].apply(pixels, *arguments)
    return pixels
