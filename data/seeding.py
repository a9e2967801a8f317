"""Randomness as a function of named numbers (seed, epoch, image ...), wherever and in whatever order it is drawn."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

# The purposes that draw from the same (seed, epoch): their own streams, or crops would correlate with the order.
ORDER, CROP, TRANSFORM, ERASE, MIX, MODEL, SAMPLE = range(7)


def derive(*numbers: int) -> int:
    """Return one 64-bit seed from several non-negative integers; close numbers give unrelated seeds."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


def generator(*numbers: int) -> torch.Generator:
    """Return a CPU generator of its own, seeded from the numbers."""
    return torch.Generator().manual_seed(derive(*numbers) >> 1)  # torch takes signed 64-bit seeds


def reseed(*numbers: int, device: torch.device | None = None) -> None:
    """Make the global generators of `random`, numpy and torch, and that of a GPU, a function of the numbers.

    torchvision and timm draw from the global generators, each from a different one.
    """
    seed = derive(*numbers)
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    torch.default_generator.manual_seed(seed >> 1)
    if device is not None and device.type == "cuda":
        torch.cuda.manual_seed(seed >> 1)


@contextmanager
def preserved() -> Iterator[None]:
    """Leave the three global generators as they were before; once per batch, since numpy takes 0.1 ms."""
    states = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.default_generator.set_state(states[2])
