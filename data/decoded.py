"""Images that worker processes decode: a file's bytes -> transform -> uint8 batch -> device."""

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
from data.loader import BatchAugmentation, Loader
from data.sampler import Sampler
from data.types import EncodedImages, LoaderConfig
from repopt.errors import UserError

logger = logging.getLogger("repopt")

Sample = tuple[Any, Any, int]  # uint8 [H, W, 3] (or what becomes one: data.gpu_decode), target, index

NO_LABEL = -100  # torch.nn.functional.cross_entropy's ignore_index


@dataclass(frozen=True)
class Unreadable:
    """What a worker sends in place of an image that cannot be read or decoded."""

    index: int
    name: str
    reason: str


BadSamplePolicy = Callable[[list[Sample | Unreadable]], list[Sample]]
"""What becomes of a batch with unreadable images; a UserError refuses it."""


def raise_on_bad(samples: list[Sample | Unreadable]) -> list[Sample]:
    """Return the samples.

    Raises:
        UserError: one is unreadable; it names the first.
    """
    bad = [sample for sample in samples if isinstance(sample, Unreadable)]
    if bad:
        more = f" and {len(bad) - 1} more of its batch" if len(bad) > 1 else ""
        raise UserError(f"cannot read image {bad[0].name!r} ({bad[0].reason}){more}")
    return [sample for sample in samples if not isinstance(sample, Unreadable)]


def replace_bad(samples: list[Sample | Unreadable]) -> list[Sample]:
    """Give the place of an unreadable image to the next readable one of the batch, cyclically; for training.

    So batches keep their size, on which mixing in pairs, equal steps of all processes and compiled graphs rely. A batch
    without a readable image is refused: a disk is gone rather than an image.
    """
    if all(isinstance(sample, Unreadable) for sample in samples):
        return raise_on_bad(samples)
    return [
        next(sample for sample in samples[k:] + samples[:k] if not isinstance(sample, Unreadable))
        for k in range(len(samples))
    ]


def blank_bad(samples: list[Sample | Unreadable], *, image_size: int) -> list[Sample]:
    """Make unreadable images black, with the label `NO_LABEL`, so that they still count as images; for evaluation."""
    black = torch.zeros(image_size, image_size, 3, dtype=torch.uint8)
    return [(black, NO_LABEL, s.index) if isinstance(s, Unreadable) else s for s in samples]


class ImageDataset(Dataset, ABC):
    """What workers make of the images of one split: item (epoch, index) is a `Sample` or `Unreadable`.

    What `sample` draws depends on (seed, epoch, index) alone, so neither on the worker nor on what it did before.

    Args:
        images: the encoded images.
        contents: int64, of any shape; identifies the split's images and targets in their order.
        seed: of every variation.
    """

    def __init__(self, images: EncodedImages, contents: Tensor, seed: int) -> None:
        self._images, self.contents, self._seed = images, contents, seed
        self.blocks = images.blocks

    def __len__(self) -> int:
        return len(self._images)

    @abstractmethod
    def sample(self, index: int) -> tuple[Any, Any]:
        """Return an image uint8 [H, W, 3] and its target, varied by draws from the global generators.

        Raises:
            OSError, SyntaxError, ValueError: the image cannot be read (what Pillow raises at odd images).
            UserError: the split is refused for it.
        """

    def __getitem__(self, item: tuple[int, int]) -> Sample | Unreadable:
        epoch, index = item
        try:
            seeding.reseed(self._seed, epoch, seeding.TRANSFORM, index)
            return *self.sample(index), index
        except UserError:  # a ValueError too
            raise
        except (OSError, SyntaxError, ValueError) as error:
            return self.unreadable(index, error)

    def unreadable(self, index: int, error: Exception) -> Unreadable:
        """Return what stands for an image that cannot be read."""
        return Unreadable(index, self._images.name(index), " ".join(str(error).split()) or type(error).__name__)

    def __getitems__(self, items: list[tuple[int, int]]) -> list[Sample | Unreadable] | UserError:
        """Return a batch of items, or why it is refused; the global generators are saved once for all of them."""
        with seeding.preserved():
            try:
                self._images.prefetch([index for _, index in items])
                return [self[item] for item in items]
            except UserError as error:
                return error.with_traceback(None)  # raised by the main process: the DataLoader would add a traceback


Batch = tuple[Any, Any, Tensor]  # images, targets, indices
Collated = tuple[Batch, list[Unreadable]] | UserError


def collate(
    samples: list[Sample | Unreadable] | UserError,
    on_bad: BadSamplePolicy,
    join: Callable[[list[Sample]], Batch] = default_collate,
) -> Collated:
    """Return a batch of samples and which of them are unreadable, or why the batch is refused.

    Args:
        samples: from `ImageDataset.__getitems__`.
        on_bad: what becomes of unreadable images.
        join: makes a batch of readable samples; a UserError refuses them.
    """
    if isinstance(samples, UserError):
        return samples
    try:
        return join(on_bad(samples)), [sample for sample in samples if isinstance(sample, Unreadable)]
    except UserError as error:
        return error.with_traceback(None)


class _Batches:
    """The DataLoader's batch sampler, which it keeps as long as its workers: lists of (epoch, index)."""

    epoch: int = 0
    batches: Sequence[Tensor] = ()

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch = self.epoch
        for batch in self.batches:
            yield [(epoch, index) for index in batch.tolist()]


def ignore_stop_signals(worker: int) -> None:
    """Keep a worker process alive at the signals that end a run.

    They reach the whole process group, but it is the main process that acts on them, and it still needs batches for its
    last step. SIGTERM from the main process itself counts: at its exit it ends workers so, and waits until they are
    gone. A worker whose main process is gone notices by itself.
    """
    if sys.platform != "linux":
        return  # SIGUSR1 or sigwaitinfo may not exist
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)

    def end_with_the_main_process() -> None:  # a signal handler is not told the sender
        while signal.sigwaitinfo([signal.SIGTERM]).si_pid != os.getppid():
            pass
        os._exit(0)

    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    threading.Thread(target=end_with_the_main_process, daemon=True).start()


class DecodedLoader(Loader):
    """A loader whose images worker processes decode; the workers live as long as it does.

    Raises:
        UserError: while iterating, at a batch that is refused, for unreadable images naming the first.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        sampler: Sampler,
        normalize: Callable[[Any], Any],
        augmentations: Sequence[BatchAugmentation] = (),
        *,
        collate: Callable[[list[Sample | Unreadable] | UserError], Any],
        cfg: LoaderConfig,
    ) -> None:
        super().__init__(dataset.contents, sampler, normalize, augmentations)
        self._device = cfg.device
        self._items = _Batches()
        self._workers = DataLoader(
            dataset,
            batch_sampler=self._items,
            collate_fn=collate,
            num_workers=cfg.num_workers,
            worker_init_fn=ignore_stop_signals,
            persistent_workers=cfg.num_workers > 0,
            pin_memory=cfg.pin_memory and cfg.device.type == "cuda",
            generator=torch.Generator(),  # or each iteration would draw from the global one
        )

    def _raw_batches(self, epoch: int, batches: Sequence[Tensor]) -> Iterator[Batch]:
        self._items.epoch, self._items.batches = epoch, batches
        for found in self._collated():
            if isinstance(found, UserError):
                raise found
            (images, targets, indices), unreadable = found
            for image in unreadable:
                if image.name not in self.unreadable:
                    self.unreadable[image.name] = image.reason
                    logger.warning("cannot read image %r (%s)", image.name, image.reason)
            images, targets = self._send([images, targets])
            yield (
                [i.permute(2, 0, 1) for i in images] if isinstance(images, list) else images.permute(0, 3, 1, 2),
                targets.long() if isinstance(targets, Tensor) else targets,  # sent as bytes, an eighth of the memory
                indices,
            )

    def _collated(self) -> Iterator[Collated]:
        yield from self._workers

    def _send(self, batch: Any) -> Any:
        if isinstance(batch, list):
            return [self._send(item) for item in batch]
        if isinstance(batch, dict):
            return {key: self._send(item) for key, item in batch.items()}
        return batch.to(self._device, non_blocking=True)
