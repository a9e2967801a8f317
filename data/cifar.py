"""CIFAR-100: torchvision's reader (and downloader), the whole set as one tensor."""

from __future__ import annotations

import torch
from torch import Tensor

from data.obtain import fetch
from repopt.errors import UserError

SIZE = 32
NUM_CLASSES = 100

MEAN = (0.50707516, 0.48654887, 0.44091784)
STD = (0.26733429, 0.25643846, 0.27615047)


def load(root: str, split: str) -> tuple[Tensor, Tensor]:
    """Return uint8 images [N, 3, 32, 32] and int64 labels [N] of 'train' or 'val'.

    A set that is absent from `root` is downloaded into it, by the first process of each node while the others wait.

    Raises:
        UserError: no root was given, or the set is neither there nor to be had.
    """
    from torchvision.datasets import CIFAR100

    train = split == "train"
    problem = fetch("cf100", root, lambda: CIFAR100(root, train=train, download=True))
    try:
        data = CIFAR100(root, train=train)
    except RuntimeError as error:
        raise UserError(f"CIFAR-100 is not (or not whole) in {root!r}{problem}") from error
    return torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(data.targets)
