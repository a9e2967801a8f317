"""The table of data sets. A new one is a row here (and the file that reads its images)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import TypeVar

from timm.data import IMAGENET_DEFAULT_MEAN as IMAGENET_MEAN
from timm.data import IMAGENET_DEFAULT_STD as IMAGENET_STD
from torch import Tensor

from data import caltech, cifar, cityscapes, digits, fake, folder, glyphs, patches, scenes, shards, zipped
from data.types import ON_BAD_IMAGE, DatasetInfo, EncodedImages, Source
from repopt.errors import UserError, unknown


@dataclass(frozen=True, kw_only=True)
class DatasetSpec:
    """A data set for one task.

    Attributes:
        mean: per channel, of values in 0..1.
        std: likewise.
        flip: whether half the training images are mirrored.
        zips: whether the images may also lie in a zip.
        shards: whether they lie in shards, through which a training may go by blocks.
    """

    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    flip: bool = True
    zips: bool = False
    shards: bool = False


Spec = TypeVar("Spec", bound=DatasetSpec)


@dataclass(frozen=True, kw_only=True)
class ClassificationSpec(DatasetSpec):
    """A data set of images with one label each.

    Attributes:
        describe: (source, splits) -> what is known before decoding.
    """

    describe: Callable[[Source, Sequence[str]], DatasetInfo]


@dataclass(frozen=True, kw_only=True)
class InMemorySpec(ClassificationSpec):
    """A set small enough to live on the device, with an augmentation of its own: padded crops and flips.

    Attributes:
        load: (source, split, image_size, num_classes) -> uint8 [N, 3, H, W], int64 [N].
        padding: pixels added on each side before a random crop; 0 for none.
    """

    load: Callable[[Source, str, int, int], tuple[Tensor, Tensor]]
    padding: int = 4


@dataclass(frozen=True, kw_only=True)
class FileSpec(ClassificationSpec):
    """A set of image files, decoded by worker processes and augmented as `Augmentation` says.

    Attributes:
        open: (source, split, num_classes, rank, world_size) -> the split's encoded images.
    """

    open: Callable[[Source, str, int, int, int], EncodedImages]


@dataclass(frozen=True, kw_only=True)
class SegmentationSpec(DatasetSpec):
    """A data set in Cityscapes' layout.

    Attributes:
        root: `Source.root` -> the folder with `leftImg8bit` and `gtFine`.
        class_names: of the classes that are evaluated.
        class_indices: for each value of a label image, from 0 on, its class, or `IGNORED`; 255 is always ignored.
    """

    root: Callable[[str], Path]
    class_names: Callable[[], tuple[str, ...]]
    class_indices: Callable[[], Sequence[int]]


@dataclass(frozen=True, kw_only=True)
class DetectionSpec(DatasetSpec):
    """A data set in COCO's layout.

    Attributes:
        root: `Source.root` -> the folder with `train2017`, `val2017` and `annotations`.
    """

    root: Callable[[str], Path]


def _in_memory(
    module: ModuleType,
    load: Callable[[Source, str, int, int], tuple[Tensor, Tensor]],
    *,
    flip: bool = True,
    classes: Sequence[str] = (),
) -> InMemorySpec:
    """Return the specification of a set whose module names its classes, size, mean and standard deviation."""
    info = DatasetInfo(module.NUM_CLASSES, module.SIZE, tuple(classes))
    return InMemorySpec(describe=lambda source, splits: info, load=load, mean=module.MEAN, std=module.STD, flip=flip)


def _describe_files(source: Source, splits: Sequence[str]) -> DatasetInfo:
    return zipped.describe(source.root, splits) if source.zip_mode else folder.describe(source, splits)


def _open_files(source: Source, split: str, num_classes: int, rank: int, world_size: int) -> EncodedImages:
    if not source.zip_mode:
        return folder.open_split(source, split)
    return zipped.ZippedImages(
        source.root, split, num_classes=num_classes, cache_mode=source.cache_mode, rank=rank, world_size=world_size
    )


_SHARDS = FileSpec(describe=shards.describe, open=shards.open_split, shards=True)
_CLASS_FOLDERS = FileSpec(describe=_describe_files, open=_open_files, zips=True)

DATASETS: dict[str, list[DatasetSpec]] = {  # by task; a mirrored digit or character is another thing
    "digits": [_in_memory(digits, lambda source, split, *_: digits.load(split), flip=False, classes="0123456789")],
    "cf100": [_in_memory(cifar, lambda source, split, *_: cifar.load(source.root, split))],
    "glyphs": [
        _in_memory(
            glyphs, lambda source, split, *_: glyphs.load(source.root, split), flip=False, classes=glyphs.CHARACTERS
        )
    ],
    "fake": [
        InMemorySpec(
            describe=lambda source, splits: DatasetInfo(None, None),
            load=lambda source, split, image_size, num_classes: fake.load(
                split, image_size=image_size, num_classes=num_classes
            ),
            padding=0,
            flip=False,
        )
    ],
    "patches": [_in_memory(patches, lambda source, split, *_: patches.load(split))],
    "imagenet": [_CLASS_FOLDERS],
    "folder": [_CLASS_FOLDERS],
    "parquet": [_SHARDS],
    "wds": [_SHARDS],
    "caltech256": [
        FileSpec(
            describe=lambda source, splits: DatasetInfo(caltech.NUM_CLASSES, None),
            open=lambda source, split, *_: caltech.open_split(source.root, split),
        )
    ],
    "cityscapes": [
        SegmentationSpec(
            root=folder.data_folder, class_names=cityscapes.class_names, class_indices=cityscapes.class_indices
        )
    ],
    "coco": [DetectionSpec(root=folder.data_folder)],
    "scenes": [
        SegmentationSpec(
            root=lambda root: scenes.find(root) / "cityscapes",
            class_names=lambda: scenes.CLASS_NAMES,
            class_indices=lambda: range(len(scenes.CLASS_NAMES)),
            mean=digits.MEAN,
            std=digits.STD,
            flip=False,
        ),
        DetectionSpec(root=lambda root: scenes.find(root) / "coco", mean=digits.MEAN, std=digits.STD, flip=False),
    ],
}


def find(source: Source, kind: type[Spec]) -> Spec:
    """Return what a data set is for the task whose specifications are of a kind.

    Raises:
        UserError: an unknown data set, zip mode with one that is in no zip, an order by blocks with one that has none,
            an unknown way with unreadable images, or numbers of normalization that are none.
    """
    if source.on_bad_image not in ON_BAD_IMAGE:
        raise unknown("way with unreadable images", source.on_bad_image, ON_BAD_IMAGE)
    table = {name: spec for name, specs in DATASETS.items() for spec in specs if isinstance(spec, kind)}
    if source.dataset not in table:
        raise unknown("data set", source.dataset, table)
    spec = table[source.dataset]
    if source.zip_mode and not spec.zips:
        zips = [name for name, specs in DATASETS.items() if any(spec.zips for spec in specs)]
        raise UserError(f"--zip is for {' and '.join(zips)}: data set {source.dataset!r} is in no zip")
    if source.shuffle == "blocks" and not spec.shards:
        raise UserError(f"DATA.SHUFFLE blocks is for shards: data set {source.dataset!r} has none")
    return replace(
        spec, mean=_of_channels(source, source.mean, spec.mean), std=_of_channels(source, source.std, spec.std)
    )


def _of_channels(source: Source, given: Sequence[float] | None, of_set: Sequence[float]) -> tuple[float, ...]:
    """Return the numbers of normalization that are given, else the data set's: of grey images their mean."""
    if given is None:
        return tuple(of_set) if source.channels == len(of_set) else (sum(of_set) / len(of_set),)
    if len(given) != source.channels or not all(0 <= number <= 1 for number in given):
        raise UserError(f"images of {source.channels} channels are normalized by as many numbers in 0..1, not {given}")
    return tuple(given)
