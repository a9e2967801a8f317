"""raug15: two of sixteen operations per image, each with a magnitude of its own, m in 0..14 out of 10.

The operations are Pillow's, up to a grey level of rounding. Those that Pillow does pixel by pixel in floating point are
written anew for whole arrays (torch's operations where they are faster than numpy's); the others are Pillow's own. They
are not timm's, which are all Pillow's, because the speed of the training input rests on them (docs/performance.md).
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps

NUM_OPERATIONS = 2
MAX_MAGNITUDE = 14

Pixels = np.ndarray
"""uint8 [H, W, 3]"""

_FILL = (128, 128, 128)  # what geometric operations bring in at the border
_CUTOUT = (125, 122, 113)


def _by_pillow(operation: Callable[[Image.Image], Image.Image], pixels: Pixels) -> Pixels:
    return np.array(operation(Image.fromarray(pixels)))


def _random_sign(value: float) -> float:
    return random.choice((-1, 1)) * value


def _interpolation() -> Image.Resampling:
    return random.choice((Image.Resampling.BILINEAR, Image.Resampling.BICUBIC))


def _rotate(pixels: Pixels, degrees: float) -> Pixels:
    return _by_pillow(lambda image: image.rotate(degrees, _interpolation(), fillcolor=_FILL), pixels)


def _enhanced(enhance: type[ImageEnhance.Color | ImageEnhance.Contrast], pixels: Pixels, m: int) -> Pixels:
    return _by_pillow(lambda image: enhance(image).enhance(_factor(m)), pixels)


def _factor(m: int) -> float:
    return 1.8 * m / 10 + 0.1


def _shear_x(pixels: Pixels, slope: float) -> Pixels:
    """Return an image whose (x, y) comes from input (x + slope y, y)."""
    return _shift_rows(pixels, slope * (np.arange(len(pixels)) + 0.5))


def _shear_y(pixels: Pixels, slope: float) -> Pixels:
    transpose = functools.partial(_by_pillow, lambda image: image.transpose(Image.Transpose.TRANSPOSE))
    return transpose(_shear_x(transpose(pixels), slope))


def _translate_x(pixels: Pixels, share: float) -> Pixels:
    """Return an image whose (x, y) comes from input (x + share of the width, y)."""
    return _shift_rows(pixels, np.full(len(pixels), share * pixels.shape[1]))


def _translate_y(pixels: Pixels, share: float) -> Pixels:
    one_row = pixels.reshape(1, len(pixels), -1)  # whose pixels are the rows
    return _shift_rows(one_row, np.array([share * len(pixels)])).reshape(pixels.shape)


def _shift_rows(rows: np.ndarray, shifts: np.ndarray) -> np.ndarray:
    """Return rows [N, L, C] in each of which output x comes from input x + shift, with shifts [N].

    All pixels of a row lie at the same distance from the pixel on their left, so they share their weights, and each tap
    is a stretch of the row's memory. As in Pillow, places whose centre is outside are filled, taps beyond the border
    are the border's pixel, and values are truncated.
    """
    count, length, depth = rows.shape
    left = np.floor(shifts).astype(int)
    weights = (_bilinear if _interpolation() is Image.Resampling.BILINEAR else _bicubic)(shifts - left)
    margin = int(np.abs(left).max()) + 3
    canvas = np.full((count, length + 2 * margin, depth), _FILL[0], np.uint8)
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
    shifted.reshape(-1, depth)[places] = _FILL[0]
    return shifted.reshape(rows.shape)


def _bilinear(d: np.ndarray) -> dict[int, np.ndarray]:
    """Return the weights of pixels around a place, a distance d [N] right of a pixel, by their offset from that one."""
    return {1: d}


def _bicubic(d: np.ndarray) -> dict[int, np.ndarray]:
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


def _cutout(pixels: Pixels, side: int) -> Pixels:
    height, width, _ = pixels.shape
    left = random.randrange(width) - side // 2
    top = random.randrange(height) - side // 2
    cut = pixels.copy()
    cut[max(0, top) : max(0, top + side), max(0, left) : max(0, left + side)] = _CUTOUT
    return cut


OPERATIONS: dict[str, Callable[[Pixels, int], Pixels]] = {
    "AutoContrast": lambda pixels, m: _by_pillow(ImageOps.autocontrast, pixels),
    "Equalize": lambda pixels, m: _by_pillow(ImageOps.equalize, pixels),
    "Invert": lambda pixels, m: ~pixels,
    "Rotate": lambda pixels, m: _rotate(pixels, _random_sign(30 * m / 10)),
    "Posterize": lambda pixels, m: pixels & (0xFF00 >> (4 * m // 10) & 0xFF),  # Pillow refuses to keep 0 bits
    "Solarize": lambda pixels, m: pixels ^ -(pixels >= 256 * m // 10).view(np.uint8),  # 255 - v is v ^ 255
    "SolarizeAdd": lambda pixels, m: _solarize_add(pixels, 110 * m // 10),
    "Color": functools.partial(_enhanced, ImageEnhance.Color),
    "Contrast": functools.partial(_enhanced, ImageEnhance.Contrast),
    "Brightness": lambda pixels, m: _truncated(pixels * np.float32(_factor(m))),
    "Sharpness": lambda pixels, m: _sharpness(pixels, _factor(m)),
    "ShearX": lambda pixels, m: _shear_x(pixels, _random_sign(0.3 * m / 10)),
    "ShearY": lambda pixels, m: _shear_y(pixels, _random_sign(0.3 * m / 10)),
    "TranslateXRel": lambda pixels, m: _translate_x(pixels, _random_sign(0.45 * m / 10)),
    "TranslateYRel": lambda pixels, m: _translate_y(pixels, _random_sign(0.45 * m / 10)),
    "Cutout": lambda pixels, m: _cutout(pixels, max(2, 40 * m // 10)),
}


def raug15(pixels: Pixels) -> Pixels:
    """Return the image after two operations drawn uniformly, from Python's global generator."""
    for operation in random.choices(tuple(OPERATIONS.values()), k=NUM_OPERATIONS):
        pixels = operation(pixels, random.randint(0, MAX_MAGNITUDE))
    return pixels
