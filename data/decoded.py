"""Images decoded by worker processes: encoded bytes -> transform -> uint8 batch -> device."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from data.encoded import EncodedImages
from data.loader import Loader
from data.on_device import Erase, Mix, Normalize
from data.samplers import Sampler
from data.transforms import Transform
from repopt import seeding
from repopt.errors import UserError
from repopt.logging import logger

Sample = tuple[Tensor, int, int]  # uint8 [H, W, 3], label, index

NO_LABEL = -100  # torch.nn.functional.cross_entropy's ignore_index


@dataclass(frozen=True)
class Unreadable:
    """What a worker sends in place of an image that cannot be read or decoded."""

    index: int
    name: str
    reason: str


Mend = Callable[[list[Sample | Unreadable]], list[Sample] | None]
"""What becomes of a batch with unreadable images; None refuses it."""


def refuse(samples: list[Sample | Unreadable]) -> None:
    """A batch with an unreadable image is an error."""


def replace(samples: list[Sample | Unreadable]) -> list[Sample] | None:
    """For training: an unreadable image gives its place to the next readable one of the batch, cyclically.

    So batches keep their size, on which mixing in pairs, equal steps of all processes and compiled graphs rely. A batch
    without a readable image is refused: a disk is gone rather than an image.
    """
    if all(isinstance(sample, Unreadable) for sample in samples):
        return None
    return [
        next(sample for sample in samples[k:] + samples[:k] if not isinstance(sample, Unreadable))
        for k in range(len(samples))
    ]


@dataclass(frozen=True)
class Blank:
    """For evaluation: an unreadable image is black and has the label `NO_LABEL`, so that it still counts as an image.

    Attributes:
        image_size: side in pixels.
    """

    image_size: int

    def __call__(self, samples: list[Sample | Unreadable]) -> list[Sample]:
        """The batch without gaps."""
        black = torch.zeros(self.image_size, self.image_size, 3, dtype=torch.uint8)
        return [(black, NO_LABEL, s.index) if isinstance(s, Unreadable) else s for s in samples]


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
            data = self._images.read(index)
            seeding.reseed(self._seed, epoch, seeding.TRANSFORM, index)
            return self._transform(data), int(self._images.labels[index]), index
        except (OSError, SyntaxError, ValueError) as error:  # what Pillow's operations raise at odd images
            reason = " ".join(str(error).split()) or type(error).__name__
            return Unreadable(index, self._images.name(index), reason)


@dataclass(frozen=True)
class Collate:
    """Samples -> a batch, whose unreadable images `mend` mends."""

    mend: Mend

    def __call__(self, samples: list[Sample | Unreadable]) -> tuple[list[Tensor] | None, list[Unreadable]]:
        """uint8 [B, H, W, 3], labels and indices (None where the batch is refused); and what is unreadable."""
        unreadable = [sample for sample in samples if isinstance(sample, Unreadable)]
        whole = self.mend(samples) if unreadable else samples
        return None if whole is None else default_collate(whole), unreadable


class _Batches:
    """The DataLoader's batch sampler, which it keeps as long as its workers: lists of (epoch, index)."""

    def __init__(self) -> None:
        self.epoch, self.batches = 0, ()

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch = self.epoch
        for batch in self.batches:
            yield [(epoch, index) for index in batch.tolist()]


def _heed_only_the_loader(worker: int) -> None:
    """Makes a worker process deaf to the signals that end a run.

    They reach the whole process group, but it is the main process that acts on them, and it still needs batches for its
    last step. SIGTERM from the main process itself counts: at its exit it ends workers so, and waits until they are
    gone. A worker whose main process is gone notices by itself.
    """
    if sys.platform != "linux":
        return  # SIGUSR1 or sigwaitinfo may not exist
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    # A signal handler is not told the sender.
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    threading.Thread(target=_wait_for_the_loaders_end_signal, daemon=True).start()


def _wait_for_the_loaders_end_signal() -> None:
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != os.getppid():
        pass
    os._exit(0)


class DecodedLoader(Loader):
    """A loader whose images worker processes decode; the workers live as long as it does.

    Raises:
        UserError: while iterating, at a batch with unreadable images that `mend` refuses, naming the first.
    """

    def __init__(
        self,
        images: EncodedImages,
        transform: Transform,
        sampler: Sampler,
        normalize: Normalize,
        *,
        mend: Mend,
        device: torch.device,
        seed: int,
        num_workers: int,
        pin_memory: bool,
        erase: Erase | None = None,
        mix: Mix | None = None,
    ) -> None:
        super().__init__(images.labels, sampler, normalize, erase=erase, mix=mix)
        self._device = device
        self._items = _Batches()
        self._workers = DataLoader(
            Decoded(images, transform, seed),
            batch_sampler=self._items,
            collate_fn=Collate(mend),
            num_workers=num_workers,
            worker_init_fn=_heed_only_the_loader,
            persistent_workers=num_workers > 0,
            pin_memory=pin_memory and device.type == "cuda",
            generator=torch.Generator(),  # or each iteration would draw from the global one
        )

    def _raw_batches(self, epoch: int, batches: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        self._items.epoch, self._items.batches = epoch, batches
        for batch, unreadable in self._workers:
            if batch is None:
                first, *others = unreadable
                more = f" and {len(others)} more of its batch" if others else ""
                raise UserError(f"cannot read image {first.name!r} ({first.reason}){more}")
            for image in unreadable:
                if image.name not in self.unreadable:
                    self.unreadable[image.name] = image.reason
                    logger.warning("cannot read image %r (%s)", image.name, image.reason)
            images, labels, indices = batch
            images = images.to(self._device, non_blocking=True).permute(0, 3, 1, 2)
            yield images, labels.to(self._device, non_blocking=True), indices
