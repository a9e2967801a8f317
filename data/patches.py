"""Crops of scikit-learn's two photographs, which come with the library: natural images without a download.

Each photograph (427 x 640) is cut into 2 x 2 regions of 213 x 320, and a crop's class is its region: 8 classes. A
region has 13 x 20 crops of 16 x 16 pixels side by side, brought to 32 x 32. Every fourth is for training, on a lattice
that covers the region evenly. No pixel is in two crops.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

SIZE = 32
NUM_CLASSES = 8
NUM_TRAIN, NUM_VAL = 520, 1560

CROP = 16
REGION = (213, 320)

# Measured on the 520 training images, after enlargement.
MEAN = (0.3903, 0.4299, 0.3890)
STD = (0.3697, 0.2960, 0.3236)


def load(split: str) -> tuple[Tensor, Tensor]:
    """Return uint8 images [N, 3, 32, 32] and int64 labels [N] of 'train' or 'val', 65 or 195 of each class."""
    crops = _regions().unfold(2, CROP, CROP).unfold(3, CROP, CROP)  # [8, 3, 13, 20, 16, 16]
    row, column = torch.arange(crops.shape[2])[:, None], torch.arange(crops.shape[3])
    training = (column + 2 * row) % 4 == 0
    chosen = crops.movedim(1, 3)[:, {"train": training, "val": ~training}[split]]  # [8, of each, 3, 16, 16]
    small = chosen.flatten(0, 1).float()
    images = F.interpolate(small, size=SIZE, mode="bilinear", align_corners=False).round().to(torch.uint8)
    return images, torch.arange(NUM_CLASSES).repeat_interleave(chosen.shape[1])


def _regions() -> Tensor:
    """Return uint8 [8, 3, 213, 320]: photograph by photograph, from the top left to the bottom right."""
    from sklearn.datasets import load_sample_images

    height, width = REGION
    photographs = torch.from_numpy(np.stack(load_sample_images().images))
    rows = photographs.permute(0, 3, 1, 2).split(height, 2)[:2]  # the last row of pixels is left out
    return torch.stack([region for row in rows for region in row.split(width, 3)], 1).flatten(0, 1)
