"""Parameters that are spread over processes (FSDP2's DTensor): this process's part, and the multiplier for it."""

from __future__ import annotations

import sys

from torch import Tensor

from repopt.csla import GradMult
from repopt.errors import UserError


def local(tensor: Tensor) -> Tensor:
    """What of a tensor lies in this process; the tensor itself, if it is an ordinary one."""
    return tensor.to_local() if _is_sharded(tensor) else tensor


def local_mult(name: str, param: Tensor, mult: GradMult) -> GradMult:
    """The multiplier for what of a parameter lies in this process.

    Raises:
        UserError: the parameter is not split into whole filters.
    """
    if not _is_sharded(param):
        return mult
    start, stop = 0, param.shape[0]
    splits = 0
    for dimension, placement in enumerate(param.placements):
        if placement.is_replicate():
            continue
        splits += 1
        if type(placement).__name__ != "Shard" or placement.dim != 0 or splits > 1:
            raise UserError(
                f"{name!r} is spread over processes as {placement}: a RepOptimizer needs whole filters, split once "
                "along dimension 0 (torch's fully_shard does that)"
            )
        mesh = param.device_mesh
        count = -(-param.shape[0] // mesh.size(dimension))
        start = min(mesh.get_local_rank(dimension) * count, param.shape[0])
        stop = min(start + count, param.shape[0])
    return mult.rows(start, stop)


def _is_sharded(tensor: Tensor) -> bool:
    module = sys.modules.get("torch.distributed.tensor")  # importing it takes a second; without it there is no DTensor
    return module is not None and isinstance(tensor, module.DTensor)
