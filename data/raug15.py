"""raug15: two of sixteen operations per image, each with a magnitude of its own, m in 0..14 out of 10."""

from __future__ import annotations

import random
from collections.abc import Callable

from PIL import Image, ImageEnhance, ImageOps

NUM_OPERATIONS = 2
MAX_MAGNITUDE = 14

_FILL = (128, 128, 128)  # what geometric operations bring in at the border
_CUTOUT = (125, 122, 113)


def _either_sign(value: float) -> float:
    return random.choice((-1, 1)) * value


def _interpolation() -> Image.Resampling:
    return random.choice((Image.Resampling.BILINEAR, Image.Resampling.BICUBIC))


def _affine(image: Image.Image, *coefficients: float) -> Image.Image:
    """Output pixel (x, y) comes from input (a x + b y + c, d x + e y + f)."""
    return image.transform(image.size, Image.Transform.AFFINE, coefficients, _interpolation(), fillcolor=_FILL)


def _rotate(image: Image.Image, degrees: float) -> Image.Image:
    return image.rotate(degrees, _interpolation(), fillcolor=_FILL)


def _posterize(image: Image.Image, bits: int) -> Image.Image:
    # Pillow refuses 0 bits; nothing left of each value is black.
    return ImageOps.posterize(image, bits) if bits else Image.new(image.mode, image.size)


def _solarize_add(image: Image.Image, addend: int) -> Image.Image:
    return image.point([min(255, v + addend) if v < 128 else v for v in range(256)] * 3)


def _cutout(image: Image.Image, side: int) -> Image.Image:
    left = random.randrange(image.width) - side // 2
    top = random.randrange(image.height) - side // 2
    image = image.copy()
    image.paste(_CUTOUT, (left, top, left + side, top + side))
    return image


def _enhancement(m: int) -> float:
    return 1.8 * m / 10 + 0.1


OPERATIONS: dict[str, Callable[[Image.Image, int], Image.Image]] = {
    "AutoContrast": lambda image, m: ImageOps.autocontrast(image),
    "Equalize": lambda image, m: ImageOps.equalize(image),
    "Invert": lambda image, m: ImageOps.invert(image),
    "Rotate": lambda image, m: _rotate(image, _either_sign(30 * m / 10)),
    "Posterize": lambda image, m: _posterize(image, 4 * m // 10),
    "Solarize": lambda image, m: ImageOps.solarize(image, 256 * m // 10),
    "SolarizeAdd": lambda image, m: _solarize_add(image, 110 * m // 10),
    "Color": lambda image, m: ImageEnhance.Color(image).enhance(_enhancement(m)),
    "Contrast": lambda image, m: ImageEnhance.Contrast(image).enhance(_enhancement(m)),
    "Brightness": lambda image, m: ImageEnhance.Brightness(image).enhance(_enhancement(m)),
    "Sharpness": lambda image, m: ImageEnhance.Sharpness(image).enhance(_enhancement(m)),
    "ShearX": lambda image, m: _affine(image, 1, _either_sign(0.3 * m / 10), 0, 0, 1, 0),
    "ShearY": lambda image, m: _affine(image, 1, 0, 0, _either_sign(0.3 * m / 10), 1, 0),
    "TranslateXRel": lambda image, m: _affine(image, 1, 0, _either_sign(0.45 * m / 10) * image.width, 0, 1, 0),
    "TranslateYRel": lambda image, m: _affine(image, 1, 0, 0, 0, 1, _either_sign(0.45 * m / 10) * image.height),
    "Cutout": lambda image, m: _cutout(image, max(2, 40 * m // 10)),
}


def raug15(image: Image.Image) -> Image.Image:
    """The image (RGB) after two operations drawn uniformly, from Python's global generator."""
    for operation in random.choices(tuple(OPERATIONS.values()), k=NUM_OPERATIONS):
        image = operation(image, random.randint(0, MAX_MAGNITUDE))
    return image
