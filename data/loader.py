"""What training and evaluation iterate over, wherever the images are kept."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from data import sampler
from data.sampler import EpochSegment, Sampler

BatchAugmentation = Callable[[Tensor, Tensor, Tensor, int], tuple[Tensor, Tensor]]
"""Normalized images and targets of a batch, the images' indices and the epoch -> images and targets."""


class Loader(ABC):
    """Batches of one rank, on the device: `for images, targets in loader`.

    Images are normalized float32 [B, 3, H, W]; targets are int64 [B], or float [B, num_classes] under mixup or cutmix
    (`data.segmentation` and `data.detection` say what theirs are). Iterating never waits for the device. A batch
    follows from the seed, the epoch and its images alone: neither stopping within an epoch, nor workers, nor (but for
    the images that meet in a batch) the number of processes change it.

    In the evaluation of a classifier an unreadable image may come as zeros before normalization, with the target -100,
    which `torch.nn.functional.cross_entropy` ignores; in training another of its batch takes its place.

    Attributes:
        num_images: images of the whole split, over all ranks.
        images_per_batch: images of one (full) batch of every rank together.
        images_seen: images that all processes saw of the chosen epoch before `set_epoch`.
        fingerprint: 16 hexadecimal digits that identify the split's labels (or names, or boxes) in their order, and so
            its content cheaply, and the blocks by which a training goes through it.
        unreadable: name and reason of every unreadable image met so far on this rank.
    """

    def __init__(
        self,
        contents: Tensor,
        batch_sampler: Sampler,
        normalize: Callable[[Any], Any],
        augmentations: Sequence[BatchAugmentation] = (),
    ) -> None:
        self.num_images = batch_sampler.num_images
        self.images_per_batch = batch_sampler.batch_size * batch_sampler.world_size
        identity = [contents] if batch_sampler.blocks is None else [contents, batch_sampler.blocks.ends]
        self.fingerprint = hashlib.sha256(b"".join(t.cpu().numpy().tobytes() for t in identity)).hexdigest()[:16]
        self.unreadable: dict[str, str] = {}
        self._sampler = batch_sampler
        self._normalize, self._augmentations = normalize, augmentations
        self.set_epoch(0)

    def __len__(self) -> int:
        """Return how many batches the next iteration yields on this rank; 0 if nothing is left of the epoch."""
        return len(self._batches)

    def set_epoch(self, epoch: int, seen: Sequence[Mapping[str, Any]] = ()) -> None:
        """Choose what the next iteration goes through.

        Args:
            epoch: its number.
            seen: what to pass over, as `position_after` said in this epoch, perhaps with other numbers of processes
                or images per batch; only for training.

        Raises:
            UserError: `seen`, which may come from a file, is malformed or does not fit the set.
        """
        state = sampler.checked(seen)
        self._batches = self._sampler.batches(epoch, state)
        self._epoch, self._seen = epoch, state
        self.images_seen = sampler.images_seen(state)

    def position_after(self, batches: int) -> list[EpochSegment]:
        """Return the position in the chosen epoch when every rank has taken `batches` of the iteration's batches.

        It is plain data (a list of dicts of int and bool), and does not grow with the number of stops.
        """
        return sampler.advanced(
            self._seen,
            processes=self._sampler.world_size,
            images=batches * self._sampler.batch_size,
            sharded=self._sampler.sharded,
        )

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        epoch = self._epoch
        for images, targets, indices in self._raw_batches(epoch, self._batches):
            images = self._normalize(images)
            for augment in self._augmentations:
                images, targets = augment(images, targets, indices, epoch)
            yield images, targets

    @abstractmethod
    def _raw_batches(self, epoch: int, batches: Sequence[Tensor]) -> Iterator[tuple[Any, Any, Tensor]]:
        """Yield uint8 images [B, 3, H, W] and targets on the device, and int64 image indices [B] on the CPU."""
