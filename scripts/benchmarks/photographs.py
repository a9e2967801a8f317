"""JPEGs of the size of ImageNet's, made from scikit-learn's two sample photographs."""

from __future__ import annotations

import io
import random

from PIL import Image

SIZE = (500, 375)  # ImageNet's most frequent one
QUALITY = 90


def photographs(count: int) -> list[bytes]:
    """Encoded images that all differ: random regions of the two photographs, mirrored by turns."""
    from sklearn.datasets import load_sample_images

    originals = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    draw = random.Random(0)
    encoded = []
    for number in range(count):
        original = originals[number % len(originals)]
        width = draw.randint(400, 569)  # of 640 x 427, at the ratio of 4 : 3
        height = width * SIZE[1] // SIZE[0]
        left, top = draw.randint(0, original.width - width), draw.randint(0, original.height - height)
        image = original.resize(SIZE, Image.Resampling.BICUBIC, box=(left, top, left + width, top + height))
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=QUALITY)
        encoded.append(buffer.getvalue())
    return encoded
