"""What several tests of loaders do."""

import io
import random
from contextlib import contextmanager

import numpy as np
import torch
from PIL import ExifTags, Image

import data
from repopt.errors import UserError

EPOCH = 3


def error_of(loader):
    """The message alone: a traceback would keep the loader, and garbage collection takes 5 s to end a worker."""
    try:
        list(loader)
    except UserError as error:
        return str(error.with_traceback(None))
    return ""


@contextmanager
def global_generators_at_rest():
    """What is done within leaves them where they were."""
    before = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    yield
    assert random.getstate() == before[0]
    assert (np.random.get_state()[1] == before[1]).all()
    assert torch.equal(torch.get_rng_state(), before[2])


def train_loader(source, augmentation, **settings):
    """Training batches for a classifier; `settings` are of the data set and of the loader."""
    return _loader(data.train_loader, source, settings | {"augmentation": augmentation})


def eval_loader(source, **settings):
    """Evaluation batches for a classifier; `settings` are of the data set and of the loader."""
    return _loader(data.eval_loader, source, settings)


def _loader(make, source, settings):
    own = {name: settings.pop(name) for name in data.Classification.__dataclass_fields__ if name in settings}
    return make(data.Classification(source, **own), **settings)


def batches(loader, epoch=EPOCH, seen=()):
    """The batches of an epoch, or of what is left of it."""
    loader.set_epoch(epoch, seen)
    found = list(loader)
    assert len(found) == len(loader)
    return found


def assert_equal(actual, expected):
    """The same batches of tensors, bit for bit."""
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected, strict=True):
        assert all(map(torch.equal, one, other))


AS_STORED = {
    1: lambda shown: shown,
    2: lambda shown: shown[:, ::-1],
    3: lambda shown: shown[::-1, ::-1],
    4: lambda shown: shown[::-1],
    5: lambda shown: shown.swapaxes(0, 1),
    6: lambda shown: np.rot90(shown),
    7: lambda shown: shown[::-1, ::-1].swapaxes(0, 1),
    8: lambda shown: np.rot90(shown, -1),
}
"""By EXIF's orientation, the pixels that a file stores to show others."""


def tagged(shown, orientation, kind="PNG", **options):
    """A file that a viewer shows as these pixels, uint8 [H, W, 3] or [H, W], since its tag says how to turn them."""
    exif, file = Image.Exif(), io.BytesIO()
    exif[ExifTags.Base.Orientation] = orientation
    Image.fromarray(np.ascontiguousarray(AS_STORED[orientation](shown))).save(file, kind, exif=exif, **options)
    return file.getvalue()


def dark_and_light(root):
    """Class folders of two classes, four pictures each in train/ and val/, of several sizes and one of them grey."""
    generator = np.random.default_rng(0)
    for split in ("train", "val"):
        for name, brightness in (("dark", 60), ("light", 200)):
            (root / split / name).mkdir(parents=True)
            for number in range(4):
                pixels = generator.normal(brightness, 40, (50 + number, 60, 3)).clip(0, 255).astype(np.uint8)
                picture = Image.fromarray(pixels).convert("L" if number == 1 else "RGB")
                picture.save(root / split / name / f"{number}.png")
    return root
