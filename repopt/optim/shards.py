"""Parameters that are spread over processes (FSDP2's DTensor): this process's part, and the multiplier for it."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import torch.distributed as dist
from torch import Tensor
from typing_extensions import TypeIs

from repopt.csla import Multiplier
from repopt.errors import UserError

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def local(tensor: Tensor) -> Tensor:
    """Return what of a tensor lies in this process; the tensor itself, if it is an ordinary one."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def local_gradient(param: Tensor) -> Tensor:
    """Return the gradient of `local` of a parameter, summed over processes where that is left to do."""
    gradient = param.grad
    assert gradient is not None
    if is_sharded(gradient) and is_sharded(param) and gradient.placements != param.placements:
        gradient = gradient.redistribute(placements=param.placements)
    return local(gradient)


def local_mult(name: str, param: Tensor, mult: Multiplier) -> Multiplier:
    """Return the multiplier for what of a parameter lies in this process.

    Raises:
        UserError: the parameter is not split into whole filters, or the multiplier mixes filters.
    """
    split = _split_dims(param)
    if not is_sharded(param) or not split:
        return mult
    if len(split) > 1 or not param.placements[split[0]].is_shard(0):
        raise UserError(
            f"{name!r} is spread over processes as {param.placements}: a RepOptimizer needs whole filters, split once "
            "along dimension 0 (torch's fully_shard does that)"
        )
    count = -(-param.shape[0] // param.device_mesh.size(split[0]))
    start = param.device_mesh.get_local_rank(split[0]) * count
    return mult.rows(start, start + count)


def shard_groups(param: Tensor) -> tuple[dist.ProcessGroup, ...]:
    """Return the groups of processes over which a parameter is spread; none of an ordinary one."""
    return tuple(param.device_mesh.get_group(dim) for dim in _split_dims(param)) if is_sharded(param) else ()


def _split_dims(param: Tensor) -> list[int]:
    """Return the dimensions of the mesh of processes along which a parameter is not the same everywhere."""
    placements = param.placements if is_sharded(param) else ()
    return [dim for dim, placement in enumerate(placements) if not placement.is_replicate()]


def is_sharded(tensor: Tensor) -> TypeIs[DTensor]:
    """Return whether a tensor is spread over processes, or the same in all of them, as a DTensor is."""
    module = sys.modules.get("torch.distributed.tensor")  # without it there is no DTensor
    return module is not None and isinstance(tensor, module.DTensor)
