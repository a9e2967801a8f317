import numpy as np
import pytest
from PIL import Image

NUM_CLASSES = 12


def photograph(seed, width, height):
    """Smooth colours with some noise: every image differs, and interpolation methods give different pixels."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)).resize((width, height), Image.BICUBIC)
    noisy = np.asarray(coarse).astype(int) + rng.integers(-20, 20, (height, width, 3))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


@pytest.fixture(name="photograph")
def _photograph():
    return photograph


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory):
    """train/ with two images and val/ with one in each of 12 classes, of different sizes and file types."""
    root = tmp_path_factory.mktemp("images")
    for label in range(NUM_CLASSES):
        for split, count in (("train", 2), ("val", 1)):
            folder = root / split / f"class{label:02}"
            folder.mkdir(parents=True)
            for k in range(count):
                image = photograph(100 * label + 10 * (split == "val") + k, 40 + 3 * label, 52 - 2 * label)
                image.save(folder / (f"{k}.png" if label % 2 else f"{k}.JPEG"))
    return root
