"""What happens to a whole uint8 batch once it is on the device: normalize, erase, mix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from data import seeding
from data.types import Augmentation
from repopt.errors import UserError, unknown
from repopt.images import Normalization


class Normalize:
    """Makes normalized float32 images of a given memory format of uint8 ones."""

    def __init__(
        self, mean: Sequence[float], std: Sequence[float], device: torch.device, memory_format: torch.memory_format
    ) -> None:
        self._normalization, self._memory_format = Normalization(mean, std, device), memory_format

    def __call__(self, images: Any) -> Any:
        """Return the normalized copy of images [B, 3, H, W], or of a list of images [3, H, W]."""
        if isinstance(images, list):
            return [self(image[None])[0] for image in images]
        return self._normalization(images.to(torch.float32, memory_format=self._memory_format))


class Erase:
    """timm's random erasing of normalized images, in place; an image's depends on (seed, epoch, image index) alone.

    Raises:
        UserError: an unknown filling mode.
    """

    def __init__(self, augmentation: Augmentation, seed: int, device: torch.device) -> None:
        from timm.data.random_erasing import RandomErasing

        modes = ("const", "rand", "pixel")
        if augmentation.remode not in modes:
            raise unknown("random erasing mode", augmentation.remode, modes)
        self._erase = RandomErasing(
            augmentation.reprob, mode=augmentation.remode, max_count=augmentation.recount, device=device
        )
        self._seed, self._device = seed, device

    def __call__(self, images: Tensor, targets: Tensor, indices: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        """Erase in float images [B, 3, H, W]; `indices` int64 [B] lies on the CPU."""
        # The noise is drawn on the device, from its global generator.
        with seeding.preserved(), torch.random.fork_rng([self._device] if self._device.type == "cuda" else []):
            for image, index in zip(images, indices.tolist(), strict=True):
                seeding.reseed(self._seed, epoch, seeding.ERASE, index, device=self._device)
                self._erase(image)
        return images, targets


class Mix:
    """timm's mixup and cutmix of a normalized batch, label smoothing included.

    How a batch is mixed depends on (seed, epoch, its first image's index) alone: not on the step or the rank, which
    differ where an epoch goes on after a stop.

    Raises:
        UserError: an odd batch size (images are mixed in pairs), or an unknown mode.
    """

    def __init__(
        self, augmentation: Augmentation, *, batch_size: int, num_classes: int, label_smoothing: float, seed: int
    ) -> None:
        from timm.data.mixup import Mixup

        if batch_size % 2:
            raise UserError(f"mixup and cutmix mix images in pairs: the batch size must be even, not {batch_size}")
        modes = ("batch", "pair", "elem")
        if augmentation.mixup_mode not in modes:
            raise unknown("mixup mode", augmentation.mixup_mode, modes)
        self._mix = Mixup(
            mixup_alpha=augmentation.mixup,
            cutmix_alpha=augmentation.cutmix,
            cutmix_minmax=augmentation.cutmix_minmax,
            prob=augmentation.mixup_prob,
            switch_prob=augmentation.mixup_switch_prob,
            mode=augmentation.mixup_mode,
            label_smoothing=label_smoothing,
            num_classes=num_classes,
        )
        self._seed = seed

    def __call__(self, images: Tensor, labels: Tensor, indices: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        """Return mixed images [B, 3, H, W] and float targets [B, num_classes]."""
        with seeding.preserved():
            seeding.reseed(self._seed, epoch, seeding.MIX, int(indices[0]))
            return self._mix(images, labels)
