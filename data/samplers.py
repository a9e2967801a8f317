"""Which images a process (rank) sees in an epoch, in what order and in which batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from repopt import seeding
from repopt.errors import UserError


class Sampler(Protocol):
    """The batches of one rank."""

    num_images: int

    def __len__(self) -> int:
        """Batches per epoch."""
        ...

    def batches(self, epoch: int) -> Sequence[Tensor]:
        """The epoch's batches, each an int64 tensor of image indices."""
        ...


@dataclass(frozen=True)
class TrainSampler:
    """Full batches in the order that (seed, epoch) alone gives; every rank takes the same number.

    The images of step t, over all ranks, are the t-th stretch of one permutation, so they are the same whatever the
    number of ranks that share a global batch. With `sharded`, a rank draws only from the images it caches (r::world).

    Raises:
        UserError: the set holds less than one global batch.
    """

    num_images: int
    batch_size: int
    rank: int
    world_size: int
    seed: int
    sharded: bool = False

    def __post_init__(self) -> None:
        assert 0 <= self.rank < self.world_size
        if not len(self):
            raise UserError(
                f"the training set has {self.num_images} images, fewer than one step takes "
                f"(batch size {self.batch_size} x {self.world_size} processes)"
            )

    def __len__(self) -> int:
        return self.num_images // (self.batch_size * self.world_size)

    def batches(self, epoch: int) -> Sequence[Tensor]:
        """`len(self)` tensors of `batch_size` indices; the images beyond the last full global batch are left out."""
        if self.sharded:
            shard = torch.arange(self.rank, self.num_images, self.world_size)
            order = torch.randperm(len(shard), generator=seeding.generator(self.seed, epoch, seeding.ORDER, self.rank))
            return shard[order[: len(self) * self.batch_size]].view(len(self), self.batch_size).unbind()
        order = torch.randperm(self.num_images, generator=seeding.generator(self.seed, epoch, seeding.ORDER))
        used = order[: len(self) * self.world_size * self.batch_size]
        return used.view(len(self), self.world_size, self.batch_size)[:, self.rank].unbind()


@dataclass(frozen=True)
class EvalSampler:
    """Images rank::world_size in order: every image on exactly one rank, none padded, the last batch as it falls."""

    num_images: int
    batch_size: int
    rank: int
    world_size: int

    def __len__(self) -> int:
        return -(-len(range(self.rank, self.num_images, self.world_size)) // self.batch_size)

    def batches(self, epoch: int) -> Sequence[Tensor]:
        """The same batches in every epoch."""
        shard = torch.arange(self.num_images)[self.rank :: self.world_size]
        return shard.split(self.batch_size) if len(shard) else ()
