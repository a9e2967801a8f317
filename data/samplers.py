"""Which images a process (rank) sees in an epoch, in what order and in which batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from data import seeding
from data.position import Position, remaining
from repopt.errors import UserError


class Sampler(Protocol):
    """The batches of one rank.

    Attributes:
        num_images: of the whole split.
        batch_size: most images in a batch.
        world_size: number of ranks.
        sharded: whether rank r has only images with index % world_size == r.
    """

    num_images: int
    batch_size: int
    world_size: int
    sharded: bool

    def batches(self, epoch: int, seen: Position = ()) -> Sequence[Tensor]:
        """The batches of what is left of the epoch, each an int64 tensor of image indices."""
        ...


@dataclass(frozen=True)
class TrainSampler:
    """Full batches in the order that (seed, epoch) alone gives; every rank takes the same number.

    There is one permutation of all images. Step t of all ranks is the t-th stretch of it, so the images are the same
    whatever the number of ranks that share a global batch. With `sharded`, a rank goes through its own (r::world, those
    it caches) in the permutation's order.

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
        if self.num_images < self.batch_size * self.world_size:
            raise UserError(
                f"the training set has {self.num_images} images, fewer than one step takes "
                f"(batch size {self.batch_size} x {self.world_size} processes)"
            )

    def batches(self, epoch: int, seen: Position = ()) -> Sequence[Tensor]:
        """Tensors of `batch_size` indices, as many as every rank can fill from what is left; none may be.

        Unsharded, less than a global batch is left out. Sharded, the epoch ends where some rank has less than a batch;
        after legs with other numbers of processes, the ranks' shares of the rest differ (by some
        sqrt(num_images / world_size)), and what the others have beyond that is left out too.

        Raises:
            UserError: `seen` takes more images than there are.
        """
        order = torch.randperm(self.num_images, generator=seeding.generator(self.seed, epoch, seeding.ORDER))
        rest = remaining(order, seen)
        if self.sharded:
            shard = rest % self.world_size
            steps = int(torch.bincount(shard, minlength=self.world_size).min()) // self.batch_size
            own = rest[shard == self.rank]
            return own[: steps * self.batch_size].view(steps, self.batch_size).unbind()
        steps = len(rest) // (self.batch_size * self.world_size)
        used = rest[: steps * self.world_size * self.batch_size]
        return used.view(steps, self.world_size, self.batch_size)[:, self.rank].unbind()


@dataclass(frozen=True)
class EvalSampler:
    """Images rank::world_size in order: every image on exactly one rank, none padded, the last batch as it falls.

    With `max_images`, of as many images, drawn by the seed alone (all, where there are no more).
    """

    num_images: int
    batch_size: int
    rank: int
    world_size: int
    max_images: int | None = None
    seed: int = 0
    sharded: ClassVar[bool] = True

    def batches(self, epoch: int, seen: Position = ()) -> Sequence[Tensor]:
        """The same batches in every epoch."""
        assert not seen, "an evaluation is gone through whole"
        images = torch.arange(self.num_images)
        if self.max_images is not None:
            order = torch.randperm(self.num_images, generator=seeding.generator(self.seed, seeding.SAMPLE))
            images = order[: self.max_images]
        shard = images[self.rank :: self.world_size]
        return shard.split(self.batch_size) if len(shard) else ()
