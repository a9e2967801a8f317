"""Random images, for benchmarks and smoke runs: the same in every process and at every call."""

from __future__ import annotations

import torch
from torch import Tensor

NUM_TRAIN, NUM_VAL = 512, 128


def load(split: str, *, image_size: int, num_classes: int) -> tuple[Tensor, Tensor]:
    """Return uint8 images [N, 3, image_size, image_size] and int64 labels [N] of 'train' or 'val'."""
    num_images, seed = {"train": (NUM_TRAIN, 0), "val": (NUM_VAL, 1)}[split]
    rng = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (num_images, 3, image_size, image_size), dtype=torch.uint8, generator=rng)
    return images, torch.randint(num_classes, (num_images,), generator=rng)
