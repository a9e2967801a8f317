"""The table of data sets for classification. A new one is a row here (and the file that reads its images)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeVar

from torch import Tensor

from data import caltech, cifar, digits, fake, folder, glyphs, patches, zipped
from data.encoded import EncodedImages
from data.types import ON_BAD_IMAGE, Info, Source
from repopt.errors import UserError, unknown

Row = TypeVar("Row")

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Resident:
    """A set small enough to live on the device, with an augmentation of its own: padded crops and flips.

    Attributes:
        info: known beforehand.
        load: (source, split, image_size, num_classes) -> uint8 [N, 3, H, W], int64 [N].
        mean: per channel, of values in 0..1.
        std: likewise.
        padding: pixels added on each side before a random crop; 0 for none.
        flip: whether half the training images are mirrored.
    """

    zips: ClassVar[bool] = False
    info: Info
    load: Callable[[Source, str, int, int], tuple[Tensor, Tensor]]
    mean: Sequence[float]
    std: Sequence[float]
    padding: int
    flip: bool


@dataclass(frozen=True)
class Decoded:
    """A set of image files, decoded by worker processes and augmented as `Augmentation` says.

    Attributes:
        describe: (source, splits) -> what is known before decoding.
        open: (source, split, num_classes, rank, world_size) -> the split's encoded images.
        zips: whether the images may also lie in a zip.
        mean: per channel, of values in 0..1.
        std: likewise.
    """

    describe: Callable[[Source, Sequence[str]], Info]
    open: Callable[[Source, str, int, int, int], EncodedImages]
    zips: bool
    mean: Sequence[float] = IMAGENET_MEAN
    std: Sequence[float] = IMAGENET_STD


def _describe_files(source: Source, splits: Sequence[str]) -> Info:
    return (zipped if source.zip_mode else folder).describe(source.root, splits)


def _open_files(source: Source, split: str, num_classes: int, rank: int, world_size: int) -> EncodedImages:
    if not source.zip_mode:
        return folder.open_split(source.root, split)
    return zipped.ZippedImages(
        source.root,
        split,
        num_classes=num_classes,
        cache_mode=source.cache_mode,
        rank=rank,
        world_size=world_size,
    )


DATASETS: dict[str, Resident | Decoded] = {
    "digits": Resident(
        Info(digits.NUM_CLASSES, digits.SIZE),
        lambda source, split, image_size, num_classes: digits.load(split),
        digits.MEAN,
        digits.STD,
        padding=4,
        flip=False,
    ),
    "cf100": Resident(
        Info(cifar.NUM_CLASSES, cifar.SIZE),
        lambda source, split, image_size, num_classes: cifar.load(source.root, split),
        cifar.MEAN,
        cifar.STD,
        padding=4,
        flip=True,
    ),
    "glyphs": Resident(  # a mirrored character is another thing
        Info(glyphs.NUM_CLASSES, glyphs.SIZE),
        lambda source, split, image_size, num_classes: glyphs.load(source.root, split),
        glyphs.MEAN,
        glyphs.STD,
        padding=4,
        flip=False,
    ),
    "fake": Resident(
        Info(None, None),
        lambda source, split, image_size, num_classes: fake.load(split, image_size=image_size, num_classes=num_classes),
        IMAGENET_MEAN,
        IMAGENET_STD,
        padding=0,
        flip=False,
    ),
    "patches": Resident(
        Info(patches.NUM_CLASSES, patches.SIZE),
        lambda source, split, image_size, num_classes: patches.load(split),
        patches.MEAN,
        patches.STD,
        padding=4,
        flip=True,
    ),
    "imagenet": Decoded(_describe_files, _open_files, zips=True),
    "folder": Decoded(_describe_files, _open_files, zips=True),
    "caltech256": Decoded(
        lambda source, splits: Info(caltech.NUM_CLASSES, None),
        lambda source, split, num_classes, rank, world_size: caltech.open_split(source.root, split),
        zips=False,
    ),
}


def find(source: Source) -> Resident | Decoded:
    """The data set's row.

    Raises:
        UserError: as `look_up`.
    """
    return look_up(source, DATASETS)


def look_up(source: Source, table: Mapping[str, Row]) -> Row:
    """The data set's row in a table.

    Raises:
        UserError: an unknown data set, zip mode with one that is in no zip, or an unknown way with unreadable images.
    """
    if source.on_bad_image not in ON_BAD_IMAGE:
        raise unknown("way with unreadable images", source.on_bad_image, ON_BAD_IMAGE)
    if source.dataset not in table:
        raise unknown("data set", source.dataset, table)
    zips = [name for name, row in DATASETS.items() if row.zips]
    if source.zip_mode and source.dataset not in zips:
        raise UserError(f"--zip is for {' and '.join(zips)}: data set {source.dataset!r} is in no zip")
    return table[source.dataset]
