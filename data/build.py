"""From a description of the images wanted to the loader that yields them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from data import registry, transforms
from data.decoded import Blank, Decoded, DecodedLoader, mending, replace
from data.loader import Loader
from data.on_device import Erase, Mix, Normalize
from data.resident import RandomCropFlip, ResidentLoader
from data.samplers import EvalSampler, TrainSampler
from data.types import Augmentation, Info, Loading, Source
from repopt.errors import UserError


def describe(source: Source, *, splits: Sequence[str] = ("train", "val")) -> Info:
    """What is known of a data set without decoding an image; only the `splits` named need to exist.

    Raises:
        UserError: an unknown data set, a missing or empty folder, splits with different classes.
    """
    row = registry.find(source)
    return row.info if isinstance(row, registry.Resident) else row.describe(source, splits)


def train_loader(
    source: Source,
    augmentation: Augmentation,
    *,
    image_size: int,
    interpolation: str,
    batch_size: int,
    num_classes: int,
    label_smoothing: float,
    seed: int = 0,
    **loading: Any,
) -> Loader:
    """Augmented training batches of one rank, all of `batch_size` images, in an order that (seed, epoch) gives.

    Args:
        source: where the images come from.
        augmentation: how they are varied; the sets that live on the device have crops of their own and heed only
            the mixing.
        image_size: side of the images in pixels.
        interpolation: 'bilinear', 'bicubic', or 'random' (one of the two, per image).
        batch_size: images per step on this rank.
        num_classes: of the model; width of the targets under mixup and cutmix.
        label_smoothing: applied here only under mixup and cutmix, whose targets are distributions.
        seed: of the order and of every augmentation.
        loading: see `Loading`.

    Raises:
        UserError: as `describe`; a name (preset, interpolation, policy, mode) that does not exist; an image size that
            does not fit the data set; more classes than `num_classes`; fewer images than one step takes.
    """
    how = Loading(**loading)
    row = _find(source, image_size, interpolation)
    transforms.check_preset(augmentation.preset)
    normalize = Normalize(row.mean, row.std, how.device, how.memory_format)
    mix = (
        Mix(augmentation, batch_size=batch_size, num_classes=num_classes, label_smoothing=label_smoothing, seed=seed)
        if augmentation.mixes
        else None
    )

    if isinstance(row, registry.Resident):
        images, labels = row.load(source, "train", image_size, num_classes)
        _check_labels(labels, num_classes, source)
        sampler = TrainSampler(len(labels), batch_size, how.rank, how.world_size, seed)
        images, labels = images.to(how.device), labels.to(how.device)
        crop = RandomCropFlip(images, padding=row.padding, flip=row.flip, seed=seed)
        return ResidentLoader(images, labels, sampler, normalize, crop=crop, mix=mix)

    transform = transforms.train_transform(augmentation, image_size, interpolation)
    erasing = augmentation.preset is None and augmentation.reprob > 0
    files = row.open(source, "train", num_classes, how.rank, how.world_size)
    _check_labels(files.labels, num_classes, source)
    sharded = source.zip_mode and source.cache_mode == "part"
    return DecodedLoader(
        Decoded(files, transform, seed),
        TrainSampler(len(files.labels), batch_size, how.rank, how.world_size, seed, sharded),
        normalize,
        mend=mending(source.on_bad_image, replace),
        how=how,
        erase=Erase(augmentation, seed, how.device) if erasing else None,
        mix=mix,
    )


def eval_loader(
    source: Source,
    *,
    image_size: int,
    interpolation: str,
    crop: bool,
    batch_size: int,
    num_classes: int,
    split: str = "val",
    most: int | None = None,
    seed: int = 0,
    **loading: Any,
) -> Loader:
    """Evaluation batches of one rank; over all ranks every image comes exactly once, and the last batch may be smaller.

    Args:
        source: where the images come from.
        image_size: side of the images in pixels.
        interpolation: as for training, but 'random' is bicubic.
        crop: resize the short side to 256/224 of `image_size` before the centre crop, instead of to `image_size`.
        batch_size: most images per step on this rank.
        num_classes: of the model.
        split: whose images; "train" gives training images transformed as in evaluation, where another takes the place
            of one that cannot be read.
        most: how many of them; None = all.
        seed: which ones, where not all.
        loading: see `Loading`.

    Raises:
        UserError: as `describe`; an interpolation that does not exist; an image size that does not fit the data set;
            more classes than `num_classes`.
    """
    how = Loading(**loading)
    row = _find(source, image_size, interpolation)
    normalize = Normalize(row.mean, row.std, how.device, how.memory_format)

    def sampler(num_images: int) -> EvalSampler:
        return EvalSampler(num_images, batch_size, how.rank, how.world_size, most, seed)

    if isinstance(row, registry.Resident):
        images, labels = row.load(source, split, image_size, num_classes)
        _check_labels(labels, num_classes, source)
        return ResidentLoader(images.to(how.device), labels.to(how.device), sampler(len(labels)), normalize)

    files = row.open(source, split, num_classes, how.rank, how.world_size)
    _check_labels(files.labels, num_classes, source)
    return DecodedLoader(
        Decoded(files, transforms.eval_transform(image_size, interpolation, crop=crop), seed=0),  # nothing is random
        sampler(len(files.labels)),
        normalize,
        mend=mending(source.on_bad_image, Blank(image_size) if split == "val" else replace),
        how=how,
    )


def _find(source: Source, image_size: int, interpolation: str) -> registry.Resident | registry.Decoded:
    row = registry.find(source)
    transforms.check_interpolation(interpolation)
    if isinstance(row, registry.Resident) and row.info.image_size not in (None, image_size):
        raise UserError(f"data set {source.dataset!r} has images of size {row.info.image_size}, not {image_size}")
    return row


def _check_labels(labels: Tensor, num_classes: int, source: Source) -> None:
    found = int(labels.max()) + 1
    if found > num_classes:
        raise UserError(f"data set {source.dataset!r} has {found} classes, the model {num_classes}")
