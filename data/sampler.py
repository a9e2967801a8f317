"""Which images a process (rank) takes in an epoch, in what order and in which batches, and how far an epoch has got.

The `SamplerState` is plain data for a checkpoint. It says what all ranks have taken of an epoch's order, which follows
from the seed, so an epoch goes on with any number of processes and any batch size. torchdata's loader with state does
not take its state across ranks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypedDict

import torch
from torch import Tensor

from data import seeding
from repopt.errors import UserError


class EpochSegment(TypedDict):
    """A part of an epoch that went with one number of processes.

    Keys:
        processes: their number W.
        images: how many each process took.
        sharded: whether process r took its images from those with index % W == r, rather than all from one row.
    """

    processes: int
    images: int
    sharded: bool


SamplerState = Sequence[EpochSegment]
"""The segments of an epoch, newest last; () is its beginning."""


def checked(state: Sequence[Mapping[str, Any]]) -> list[EpochSegment]:
    """Return a copy of a state, which may come from a file.

    Raises:
        UserError: it is none.
    """
    if not isinstance(state, list | tuple):
        raise UserError("the position in the epoch is no list of segments")
    for number, segment in enumerate(state, 1):
        if (
            not isinstance(segment, dict)
            or segment.keys() != EpochSegment.__annotations__.keys()
            or any(type(segment[key]) is not int or segment[key] < 1 for key in ("processes", "images"))
            or type(segment["sharded"]) is not bool
        ):
            raise UserError(
                f"segment {number} of the position in the epoch is malformed: "
                "expected processes and images (at least 1) and sharded (true or false)"
            )
    return [EpochSegment(processes=s["processes"], images=s["images"], sharded=s["sharded"]) for s in state]


def advanced(state: SamplerState, *, processes: int, images: int, sharded: bool) -> list[EpochSegment]:
    """Return the state when each of `processes` has taken `images` more; segments of one kind are merged."""
    segments = [segment.copy() for segment in state]
    if images and segments and (segments[-1]["processes"], segments[-1]["sharded"]) == (processes, sharded):
        segments[-1]["images"] += images
    elif images:
        segments.append(EpochSegment(processes=processes, images=images, sharded=sharded))
    return segments


def images_seen(state: SamplerState) -> int:
    """Return the number of images that all processes took."""
    return sum(segment["processes"] * segment["images"] for segment in state)


def remaining(order: Tensor, state: SamplerState) -> Tensor:
    """Return what is left of an epoch's image indices int64 [N], in their order.

    Raises:
        UserError: the state takes more images than there are.
    """
    rest = order
    too_many = UserError(f"the position in the epoch takes more images than the training set's {len(order)} allow")
    for segment in state:
        processes, images = segment["processes"], segment["images"]
        if processes * images > len(rest):
            raise too_many
        if not segment["sharded"]:
            rest = rest[processes * images :]
            continue
        shard = rest % processes
        sizes = torch.bincount(shard, minlength=processes)
        if sizes.min() < images:
            raise too_many
        # An image's place in its shard is its place among the images sorted by shard, less where the shard begins.
        by_shard = shard.argsort(stable=True)
        place = torch.arange(len(rest)) - (sizes.cumsum(0) - sizes)[shard[by_shard]]
        rest = rest[by_shard[place >= images].sort().values]
    return rest


LANES = 8  # that an order by blocks goes through side by side


@dataclass(frozen=True)
class Blocks:
    """Images that are read together: each block is a run of images.

    Attributes:
        ends: int64 [B], the number of each block's last image + 1.
        window: blocks of a lane whose images are mixed.
    """

    ends: Tensor
    window: int

    def order(self, generator: torch.Generator) -> Tensor:
        """Return all images int64 [N], in a random order in which few blocks are open at a time.

        The blocks are dealt to lanes at random. Each of a lane's images comes at its block's place in the lane, delayed
        by up to a window: so blocks open and close one by one. The lanes take turns, image by image: of processes that
        take turns, too, each meets the blocks of its own lanes.
        """
        sizes = torch.diff(self.ends, prepend=torch.zeros(1, dtype=torch.int64))
        dealt = torch.randperm(len(sizes), generator=generator).repeat_interleave(sizes)  # each image's block's place
        lane, count = dealt % LANES, len(dealt)
        delay = self.window * torch.rand(count, generator=generator, dtype=torch.float64)
        by_lane = (dealt // LANES + delay).argsort()
        by_lane = by_lane[lane[by_lane].argsort(stable=True)]
        lengths = lane.bincount(minlength=LANES)
        turn = torch.arange(count) - (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
        return by_lane[(turn * LANES + lane[by_lane]).argsort()]

    def held(self, processes: int) -> int:
        """Return how many blocks a process has to hold to meet each once."""
        return LANES // math.gcd(LANES, processes) * (self.window + 2)


@dataclass(frozen=True)
class TrainSampler:
    """Full batches in the order that (seed, epoch) alone gives; every rank takes the same number.

    There is one order of all images, a permutation or one by blocks. Step t of all ranks is its t-th segment, so the
    images are the same whatever the number of ranks that share a global batch. With `sharded`, a rank goes through its
    own (r::world, those it caches) in that order.

    Raises:
        UserError: the set holds less than one global batch.
    """

    num_images: int
    batch_size: int
    rank: int
    world_size: int
    seed: int
    sharded: bool = False
    blocks: Blocks | None = None

    def __post_init__(self) -> None:
        assert 0 <= self.rank < self.world_size
        if self.num_images < self.batch_size * self.world_size:
            raise UserError(
                f"the training set has {self.num_images} images, fewer than one step takes "
                f"(batch size {self.batch_size} x {self.world_size} processes)"
            )

    def batches(self, epoch: int, seen: SamplerState = ()) -> Sequence[Tensor]:
        """Return tensors of `batch_size` indices, as many as every rank can fill from what is left; none may be.

        Unsharded, less than a global batch is dropped. Sharded, the epoch ends where some rank has less than a batch;
        after segments with other numbers of processes, the ranks' shares of the rest differ (by some
        sqrt(num_images / world_size)), and what the others have beyond that is dropped too.

        Raises:
            UserError: `seen` takes more images than there are.
        """
        generator = seeding.generator(self.seed, epoch, seeding.ORDER)
        order = self.blocks.order(generator) if self.blocks else torch.randperm(self.num_images, generator=generator)
        rest = remaining(order, seen)
        if self.sharded:
            shard = rest % self.world_size
            steps = int(torch.bincount(shard, minlength=self.world_size).min()) // self.batch_size
            own = rest[shard == self.rank]
            return own[: steps * self.batch_size].view(steps, self.batch_size).unbind()
        steps = len(rest) // (self.batch_size * self.world_size)
        used = rest[: steps * self.world_size * self.batch_size]
        if self.blocks:  # whose lanes take turns as the ranks do
            return used.view(steps, self.batch_size, self.world_size)[:, :, self.rank].unbind()
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
    blocks: ClassVar[None] = None

    def batches(self, epoch: int, seen: SamplerState = ()) -> Sequence[Tensor]:
        """Return the same batches in every epoch."""
        assert not seen, "an evaluation is gone through whole"
        images = torch.arange(self.num_images)
        if self.max_images is not None:
            order = torch.randperm(self.num_images, generator=seeding.generator(self.seed, seeding.SAMPLE))
            images = order[: self.max_images]
        shard = images[self.rank :: self.world_size]
        return shard.split(self.batch_size) if len(shard) else ()


Sampler = TrainSampler | EvalSampler
