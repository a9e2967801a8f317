"""Parameters that are spread over processes (FSDP2's DTensor): this process's part, and the multiplier for it."""

from __future__ import annotations

import sys

import torch.distributed as dist
from torch import Tensor

from repopt.csla import GradMult
from repopt.errors import UserError


def local(tensor: Tensor) -> Tensor:
    """What of a tensor lies in this process; the tensor itself, if it is an ordinary one."""
    return tensor.to_local() if _is_sharded(tensor) else tensor


def local_gradient(param: Tensor) -> Tensor:
    """What of a parameter's gradient belongs to `local` of the parameter, summed over processes where that is left."""
    gradient = param.grad
    if _is_sharded(gradient) and gradient.placements != param.placements:
        gradient = gradient.redistribute(placements=param.placements)
    return local(gradient)


def local_mult(name: str, param: Tensor, mult: GradMult) -> GradMult:
    """The multiplier for what of a parameter lies in this process.

    Raises:
        UserError: the parameter is not split into whole filters.
    """
    if not _is_sharded(param):
        return mult
    split = [(place, placement) for place, placement in enumerate(param.placements) if not placement.is_replicate()]
    if any(not placement.is_shard(0) for _, placement in split) or len(split) > 1:
        raise UserError(
            f"{name!r} is spread over processes as {param.placements}: a RepOptimizer needs whole filters, split once "
            "along dimension 0 (torch's fully_shard does that)"
        )
    start, count = 0, param.shape[0]
    for place, _ in split:
        count = -(-param.shape[0] // param.device_mesh.size(place))
        start = param.device_mesh.get_local_rank(place) * count
    return mult.rows(start, start + count)


def shard_groups(param: Tensor) -> tuple[dist.ProcessGroup, ...]:
    """The groups of processes over which a parameter is spread; none of an ordinary one."""
    if not _is_sharded(param):
        return ()
    placements = enumerate(param.placements)
    return tuple(param.device_mesh.get_group(place) for place, placement in placements if not placement.is_replicate())


def _is_sharded(tensor: Tensor) -> bool:
    module = sys.modules.get("torch.distributed.tensor")  # importing it takes a second; without it there is no DTensor
    return module is not None and isinstance(tensor, module.DTensor)
