"""From a data set, as a task takes it, to the loader that yields its batches: the same for every task."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from torch import device as Device
from torch.utils.data import default_collate

from data.decoded import BadSamplePolicy, DecodedLoader, ImageDataset, collate, raise_on_bad, replace_bad
from data.gpu_decode import EncodedDataset, EncodedLoader
from data.loader import BatchAugmentation, Loader
from data.on_device import Normalize
from data.registry import DatasetSpec
from data.resident import InMemoryDataset, InMemoryLoader
from data.sampler import EvalSampler, Sampler, TrainSampler
from data.types import LoaderConfig, Source
from repopt.images import Preprocessing


class ImageSet(ABC):
    """A data set as a task takes it: what its samples are, and how they become batches.

    Attributes:
        source: where the images come from.
        collate: makes a batch of its samples: images, targets and indices; a UserError refuses it.
    """

    source: Source
    collate = staticmethod(default_collate)

    @property
    @abstractmethod
    def spec(self) -> DatasetSpec:
        """The data set's row in the table.

        Raises:
            UserError: an unknown data set.
        """

    @abstractmethod
    def dataset(self, split: str, *, training: bool, seed: int, cfg: LoaderConfig) -> ImageDataset | InMemoryDataset:
        """Return the samples of a split; with `training` they are varied, by draws that follow from the seed.

        Raises:
            UserError: the split is absent, or not sound.
        """

    @property
    @abstractmethod
    def class_names(self) -> tuple[str, ...]:
        """The names of the classes, by index; empty where they have none."""

    @property
    def preprocessing(self) -> Preprocessing:
        """What a network's input is made by in evaluation."""
        return Preprocessing(self.spec.mean, self.spec.std)

    def normalize(self, cfg: LoaderConfig) -> Normalize:
        """Return what makes floats of a batch of uint8 images on the device."""
        ours = self.preprocessing
        return Normalize(ours.mean, ours.std, cfg.device, cfg.memory_format)

    def bad_sample_policy(self, split: str) -> BadSamplePolicy:
        """Return what becomes of the unreadable samples of a split."""
        return replace_bad if split == "train" and self.source.on_bad_image == "skip" else raise_on_bad

    def batch_augmentations(self, batch_size: int, seed: int, device: Device) -> Sequence[BatchAugmentation]:
        """Return what varies whole normalized batches of training, in its order."""
        return ()


def train_loader(images: ImageSet, *, batch_size: int, seed: int = 0, **loading: Any) -> Loader:
    """Return augmented training batches of one rank, all of `batch_size` images, in an order that (seed, epoch) gives.

    Args:
        images: the data set: a `Classification`, `Segmentation` or `Detection`.
        batch_size: images per step on this rank.
        seed: of the order and of every augmentation.
        loading: the fields of `LoaderConfig`.

    Raises:
        UserError: as `ImageSet.dataset`; fewer images than one step takes.
    """
    cfg = LoaderConfig(**loading)
    augmentations = images.batch_augmentations(batch_size, seed, cfg.device)
    dataset = images.dataset("train", training=True, seed=seed, cfg=cfg)
    blocks = None if isinstance(dataset, InMemoryDataset) else dataset.blocks
    sampler = TrainSampler(len(dataset), batch_size, cfg.rank, cfg.world_size, seed, images.source.sharded, blocks)
    return _loader(images, "train", dataset, sampler, cfg, augmentations)


def eval_loader(
    images: ImageSet,
    *,
    batch_size: int,
    split: str = "val",
    max_images: int | None = None,
    seed: int = 0,
    **loading: Any,
) -> Loader:
    """Return evaluation batches of one rank; over all ranks every image comes once, and the last batch may be smaller.

    Args:
        images: the data set: a `Classification`, `Segmentation` or `Detection`.
        batch_size: maximum number of images per step on this rank.
        split: whose images; "train" gives training images as in evaluation, where another takes the place of one that
            cannot be read.
        max_images: how many of them; None = all.
        seed: which ones, where not all.
        loading: the fields of `LoaderConfig`.

    Raises:
        UserError: as `ImageSet.dataset`.
    """
    cfg = LoaderConfig(**loading)
    dataset = images.dataset(split, training=False, seed=0, cfg=cfg)  # nothing is random
    sampler = EvalSampler(len(dataset), batch_size, cfg.rank, cfg.world_size, max_images, seed)
    return _loader(images, split, dataset, sampler, cfg)


def _loader(
    images: ImageSet,
    split: str,
    dataset: ImageDataset | InMemoryDataset,
    sampler: Sampler,
    cfg: LoaderConfig,
    augmentations: Sequence[BatchAugmentation] = (),
) -> Loader:
    if isinstance(dataset, InMemoryDataset):
        return InMemoryLoader(dataset, sampler, images.normalize(cfg), augmentations)
    make_batch = functools.partial(collate, on_bad=images.bad_sample_policy(split), join=images.collate)
    if isinstance(dataset, EncodedDataset):
        return EncodedLoader(dataset, sampler, images.normalize(cfg), augmentations, collate=make_batch, cfg=cfg)
    return DecodedLoader(dataset, sampler, images.normalize(cfg), augmentations, collate=make_batch, cfg=cfg)
