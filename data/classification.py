"""Classification: images with one label each.

    images = data.Classification(Source("digits"), image_size=32, num_classes=10)
    loader = data.train_loader(images, batch_size=50, device=device)

Batches are normalized float32 [B, 3, H, W] and int64 [B], or float [B, num_classes] under mixup or cutmix.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from typing_extensions import override

from data import gpu_decode, registry, transforms
from data.build import ImageSet
from data.decoded import BadSamplePolicy, ImageDataset, blank_bad
from data.gpu_decode import EncodedDataset
from data.loader import BatchAugmentation
from data.on_device import Erase, Mix
from data.registry import ClassificationSpec, FileSpec, InMemorySpec
from data.resident import InMemoryDataset, RandomCropFlip
from data.transforms import CropAndFlip, Transform
from data.types import Augmentation, DatasetInfo, EncodedImages, LoaderConfig, Source
from repopt.errors import UserError
from repopt.images import Preprocessing


def describe(source: Source, *, splits: Sequence[str] = ("train", "val")) -> DatasetInfo:
    """Return what is known of a data set without decoding an image; only the `splits` named need to exist.

    Raises:
        UserError: an unknown data set, a missing or empty folder, splits with different classes.
    """
    return registry.find(source, ClassificationSpec).describe(source, splits)


@dataclass(frozen=True)
class Classification(ImageSet):
    """A data set for a classifier.

    Attributes:
        source: where the images come from.
        image_size: side of the images in pixels.
        num_classes: of the model; width of the targets under mixup and cutmix.
        interpolation: 'bilinear', 'bicubic', or 'random' (one of the two, per image; bicubic in evaluation).
        augmentation: how training images are varied; the sets that live on the device have crops of their own and heed
            only the mixing.
        label_smoothing: applied here only under mixup and cutmix, whose targets are distributions.
        crop: in evaluation, resize the short side to 256/224 of `image_size` before the centre crop, instead of to
            `image_size`.
        decode: where plain JPEGs of training become pixels: 'cpu', 'gpu', or 'auto' (`data.gpu_decode`); evaluation
            decodes on the CPU always.

    Raises:
        UserError: an unknown data set; a name (preset, interpolation) that does not exist; an image size that does not
            fit the data set. Loaders raise it also for an unknown policy or mode, and for more classes than
            `num_classes`.
    """

    source: Source
    image_size: int
    num_classes: int
    interpolation: str = "bilinear"
    augmentation: Augmentation = field(default_factory=Augmentation)
    label_smoothing: float = 0.0
    crop: bool = False
    decode: str = "auto"

    def __post_init__(self) -> None:
        transforms.check_interpolation(self.interpolation)
        transforms.check_preset(self.augmentation.preset)
        if isinstance(self.spec, InMemorySpec):
            size = self.spec.describe(self.source, ()).image_size
            if size not in (None, self.image_size):
                raise UserError(f"data set {self.source.dataset!r} has images of size {size}, not {self.image_size}")

    @property
    @override
    def spec(self) -> ClassificationSpec:
        return registry.find(self.source, ClassificationSpec)

    @property
    @override
    def class_names(self) -> tuple[str, ...]:
        return describe(self.source, splits=("val",)).classes

    @property
    @override
    def preprocessing(self) -> Preprocessing:
        size, spec = self.image_size, self.spec
        side = transforms.short_side(size, crop=self.crop)
        return Preprocessing(spec.mean, spec.std, (size, size), side, transforms.DETERMINISTIC[self.interpolation])

    @override
    def dataset(self, split: str, *, training: bool, seed: int, cfg: LoaderConfig) -> ImageDataset | InMemoryDataset:
        spec = self.spec
        if isinstance(spec, InMemorySpec):
            images, labels = spec.load(self.source, split, self.image_size, self.num_classes)
            self._check(labels)
            images, labels = images.to(cfg.device), labels.to(cfg.device)
            crop = RandomCropFlip(images, padding=spec.padding, flip=spec.flip, seed=seed) if training else None
            return InMemoryDataset(images, labels, crop)
        assert isinstance(spec, FileSpec)
        on_gpu = training and gpu_decode.wanted(self.decode, self.augmentation, cfg.device)
        transform = (
            transforms.train_transform(self.augmentation, self.image_size, self.interpolation)
            if training
            else transforms.eval_transform(self.image_size, self.interpolation, crop=self.crop)
        )
        files = spec.open(self.source, split, self.num_classes, cfg.rank, cfg.world_size)
        self._check(files.labels)
        if on_gpu:
            assert isinstance(transform, CropAndFlip)
            return EncodedDataset(files, transform, seed)
        return ClassificationDataset(files, transform, seed)

    @override
    def bad_sample_policy(self, split: str) -> BadSamplePolicy:
        if split == "val" and self.source.on_bad_image == "skip":
            return functools.partial(blank_bad, image_size=self.image_size)
        return super().bad_sample_policy(split)

    @override
    def batch_augmentations(self, batch_size: int, seed: int, device: torch.device) -> Sequence[BatchAugmentation]:
        augmentation = self.augmentation
        found: list[BatchAugmentation] = []
        if isinstance(self.spec, FileSpec) and augmentation.preset is None and augmentation.reprob > 0:
            found.append(Erase(augmentation, seed, device))
        if augmentation.mixes:
            found.append(
                Mix(
                    augmentation,
                    batch_size=batch_size,
                    num_classes=self.num_classes,
                    label_smoothing=self.label_smoothing,
                    seed=seed,
                )
            )
        return found

    def _check(self, labels: Tensor) -> None:
        found = int(labels.max()) + 1
        if found > self.num_classes:
            raise UserError(f"data set {self.source.dataset!r} has {found} classes, the model {self.num_classes}")


class ClassificationDataset(ImageDataset):
    """Encoded images with one label each."""

    def __init__(self, images: EncodedImages, transform: Transform, seed: int) -> None:
        super().__init__(images, images.labels, seed)
        self._transform = transform

    @override
    def sample(self, index: int) -> tuple[Tensor, int]:
        return self._transform(self._images.read(index)), int(self._images.labels[index])
