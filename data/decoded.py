"""Images decoded by worker processes: a file's bytes -> transform -> uint8 batch -> device."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from data import seeding
from data.encoded import EncodedImages
from data.loader import Loader
from data.on_device import Erase, Mix
from data.samplers import Sampler
from data.transforms import Transform
from data.types import Loading
from repopt.errors import UserError

logger = logging.getLogger("repopt")

Sample = tuple[Tensor, Any, int]  # uint8 [H, W, 3], target, index

NO_LABEL = -100  # torch.nn.functional.cross_entropy's ignore_index


@dataclass(frozen=True)
class Unreadable:
    """What a worker sends in place of an image that cannot be read or decoded."""

    index: int
    name: str
    reason: str


@dataclass(frozen=True)
class Refused:
    """What a worker sends in place of a UserError, to whose message the DataLoader would add a traceback."""

    message: str


Mend = Callable[[list[Sample | Unreadable]], list[Sample]]
"""What becomes of a batch with unreadable images; a UserError refuses it."""


def refuse(samples: list[Sample | Unreadable]) -> list[Sample]:
    """A batch with an unreadable image is an error.

    Raises:
        UserError: always, naming the first.
    """
    first, *others = (sample for sample in samples if isinstance(sample, Unreadable))
    more = f" and {len(others)} more of its batch" if others else ""
    raise UserError(f"cannot read image {first.name!r} ({first.reason}){more}")


def replace(samples: list[Sample | Unreadable]) -> list[Sample]:
    """For training: an unreadable image gives its place to the next readable one of the batch, cyclically.

    So batches keep their size, on which mixing in pairs, equal steps of all processes and compiled graphs rely. A batch
    without a readable image is refused: a disk is gone rather than an image.
    """
    if all(isinstance(sample, Unreadable) for sample in samples):
        return refuse(samples)
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


def mending(on_bad_image: str, skip: Mend) -> Mend:
    """What `Source.on_bad_image` asks for, where `skip` is the way to do without an image."""
    return {"skip": skip, "raise": refuse}[on_bad_image]


class Samples(Dataset, ABC):
    """What workers make of the images of one split: item (epoch, index) is a `Sample`, `Unreadable`, or `Refused`.

    What `sample` draws depends on (seed, epoch, index) alone, so neither on the worker nor on what it did before.

    Attributes:
        contents: int64, of any shape; identifies the split's images and targets in their order.
    """

    contents: Tensor

    def __init__(self, seed: int) -> None:
        self._seed = seed

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def name(self, index: int) -> str:
        """What to call an image in a message."""

    @abstractmethod
    def sample(self, index: int) -> tuple[Tensor, Any]:
        """An image uint8 [H, W, 3] and its target, varied by draws from the global generators.

        Raises:
            OSError, SyntaxError, ValueError: the image cannot be read (what Pillow raises at odd images).
            UserError: the split is refused for it.
        """

    def __getitem__(self, item: tuple[int, int]) -> Sample | Unreadable | Refused:
        return self.__getitems__([item])[0]

    def __getitems__(self, items: list[tuple[int, int]]) -> list[Sample | Unreadable | Refused]:
        """A batch of items; the DataLoader prefers it, and the generators are saved once for all of them."""
        with seeding.preserved():
            return [self._get(epoch, index) for epoch, index in items]

    def _get(self, epoch: int, index: int) -> Sample | Unreadable | Refused:
        try:
            seeding.reseed(self._seed, epoch, seeding.TRANSFORM, index)
            return *self.sample(index), index
        except UserError as error:
            return Refused(str(error))
        except (OSError, SyntaxError, ValueError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            return Unreadable(index, self.name(index), reason)


class Decoded(Samples):
    """Images with one label each."""

    def __init__(self, images: EncodedImages, transform: Transform, seed: int) -> None:
        super().__init__(seed)
        self._images, self._transform = images, transform
        self.contents = images.labels

    def __len__(self) -> int:
        return len(self._images.labels)

    def name(self, index: int) -> str:  # noqa: D102
        return self._images.name(index)

    def sample(self, index: int) -> tuple[Tensor, int]:  # noqa: D102
        return self._transform(self._images.read(index)), int(self._images.labels[index])


Join = Callable[[list[Sample]], tuple[Any, Any, Tensor]]
"""Makes a batch of its samples: images, targets and indices; a UserError refuses it."""


@dataclass(frozen=True)
class Collate:
    """Samples -> a batch, whose unreadable images `mend` mends."""

    mend: Mend
    join: Join = default_collate

    def __call__(
        self, samples: list[Sample | Unreadable | Refused]
    ) -> tuple[tuple[Any, Any, Tensor] | Refused, list[Unreadable]]:
        """What `join` makes of the samples, or why the batch is refused; and what is unreadable."""
        unreadable = [sample for sample in samples if isinstance(sample, Unreadable)]
        if refused := next((sample for sample in samples if isinstance(sample, Refused)), None):
            return refused, unreadable
        try:
            return self.join(self.mend(samples) if unreadable else samples), unreadable
        except UserError as error:
            return Refused(str(error)), unreadable


class _Batches:
    """The DataLoader's batch sampler, which it keeps as long as its workers: lists of (epoch, index)."""

    def __init__(self) -> None:
        self.epoch, self.batches = 0, ()

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch = self.epoch
        for batch in self.batches:
            yield [(epoch, index) for index in batch.tolist()]


def heed_only_the_loader(worker: int) -> None:
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
        UserError: while iterating, at a batch that is refused, for unreadable images naming the first.
    """

    def __init__(
        self,
        samples: Samples,
        sampler: Sampler,
        normalize: Callable[[Any], Any],
        *,
        mend: Mend,
        how: Loading,
        join: Join = default_collate,
        erase: Erase | None = None,
        mix: Mix | None = None,
    ) -> None:
        super().__init__(samples.contents, sampler, normalize, erase=erase, mix=mix)
        self._device = how.device
        self._items = _Batches()
        self._workers = DataLoader(
            samples,
            batch_sampler=self._items,
            collate_fn=Collate(mend, join),
            num_workers=how.num_workers,
            worker_init_fn=heed_only_the_loader,
            persistent_workers=how.num_workers > 0,
            pin_memory=how.pin_memory and how.device.type == "cuda",
            generator=torch.Generator(),  # or each iteration would draw from the global one
        )

    def _raw_batches(self, epoch: int, batches: Sequence[Tensor]) -> Iterator[tuple[Any, Any, Tensor]]:
        self._items.epoch, self._items.batches = epoch, batches
        for batch, unreadable in self._workers:
            if isinstance(batch, Refused):
                raise UserError(batch.message)
            for image in unreadable:
                if image.name not in self.unreadable:
                    self.unreadable[image.name] = image.reason
                    logger.warning("cannot read image %r (%s)", image.name, image.reason)
            images, targets, indices = batch
            yield *self._on_device(images, targets), indices

    def _on_device(self, images: Any, targets: Any) -> tuple[Any, Any]:
        """What `join` made, on the device; images with their channels first."""
        return self._send(images).permute(0, 3, 1, 2), self._send(targets)

    def _send(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._device, non_blocking=True)
