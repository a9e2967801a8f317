"""Sets of JPEGs, made of scikit-learn's two sample photographs, that are the same in every run."""

from __future__ import annotations

import io
import random

import numpy as np
from PIL import Image

SIZE = (500, 375)  # ImageNet's most frequent one
_CANVAS = 2560  # pixels: the photographs, mirrored at their edges until they are as large
_LONGER_SIDES = {(500, 500): 12, (100, 300): 7, (640, 1280): 1}  # ranges in pixels: how many of 20 images
_SHORTER_OVER_LONGER = (2 / 3, 3 / 4, 3 / 4, 3 / 4, 1)
_UPRIGHT = 0.3
_REDUCED = (1.2, 2.0)  # by what regions are shrunk, so that there is detail in every pixel
_QUALITIES = (96, 98, 99, 100)


def of_one_size(count: int) -> list[bytes]:
    """Return JPEGs of 500 x 375 pixels and quality 90 that all differ: random regions of the photographs."""
    originals, draw = [Image.fromarray(pixels) for pixels in _originals()], random.Random(0)
    encoded = []
    for number in range(count):
        original = originals[number % len(originals)]
        width = draw.randint(400, 569)  # of 640 x 427, at the ratio of 4 : 3
        encoded.append(_region(original, SIZE, (width, width * SIZE[1] // SIZE[0]), 90, draw))
    return encoded


def as_imagenet(count: int) -> list[bytes]:
    """Return JPEGs whose sizes and bytes are spread much as ImageNet's.

    On average they have 400 x 350 pixels and 110 kB, within 10 %. Most have a longer
    side of 500 pixels, some are smaller, a few larger.
    """
    canvases = [
        Image.fromarray(np.pad(pixels, [(0, _CANVAS - side) for side in pixels.shape[:2]] + [(0, 0)], mode="symmetric"))
        for pixels in _originals()
    ]
    draw = random.Random(0)
    encoded = []
    for _ in range(count):
        longer = draw.randint(*draw.choices(list(_LONGER_SIDES), list(_LONGER_SIDES.values()))[0])
        sides = longer, round(longer * draw.choice(_SHORTER_OVER_LONGER))
        size = sides[::-1] if draw.random() < _UPRIGHT else sides
        reduced = draw.uniform(*_REDUCED)
        region = round(size[0] * reduced), round(size[1] * reduced)
        encoded.append(_region(draw.choice(canvases), size, region, draw.choice(_QUALITIES), draw))
    return encoded


def described(encoded: list[bytes]) -> str:
    """Return the mean size and the mean kB."""
    width, height = np.mean([Image.open(io.BytesIO(image)).size for image in encoded], axis=0)
    return f"{width:.0f} x {height:.0f} ({np.mean([len(image) for image in encoded]) / 1e3:.0f} kB)"


def _originals() -> list[np.ndarray]:
    from sklearn.datasets import load_sample_images

    return load_sample_images().images


def _region(
    original: Image.Image, size: tuple[int, int], region: tuple[int, int], quality: int, draw: random.Random
) -> bytes:
    """Return a random region of a photograph, resized, as a JPEG."""
    left, top = (draw.randint(0, whole - part) for whole, part in zip(original.size, region, strict=True))
    box = (left, top, left + region[0], top + region[1])
    buffer = io.BytesIO()
    original.resize(size, Image.Resampling.BICUBIC, box=box).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()
