"""The norm of the gradients that the equivalent multi-branch network has, from those of the plain one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from repopt.csla import Multiplier
from repopt.optim.shards import local_gradient, local_mult, shard_groups


def multi_branch_norm(named_parameters: Iterable[tuple[str, Tensor]], grad_mults: Mapping[str, Multiplier]) -> Tensor:
    """Return the 2-norm over all gradients of the multi-branch network, a scalar; nothing waits for the device.

    A branch's gradient is ``A_k^T(s_k G)``, so the squared norm over all branches is ``<G, P G>`` with the multiplier P
    of SGD: ``sum(M * G^2)`` where it is one number per entry.

    Args:
        named_parameters: those of the plain model; parameters without a gradient are passed over.
        grad_mults: of degree 1, by parameter name.
    """
    alike: dict[Any, list[tuple[Tensor, Multiplier | None]]] = {}
    for name, param in named_parameters:
        if param.grad is None:
            continue
        gradient, mult = local_gradient(param), grad_mults.get(name)
        if mult is not None:
            mult = local_mult(name, param, mult).to_like(gradient)
        alike.setdefault((gradient.device, gradient.dtype, shard_groups(param)), []).append((gradient, mult))
    squares = []
    for (*_, groups), members in alike.items():
        square = _squared_norm(members)
        for group in groups:
            dist.all_reduce(square, group=group)
        squares.append(square)
    if not squares:
        return torch.zeros(())
    return torch.stack([square.to(squares[0].device) for square in squares]).sum().sqrt()


def plain_norm(params: Iterable[Tensor]) -> Tensor:
    """Return the 2-norm over the gradients of parameters, those without one passed over, a scalar."""
    return nn.utils.get_total_norm([param.grad for param in params if param.grad is not None])


def clip_factor(norm: Tensor, max_norm: float) -> Tensor:
    """Return what gradients of a norm are multiplied by, so that it is at most `max_norm`; as torch's clipping does."""
    return (max_norm / (norm + 1e-6)).clamp(max=1.0)


def _squared_norm(members: Sequence[tuple[Tensor, Multiplier | None]]) -> Tensor:
    """Return ``<G, P G>`` over gradients of one device and dtype, in little more than one kernel per gradient."""
    dtype = torch.promote_types(members[0][0].dtype, torch.float32)  # squares of halves overflow
    plain = [gradient for gradient, mult in members if mult is None]
    pairs = [pair for gradient, mult in members if mult is not None for pair in mult.squares(gradient, dtype)]
    if plain:
        norms = torch.stack(torch._foreach_norm(plain, 2, dtype))
        pairs.append((torch.ones_like(norms), norms))
    constants, norms = (torch.cat([tensor.flatten() for tensor in tensors]) for tensors in zip(*pairs, strict=True))
    return (constants * norms.square()).sum()
