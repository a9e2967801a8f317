"""Semantic segmentation: images with a class for every pixel, and the table of data sets.

    info = segmentation.describe(Source("scenes"))
    loader = segmentation.train_loader(Source("scenes"), crop=(128, 128), scales=(0.5, 2), batch_size=8, device=device)

Batches are normalised float32 [B, 3, H, W] and class indices int64 [B, H, W], in which 255 is not counted.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2

from data import cityscapes, digits, scenes
from data.decode import to_pixels, to_values
from data.decoded import DecodedLoader, Sample, Samples, mending, refuse, replace
from data.folder import data_folder
from data.loader import Loader
from data.on_device import Normalize
from data.registry import IMAGENET_MEAN, IMAGENET_STD, look_up
from data.samplers import EvalSampler, TrainSampler
from data.types import Loading, Source
from repopt.errors import UserError, shown

IGNORED = cityscapes.IGNORED  # in batches too

_FOREIGN = 254  # a value that label images of the set do not have


@dataclass(frozen=True)
class Row:
    """A data set in Cityscapes' layout.

    Attributes:
        root: `Source.root` -> the folder with `leftImg8bit` and `gtFine`.
        class_names: of the classes that are evaluated.
        class_indices: for each value of a label image, from 0 on, its class, or `IGNORED`; 255 is always ignored.
        mean: per channel, of values in 0..1.
        std: likewise.
        flip: whether half the training images are mirrored.
    """

    root: Callable[[str], Path]
    class_names: Callable[[], tuple[str, ...]]
    class_indices: Callable[[], Sequence[int]]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    flip: bool


DATASETS: dict[str, Row] = {
    "cityscapes": Row(
        data_folder,
        cityscapes.class_names,
        cityscapes.class_indices,
        IMAGENET_MEAN,
        IMAGENET_STD,
        flip=True,
    ),
    "scenes": Row(
        lambda root: scenes.find(root) / "cityscapes",
        lambda: scenes.CLASS_NAMES,
        lambda: range(len(scenes.CLASS_NAMES)),
        digits.MEAN,
        digits.STD,
        flip=False,  # a mirrored digit is another thing
    ),
}


@dataclass(frozen=True)
class Info:
    """What is known of a data set before any image is decoded.

    Attributes:
        class_names: in the order of the class indices.
        mean: per channel, of values in 0..1.
        std: likewise.
    """

    class_names: tuple[str, ...]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


def describe(source: Source) -> Info:
    """What is known of a data set; nothing of it needs to be there.

    Raises:
        UserError: an unknown data set.
    """
    row = look_up(source, DATASETS)
    return Info(row.class_names(), row.mean, row.std)


def train_loader(
    source: Source,
    *,
    crop: tuple[int, int],
    scales: tuple[float, float],
    batch_size: int,
    seed: int = 0,
    **loading: Any,
) -> Loader:
    """Varied training batches of one rank, all of `batch_size` images, in an order that (seed, epoch) gives.

    Args:
        source: where the images come from.
        crop: height and width of what is cut out of an image, anywhere; a smaller image is padded by the mean colour.
        scales: least and greatest factor by which an image is resized before.
        batch_size: images per step on this rank.
        seed: of the order and of every variation.
        loading: see `Loading`.

    Raises:
        UserError: an unknown data set; folders that are not in its layout; an image without its label image; fewer
            images than one step takes; and while iterating, a label image of another size than its image's or with
            other values than the set's.
    """
    how = Loading(**loading)
    row = look_up(source, DATASETS)
    if not 0 < scales[0] <= scales[1]:
        raise UserError(f"images are resized by factors from one above 0 to one no smaller, not {shown(scales)}")
    varied = Varied(tuple(crop), tuple(scales), row.flip, tuple(round(255 * value) for value in row.mean))
    samples = Labelled(row, source, "train", varied, seed)
    return _Loader(
        samples,
        TrainSampler(len(samples), batch_size, how.rank, how.world_size, seed),
        Normalize(row.mean, row.std, how.device, how.memory_format),
        mend=mending(source.on_bad_image, replace),
        how=how,
    )


def eval_loader(
    source: Source,
    *,
    batch_size: int,
    split: str = "val",
    most: int | None = None,
    seed: int = 0,
    **loading: Any,
) -> Loader:
    """Whole images of one rank; over all ranks every image comes exactly once, and the last batch may be smaller.

    Args:
        source: where the images come from.
        batch_size: most images per step on this rank; images of different sizes go one by one.
        split: whose images; of those to train on another takes the place of one that cannot be read, as in training.
        most: how many of them; None = all.
        seed: which ones, where not all.
        loading: see `Loading`.

    Raises:
        UserError: as `train_loader`; and while iterating, a test image that cannot be read, or images of different
            sizes in one batch.
    """
    how = Loading(**loading)
    row = look_up(source, DATASETS)
    samples = Labelled(row, source, split, None, seed=0)  # nothing is random
    return _Loader(
        samples,
        EvalSampler(len(samples), batch_size, how.rank, how.world_size, most, seed),
        Normalize(row.mean, row.std, how.device, how.memory_format),
        mend=refuse if split == "val" else mending(source.on_bad_image, replace),
        join=_join_whole,
        how=how,
    )


@dataclass(frozen=True)
class Varied:
    """How a training image is varied together with its labels: resized, cropped, mirrored, its colours distorted.

    Attributes:
        crop: height and width afterwards.
        scales: range of the factor of resizing.
        flip: whether half the images are mirrored.
        colour: of what is added below and to the right of an image that is smaller than the crop, RGB in 0..255.
    """

    crop: tuple[int, int]
    scales: tuple[float, float]
    flip: bool
    colour: tuple[int, ...]

    def __call__(self, pixels: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 [H, W, 3] and [H, W] -> uint8 [*crop, 3] and [*crop]."""
        factor = float(torch.empty(1).uniform_(*self.scales))
        size = [max(1, round(factor * side)) for side in labels.shape]
        # v2 would resize a mask by the mode "nearest", whose pixels lie up to half a pixel beside the image's.
        resized = v2.functional.resize(labels[None], size, InterpolationMode.NEAREST_EXACT)
        cut = v2.Compose(
            [
                v2.RandomCrop([min(sides) for sides in zip(size, self.crop, strict=True)]),
                v2.RandomHorizontalFlip(0.5 * self.flip),
                v2.ColorJitter(brightness=0.125, contrast=0.5, saturation=0.5, hue=0.05),
            ]
        )
        image = tv_tensors.Image(v2.functional.resize(pixels.permute(2, 0, 1), size))
        image, mask = cut(image, tv_tensors.Mask(resized))
        missing = [0, 0, self.crop[1] - mask.shape[2], self.crop[0] - mask.shape[1]]
        padded = v2.Pad(missing, fill={tv_tensors.Image: self.colour, tv_tensors.Mask: IGNORED})
        image, mask = padded(image, mask)
        return image.permute(1, 2, 0), mask[0]


class Labelled(Samples):
    """The images of one split with their label images.

    Raises:
        UserError: as `cityscapes.open_split`.
    """

    def __init__(self, row: Row, source: Source, split: str, varied: Varied | None, seed: int) -> None:
        super().__init__(seed)
        self._images, self._labels = cityscapes.open_split(row.root(source.root), split)
        self._varied = varied
        names = (Path(self._images.name(index)).name for index in range(len(self)))
        self.contents = torch.tensor([zlib.crc32(name.encode(errors="surrogateescape")) for name in names])
        indices = row.class_indices()
        self._greatest = len(indices) - 1
        self._classes = np.full(256, _FOREIGN, np.uint8)
        self._classes[: len(indices)] = indices
        self._classes[IGNORED] = IGNORED

    def __len__(self) -> int:
        return len(self._images)

    def name(self, index: int) -> str:  # noqa: D102
        return self._images.name(index)

    def sample(self, index: int) -> tuple[Tensor, Tensor]:
        """uint8 [H, W, 3], and class indices uint8 [H, W]."""
        pixels = to_pixels(self._images.read(index))
        labels = self._label_image(index, pixels.shape[0], pixels.shape[1])
        return (pixels, labels) if self._varied is None else self._varied(pixels, labels)

    def _label_image(self, index: int, height: int, width: int) -> Tensor:
        name = self._labels.name(index)
        try:
            values = to_values(self._labels.read(index))
        except OSError as error:
            raise OSError(f"its label image {name!r}: {error}") from error
        if values.dtype != np.uint8 or values.ndim != 2:
            raise UserError(f"{name!r} is no label image: one channel of 8 bits is expected")
        if values.shape != (height, width):
            raise UserError(
                f"label image {name!r} has {values.shape[1]} x {values.shape[0]} pixels, its image {width} x {height}"
            )
        classes = self._classes[values]
        if (foreign := classes == _FOREIGN).any():
            raise UserError(
                f"label image {name!r} has the value {values[foreign][0]}: "
                f"0 to {self._greatest} and {IGNORED} are allowed"
            )
        return torch.from_numpy(classes)


class _Loader(DecodedLoader):
    def _on_device(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        images, targets = super()._on_device(images, targets)
        return images, targets.long()  # not before: it takes eight times as much memory


def _join_whole(samples: list[Sample]) -> tuple[Tensor, Tensor, Tensor]:
    sizes = sorted({tuple(pixels.shape[:2]) for pixels, _, _ in samples})
    if len(sizes) > 1:
        (height, width), (other_height, other_width) = sizes[:2]
        raise UserError(
            f"an evaluation batch has images of {width} x {height} and {other_width} x {other_height} pixels: "
            "set DATA.TEST_BATCH_SIZE 1"
        )
    return default_collate(samples)
