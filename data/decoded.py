"""Images decoded by worker processes: encoded bytes -> PIL image -> transform -> uint8 batch -> device."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from data.encoded import EncodedImages
from data.loader import Loader
from data.on_device import Erase, Mix, Normalize
from data.samplers import Sampler
from data.transforms import Transform
from repopt import seeding
from repopt.errors import UserError

Sample = tuple[Tensor, int, int]  # uint8 [3, H, W], label, index


@dataclass(frozen=True)
class Unreadable:
    """What a worker sends in place of an image that cannot be decoded."""

    name: str
    reason: str


class Decoded(Dataset):
    """Item (epoch, index) is a `Sample`, or `Unreadable`.

    What the transform draws depends on (seed, epoch, index) alone, so neither on the worker nor on what it did before.
    """

    def __init__(self, images: EncodedImages, transform: Transform, seed: int) -> None:
        self._images, self._transform, self._seed = images, transform, seed

    def __getitem__(self, item: tuple[int, int]) -> Sample | Unreadable:
        return self.__getitems__([item])[0]

    def __getitems__(self, items: list[tuple[int, int]]) -> list[Sample | Unreadable]:
        """A batch of items; the DataLoader prefers it, and the generators are saved once for all of them."""
        with seeding.preserved():
            return [self._get(epoch, index) for epoch, index in items]

    def _get(self, epoch: int, index: int) -> Sample | Unreadable:
        try:
            image = Image.open(io.BytesIO(self._images.read(index))).convert("RGB")
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # what Pillow raises
            return Unreadable(self._images.name(index), f"{type(error).__name__}: {error}")
        seeding.reseed(self._seed, epoch, seeding.TRANSFORM, index)
        return self._transform(image), int(self._images.labels[index]), index


def _collate(samples: list[Sample | Unreadable]) -> list[Tensor] | Unreadable:
    return next((s for s in samples if isinstance(s, Unreadable)), None) or default_collate(samples)


class _Batches:
    """The DataLoader's batch sampler: `sampler`'s batches of the chosen epoch as lists of (epoch, index)."""

    def __init__(self, sampler: Sampler) -> None:
        self._sampler = sampler
        self.epoch = 0

    def __len__(self) -> int:
        return len(self._sampler)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch = self.epoch
        for batch in self._sampler.batches(epoch):
            yield [(epoch, index) for index in batch.tolist()]


class DecodedLoader(Loader):
    """A loader whose images worker processes decode; the workers live as long as it does.

    Raises:
        UserError: while iterating, at an image that cannot be read, naming it.
    """

    def __init__(
        self,
        images: EncodedImages,
        transform: Transform,
        sampler: Sampler,
        normalize: Normalize,
        *,
        device: torch.device,
        seed: int,
        num_workers: int,
        pin_memory: bool,
        erase: Erase | None = None,
        mix: Mix | None = None,
    ) -> None:
        super().__init__(sampler, normalize, erase=erase, mix=mix)
        self._device = device
        self._batches = _Batches(sampler)
        self._workers = DataLoader(
            Decoded(images, transform, seed),
            batch_sampler=self._batches,
            collate_fn=_collate,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            pin_memory=pin_memory and device.type == "cuda",
            generator=torch.Generator(),  # or each iteration would draw from the global one
        )

    def _raw_batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        self._batches.epoch = epoch
        for batch in self._workers:
            if isinstance(batch, Unreadable):
                raise UserError(f"cannot read image {batch.name!r} ({batch.reason})")
            images, labels, indices = batch
            yield images.to(self._device, non_blocking=True), labels.to(self._device, non_blocking=True), indices
