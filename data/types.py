"""What a caller says of the images it wants, and what is known of them before any is decoded."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from data.sampler import Blocks

ON_BAD_IMAGE = ("skip", "raise")


@dataclass(frozen=True)
class Source:
    """Where images come from.

    Attributes:
        dataset: a name in `data.registry.DATASETS`.
        root: the data set's folder (`--data-path`); unused by the data sets that need none (digits, patches, fake), and
            not needed by those that are made where they are absent (glyphs, scenes).
        zip_mode: read the images from a zip in `root` instead of class folders (`--zip`).
        cache_mode: with `zip_mode`, what a process keeps in memory: 'no' image, the 'full' set, or its 'part' of it.
        on_bad_image: what to do at an image that cannot be read or decoded: 'raise' an error that names it, or 'skip'
            it with a warning. A skipped image gives its place to another of its batch in training, and counts as
            wrong in the evaluation of a classifier; in other evaluations it is an error anyway.
        classes: names of the classes, in the order of their indices, as a trained network has them; empty = those of
            the data set, in its own order.
        val_fraction: part of every class's images that are the split "val" where class folders have no `val/`.
        channels: of an image: 3, or 1 of grey.
        mean, std: of normalization, per channel, of values in 0..1; None = the data set's.
        columns: names of the columns of images and of labels, of Parquet files.
        shuffle: of shards, in what order training goes through the images: 'global' (any image may follow any),
            'blocks' (images that lie beside each other are read together, and come close to each other), or 'auto':
            global where each image can be read by itself.
    """

    dataset: str
    root: str = ""
    zip_mode: bool = False
    cache_mode: str = "part"
    on_bad_image: str = "skip"
    classes: tuple[str, ...] = ()
    val_fraction: float = 0.0
    channels: int = 3
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    columns: tuple[str, str] = ("image", "label")
    shuffle: str = "auto"

    @property
    def sharded(self) -> bool:
        """Whether a process reads its own part of the training images only, the one that it holds in memory."""
        return self.zip_mode and self.cache_mode == "part"


@dataclass(frozen=True)
class LoaderConfig:
    """How batches come to one rank; the fields are arguments of `train_loader` and `eval_loader`.

    Attributes:
        device: where the batches are to be.
        rank: of this process.
        world_size: number of processes.
        num_workers: processes that decode images, where they have to be decoded.
        pin_memory: page-locked batches, for asynchronous copies to a GPU.
        memory_format: of the images.
    """

    device: torch.device
    rank: int = 0
    world_size: int = 1
    num_workers: int = 8
    pin_memory: bool = True
    memory_format: torch.memory_format = torch.contiguous_format


@dataclass(frozen=True)
class Augmentation:
    """How training images are varied; the fields are named as the config's AUG keys.

    Attributes:
        crop_area: smallest and largest part of an image that a random crop covers.
        hflip: probability that an image is mirrored.
        preset: 'weak', 'raug15', 'none' (as in evaluation), or None for timm's pipeline of the next five.
        color_jitter: strength of brightness, contrast and saturation changes; only where `auto_augment` is off.
        auto_augment: timm's policy string, 'none' or '' for no policy.
        reprob: probability of random erasing.
        remode: its filling: 'const', 'rand' or 'pixel'.
        recount: maximum number of rectangles erased in an image.
        mixup: alpha of mixup, 0 for none.
        cutmix: alpha of cutmix, 0 for none.
        cutmix_minmax: minimum and maximum side of the cutmix box as fractions of the image's, instead of an alpha.
        mixup_prob: probability that a batch (or pair, or image) is mixed at all.
        mixup_switch_prob: probability of cutmix rather than mixup where both are on.
        mixup_mode: one mixing for the 'batch', for each 'pair' or for each image ('elem').
    """

    crop_area: tuple[float, float] = (0.08, 1.0)
    hflip: float = 0.5
    preset: str | None = None
    color_jitter: float = 0.4
    auto_augment: str = "rand-m9-mstd0.5-inc1"
    reprob: float = 0.25
    remode: str = "pixel"
    recount: int = 1
    mixup: float = 0.0
    cutmix: float = 0.0
    cutmix_minmax: tuple[float, float] | None = None
    mixup_prob: float = 1.0
    mixup_switch_prob: float = 0.5
    mixup_mode: str = "batch"

    @property
    def mixes(self) -> bool:
        """Whether images are mixed; then the targets are distributions, smoothed already."""
        return self.mixup > 0 or self.cutmix > 0 or self.cutmix_minmax is not None


@dataclass(frozen=True)
class DatasetInfo:
    """What is known of a data set for classification before any image is decoded.

    Attributes:
        num_classes: None where any number will do (fake).
        image_size: side in pixels where the data set fixes it, None where any size can be made.
        at_least: whether `num_classes` are those that occur, and there may be more.
        classes: their names, by index; empty where they have none.
    """

    num_classes: int | None
    image_size: int | None
    at_least: bool = field(default=False, kw_only=True)
    classes: tuple[str, ...] = field(default=(), compare=False)


class EncodedImages(ABC):
    """A split's images, encoded (JPEG, PNG, ...) on a disk, in an archive or in memory.

    It is shared with worker processes, so it holds arrays rather than many objects.

    Attributes:
        labels: int64 [N]; empty where the images have no label each.
        blocks: those that a training goes through; None where any image may follow any.
    """

    labels: Tensor
    blocks: Blocks | None = None

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, index: int) -> bytes:
        """Return the encoded bytes of one image; OSError where they cannot be read."""

    @abstractmethod
    def name(self, index: int) -> str:
        """Return what to call the image in a message."""

    def prefetch(self, indices: Sequence[int]) -> None:  # noqa: B027  # most have nothing to do
        """Read what is going to be asked for, where it is sooner read at once.

        Raises:
            UserError: the images' store is gone.
        """
