"""The input pipelines of textbooks, image by image on Pillow: what ours is measured against, and tested against."""

from __future__ import annotations

import io
import random
from collections.abc import Callable

from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor
from torchvision import transforms as T

from data import Source, describe
from data.raug15 import MAX_MAGNITUDE, NUM_OPERATIONS
from data.registry import IMAGENET_MEAN, IMAGENET_STD, InMemorySpec, find

Operation = Callable[[Image.Image, int], Image.Image]


def _sign() -> int:
    return random.choice((-1, 1))


def _interpolation() -> Image.Resampling:
    return random.choice((Image.Resampling.BILINEAR, Image.Resampling.BICUBIC))


def _affine(image: Image.Image, *coefficients: float) -> Image.Image:
    fill = (128, 128, 128)
    return image.transform(image.size, Image.Transform.AFFINE, coefficients, _interpolation(), fillcolor=fill)


def _posterize(image: Image.Image, bits: int) -> Image.Image:
    return ImageOps.posterize(image, bits) if bits else Image.new(image.mode, image.size)


def _solarize_add(image: Image.Image, addend: int) -> Image.Image:
    return image.point([min(255, v + addend) if v < 128 else v for v in range(256)] * 3)


def _cutout(image: Image.Image, side: int) -> Image.Image:
    left = random.randrange(image.width) - side // 2
    top = random.randrange(image.height) - side // 2
    image = image.copy()
    image.paste((125, 122, 113), (left, top, left + side, top + side))
    return image


def _enhanced(kind: Callable[[Image.Image], ImageEnhance._Enhance]) -> Operation:
    return lambda image, m: kind(image).enhance(1.8 * m / 10 + 0.1)


OPERATIONS: dict[str, Operation] = {
    "AutoContrast": lambda image, m: ImageOps.autocontrast(image),
    "Equalize": lambda image, m: ImageOps.equalize(image),
    "Invert": lambda image, m: ImageOps.invert(image),
    "Rotate": lambda image, m: image.rotate(_sign() * 30 * m / 10, _interpolation(), fillcolor=(128, 128, 128)),
    "Posterize": lambda image, m: _posterize(image, 4 * m // 10),
    "Solarize": lambda image, m: ImageOps.solarize(image, 256 * m // 10),
    "SolarizeAdd": lambda image, m: _solarize_add(image, 110 * m // 10),
    "Color": _enhanced(ImageEnhance.Color),
    "Contrast": _enhanced(ImageEnhance.Contrast),
    "Brightness": _enhanced(ImageEnhance.Brightness),
    "Sharpness": _enhanced(ImageEnhance.Sharpness),
    "ShearX": lambda image, m: _affine(image, 1, _sign() * 0.3 * m / 10, 0, 0, 1, 0),
    "ShearY": lambda image, m: _affine(image, 1, 0, 0, _sign() * 0.3 * m / 10, 1, 0),
    "TranslateXRel": lambda image, m: _affine(image, 1, 0, _sign() * 0.45 * m / 10 * image.width, 0, 1, 0),
    "TranslateYRel": lambda image, m: _affine(image, 1, 0, 0, 0, 1, _sign() * 0.45 * m / 10 * image.height),
    "Cutout": lambda image, m: _cutout(image, max(2, 40 * m // 10)),
}


def raug15(image: Image.Image) -> Image.Image:
    """Return an image after two of the sixteen operations."""
    for operation in random.choices(tuple(OPERATIONS.values()), k=NUM_OPERATIONS):
        image = operation(image, random.randint(0, MAX_MAGNITUDE))
    return image


def imagenet(*then: Callable[[Image.Image], Image.Image], size: int = 224) -> Callable[[bytes], Tensor]:
    """Return what makes of a JPEG a normalised float32 [3, size, size]: decoded, cropped, flipped, and what follows."""
    normalize = T.Normalize(IMAGENET_MEAN, IMAGENET_STD)
    varied = T.Compose([T.RandomResizedCrop(size), T.RandomHorizontalFlip(), *then, T.ToTensor(), normalize])
    return lambda data: varied(Image.open(io.BytesIO(data)).convert("RGB"))


def small(dataset: str) -> T.Compose:
    """Return what makes of uint8 [32, 32, 3] a normalised float32 [3, 32, 32]: a padded crop, and a flip, if the set's
    images are mirrored.
    """
    source = Source(dataset)
    row = find(source, InMemorySpec)
    flips = [T.RandomHorizontalFlip()] if row.flip else []
    crop = T.RandomCrop(describe(source).image_size, padding=row.padding)
    return T.Compose([Image.fromarray, crop, *flips, T.ToTensor(), T.Normalize(row.mean, row.std)])
