"""Images that live on the device: the whole set is one uint8 tensor there, and batches are gathered and cropped there."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from data import seeding
from data.loader import Loader
from data.on_device import Mix, Normalize
from data.samplers import Sampler


class RandomCropFlip:
    """Random crops of zero-padded images, and mirror images of half of them, as whole-batch tensor operations.

    Args:
        images: uint8 [N, 3, H, W].
        padding: black pixels added on each side; a crop has the images' own size.
        flip: whether to mirror.
        seed: with the epoch and the image's index it alone decides the image's crop.
    """

    def __init__(self, images: Tensor, *, padding: int, flip: bool, seed: int) -> None:
        height, width = images.shape[2:]
        padded = F.pad(images, [padding] * 4)
        self._windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # a view: [N, 3, y, x, H, W]
        self._flip, self._seed = flip, seed

    def draw(self, epoch: int) -> tuple[Tensor, Tensor]:
        """The epoch's offsets int64 [2, N] (y, x) and mirrorings bool [N] of the whole set, on the CPU."""
        rng = seeding.generator(self._seed, epoch, seeding.CROP)
        num_images, _, num_offsets = self._windows.shape[:3]
        offsets = torch.randint(num_offsets, (2, num_images), generator=rng)
        mirrored = torch.rand(num_images, generator=rng) < 0.5
        return offsets, mirrored if self._flip else torch.zeros_like(mirrored)

    def __call__(self, indices: Tensor, offsets: Tensor, mirrored: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] of the images at `indices`, from the draws of the whole set on the device."""
        y, x = offsets[:, indices]
        images = self._windows[indices, :, y, x]
        return torch.where(mirrored[indices, None, None, None], images.flip(3), images) if self._flip else images


class ResidentLoader(Loader):
    """A loader over images [N, 3, H, W] (uint8) and labels [N] (int64) on the device; `crop` varies training images."""

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        sampler: Sampler,
        normalize: Normalize,
        *,
        crop: RandomCropFlip | None = None,
        mix: Mix | None = None,
    ) -> None:
        super().__init__(sampler, normalize, mix=mix)
        self._images, self._labels, self._crop = images, labels, crop

    def _raw_batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        batches = self._sampler.batches(epoch)
        if not batches:
            return
        # One transfer of the epoch's indices and draws, not one per step.
        on_device = self._send(torch.cat(tuple(batches))).split([len(b) for b in batches])
        draws = tuple(self._send(draw) for draw in self._crop.draw(epoch)) if self._crop else ()
        for indices, here in zip(batches, on_device, strict=True):
            images = self._crop(here, *draws) if self._crop else self._images[here]
            yield images, self._labels[here], indices

    def _send(self, tensor: Tensor) -> Tensor:
        device = self._images.device
        return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)
