"""What training and evaluation iterate over, wherever the images are kept."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

from torch import Tensor

from data.on_device import Erase, Mix, Normalize
from data.samplers import Sampler


class Loader(ABC):
    """Batches of one rank, on the device: `for images, targets in loader`.

    Images are normalised float32 [B, 3, H, W]; targets are int64 [B], or float [B, num_classes] under mixup or cutmix.
    Iterating never waits for the device.

    Attributes:
        num_images: images of the whole split, over all ranks.
    """

    def __init__(
        self, sampler: Sampler, normalize: Normalize, *, erase: Erase | None = None, mix: Mix | None = None
    ) -> None:
        self.num_images = sampler.num_images
        self._sampler = sampler
        self._epoch = 0
        self._normalize, self._erase, self._mix = normalize, erase, mix

    def __len__(self) -> int:
        """Steps per epoch on this rank."""
        return len(self._sampler)

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch that the next iteration goes through."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        epoch = self._epoch
        for step, (images, targets, indices) in enumerate(self._raw_batches(epoch)):
            images = self._normalize(images)
            if self._erase:
                self._erase(images, indices, epoch)
            if self._mix:
                images, targets = self._mix(images, targets, epoch, step)
            yield images, targets

    @abstractmethod
    def _raw_batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """uint8 images [B, 3, H, W] and int64 labels [B] on the device, int64 image indices [B] on the CPU."""
