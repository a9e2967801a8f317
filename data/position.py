"""What an epoch has been through, as plain data for a checkpoint, whatever the number of processes was."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypedDict

import torch
from torch import Tensor

from repopt.errors import UserError


class Leg(TypedDict):
    """A part of an epoch that went with one number of processes.

    Keys:
        processes: their number W.
        images: how many each process took.
        sharded: whether process r took its images from those with index % W == r, rather than all from one row.
    """

    processes: int
    images: int
    sharded: bool


Position = Sequence[Leg]
"""The legs of an epoch, newest last; () is its beginning."""


def checked(position: Any) -> list[Leg]:
    """A copy of a position, which may come from a file.

    Raises:
        UserError: it is none.
    """
    if not isinstance(position, list | tuple):
        raise UserError("the position in the epoch is no list of legs")
    for number, leg in enumerate(position, 1):
        if (
            not isinstance(leg, dict)
            or leg.keys() != Leg.__annotations__.keys()
            or any(type(leg[key]) is not int or leg[key] < 1 for key in ("processes", "images"))
            or type(leg["sharded"]) is not bool
        ):
            raise UserError(
                f"leg {number} of the position in the epoch is malformed: "
                "expected processes and images (at least 1) and sharded (true or false)"
            )
    return [Leg(**leg) for leg in position]


def after(position: Position, *, processes: int, images: int, sharded: bool) -> list[Leg]:
    """The position when each of `processes` has taken `images` more; legs of one kind are merged."""
    legs = [Leg(**leg) for leg in position]
    if not images:
        return legs
    if legs and (legs[-1]["processes"], legs[-1]["sharded"]) == (processes, sharded):
        legs[-1]["images"] += images
    else:
        legs.append(Leg(processes=processes, images=images, sharded=sharded))
    return legs


def images_seen(position: Position) -> int:
    """Images over all processes."""
    return sum(leg["processes"] * leg["images"] for leg in position)


def remaining(order: Tensor, position: Position) -> Tensor:
    """What is left of an epoch's image indices int64 [N], in their order.

    Raises:
        UserError: the position takes more images than there are.
    """
    rest = order
    for leg in position:
        processes, images = leg["processes"], leg["images"]
        if processes * images > len(rest):
            raise _too_many(order)
        if not leg["sharded"]:
            rest = rest[processes * images :]
            continue
        shard = rest % processes
        sizes = torch.bincount(shard, minlength=processes)
        if sizes.min() < images:
            raise _too_many(order)
        # An image's place in its shard is its place among the images sorted by shard, less where the shard begins.
        by_shard = shard.argsort(stable=True)
        place = torch.arange(len(rest)) - (sizes.cumsum(0) - sizes)[shard[by_shard]]
        rest = rest[by_shard[place >= images].sort().values]
    return rest


def _too_many(order: Tensor) -> UserError:
    return UserError(f"the position in the epoch takes more images than the training set's {len(order)} allow")
