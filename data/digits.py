"""scikit-learn's handwritten digits: 1,797 real 8x8 images that come with the library, brought to 3x32x32."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

SIZE = 32
NUM_CLASSES = 10
NUM_TRAIN, NUM_VAL = 300, 1497

# Measured on the 300 training images, after enlargement.
MEAN = (0.3024, 0.3024, 0.3024)
STD = (0.3217, 0.3217, 0.3217)


def load(split: str) -> tuple[Tensor, Tensor]:
    """Return uint8 images [N, 3, 32, 32] and int64 labels [N] of 'train' or 'val', a fixed stratified split."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    train, val = train_test_split(
        range(len(digits.target)), train_size=NUM_TRAIN, random_state=0, stratify=digits.target
    )
    chosen = {"train": train, "val": val}[split]
    small = torch.from_numpy(digits.images[chosen]).float().unsqueeze(1) * (255 / 16)  # grey levels 0..16
    images = F.interpolate(small, size=SIZE, mode="bilinear", align_corners=False).round().to(torch.uint8)
    return images.repeat(1, 3, 1, 1), torch.from_numpy(digits.target[chosen]).long()
