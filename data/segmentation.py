"""Semantic segmentation: images with a class for every pixel.

    images = data.Segmentation(Source("scenes"), crop=(128, 128), scales=(0.5, 2))
    loader = data.train_loader(images, batch_size=8, device=device)

Batches are normalized float32 [B, 3, H, W] and class indices int64 [B, H, W], in which 255 is not counted.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2
from typing_extensions import override

from data import cityscapes, registry
from data.build import ImageSet
from data.decode import advice_on_size, to_pixels, to_values
from data.decoded import ImageDataset, Sample
from data.registry import SegmentationSpec
from data.types import LoaderConfig, Source
from repopt.errors import UserError, shown

IGNORED = cityscapes.IGNORED  # in batches too

_INVALID = 254  # a value that label images of the set do not have


@dataclass(frozen=True)
class Segmentation(ImageSet):
    """A data set with a label image for each image; `class_names` needs nothing of it to be there.

    Attributes:
        source: where the images come from.
        crop: height and width of what is cut out of a training image, anywhere; a smaller image is padded by the mean
            colour. None: training images are whole and not varied, as in evaluation.
        scales: minimum and maximum factor by which a training image is resized before.

    Raises:
        UserError: an unknown data set, or factors that are none. Loaders raise it also for folders that are not in the
            layout; an image without its label image; and while iterating, a label image of another size than its
            image's or with other values than the set's, a test image that cannot be read, or test images of different
            sizes in one batch.
    """

    source: Source
    crop: tuple[int, int] | None = None
    scales: tuple[float, float] = (1.0, 1.0)

    def __post_init__(self) -> None:
        if not 0 < self.scales[0] <= self.scales[1]:
            factors = shown(self.scales)
            raise UserError(f"images are resized by factors from one above 0 to one no smaller, not {factors}")

    @property
    @override
    def spec(self) -> SegmentationSpec:
        return registry.find(self.source, SegmentationSpec)

    @property
    @override
    def class_names(self) -> tuple[str, ...]:
        """The names of the classes, in the order of their indices."""
        return self.spec.class_names()

    @override
    def dataset(self, split: str, *, training: bool, seed: int, cfg: LoaderConfig) -> SegmentationDataset:
        transform = None
        if training and self.crop:
            colour = tuple(round(255 * value) for value in self.spec.mean)
            transform = JointTransform(self.crop, self.scales, self.spec.flip, colour)
        return SegmentationDataset(self.spec, self.source, split, transform, seed)

    @staticmethod
    @override
    def collate(samples: list[Sample]) -> tuple[Tensor, Tensor, Tensor]:
        sizes = sorted({tuple(pixels.shape[:2]) for pixels, _, _ in samples})
        if len(sizes) > 1:
            (height, width), (other_height, other_width) = sizes[:2]
            raise UserError(
                f"an evaluation batch has images of {width} x {height} and {other_width} x {other_height} pixels: "
                "set DATA.TEST_BATCH_SIZE 1"
            )
        return default_collate(samples)


@dataclass(frozen=True)
class JointTransform:
    """Resizes, crops and mirrors a training image together with its labels, and distorts its colours.

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
        """Return uint8 [*crop, 3] and [*crop] of uint8 [H, W, 3] and [H, W]."""
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


class SegmentationDataset(ImageDataset):
    """The images of one split with their label images.

    Raises:
        UserError: as `cityscapes.open_split`.
    """

    def __init__(
        self, spec: SegmentationSpec, source: Source, split: str, transform: JointTransform | None, seed: int
    ) -> None:
        images, self._labels = cityscapes.open_split(spec.root(source.root), split)
        names = (Path(images.name(index)).name for index in range(len(images)))
        contents = torch.tensor([zlib.crc32(name.encode(errors="surrogateescape")) for name in names])
        super().__init__(images, contents, seed)
        self._transform = transform
        indices = spec.class_indices()
        self._max_value = len(indices) - 1
        self._classes = np.full(256, _INVALID, np.uint8)
        self._classes[: len(indices)] = indices
        self._classes[IGNORED] = IGNORED

    @override
    def sample(self, index: int) -> tuple[Tensor, Tensor]:
        """Return uint8 [H, W, 3], and class indices uint8 [H, W]."""
        encoded = self._images.read(index)
        pixels, labels = to_pixels(encoded), self._label_image(index)
        if labels.shape != pixels.shape[:2]:
            (height, width), (label_height, label_width) = pixels.shape[:2], labels.shape
            raise UserError(
                f"label image {self._labels.name(index)!r} has {label_width} x {label_height} pixels, its image "
                f"{width} x {height}{advice_on_size(encoded)}"
            )
        return (pixels, labels) if self._transform is None else self._transform(pixels, labels)

    def _label_image(self, index: int) -> Tensor:
        name = self._labels.name(index)
        try:
            values = to_values(self._labels.read(index))
        except OSError as error:
            raise OSError(f"its label image {name!r}: {error}") from error
        if values.dtype != np.uint8 or values.ndim != 2:
            raise UserError(f"{name!r} is no label image: one channel of 8 bits is expected")
        classes = self._classes[values]
        if (invalid := classes == _INVALID).any():
            raise UserError(
                f"label image {name!r} has the value {values[invalid][0]}: "
                f"0 to {self._max_value} and {IGNORED} are allowed"
            )
        return torch.from_numpy(classes)
