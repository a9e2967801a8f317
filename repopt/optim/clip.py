"""Gradient clipping that keeps the equivalence with the CSLA network."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from repopt.csla import GradMult
from repopt.errors import UserError
from repopt.optim.base import check_all_matched
from repopt.optim.shards import local, local_gradient, local_mult, shard_groups


@torch.no_grad()
def clip_grad_norm_(
    named_parameters: Iterable[tuple[str, Tensor]], max_norm: float, grad_mults: Mapping[str, GradMult]
) -> Tensor:
    """Scale the gradients in place so that the norm which the CSLA network's gradients would have is at most max_norm.

    A branch's gradient is ``s_k`` times the merged kernel's, taken where the branch is embedded, so the squared norm
    over all branches is ``sum(M * g^2)`` with the multiplier M of SGD. The plain norm would clip another network.

    Args:
        named_parameters: those of the plain model.
        max_norm: bound of the 2-norm over all gradients.
        grad_mults: of degree 1 (`repopt.grad_mults`), whatever the optimizer's degree; by parameter name.

    Raises:
        UserError: multipliers of another degree, or of a parameter that is not among those named.

    Returns:
        The norm before clipping, a scalar tensor; nothing waits for the device.
    """
    if any(mult.degree != 1 for mult in grad_mults.values()):
        raise UserError(
            "clipping takes the multipliers of degree 1, whatever the optimizer's degree: "
            "repopt.grad_mults(model, scales, degree=1)"
        )
    named_parameters = list(named_parameters)
    names = {name for name, _ in named_parameters}
    check_all_matched({name: mult for name, mult in grad_mults.items() if name not in names})
    trained = [(name, param, param.grad) for name, param in named_parameters if param.grad is not None]
    if not trained:
        return torch.zeros(())
    alike: dict[Any, list[tuple[Tensor, GradMult | None]]] = {}
    for name, param, _ in trained:
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
    norm = torch.stack([square.to(squares[0].device) for square in squares]).sum().sqrt()
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    on_device: dict[torch.device, list[Tensor]] = {}
    for *_, whole in trained:
        gradient = local(whole)
        on_device.setdefault(gradient.device, []).append(gradient)
    for device, gradients in on_device.items():
        torch._foreach_mul_(gradients, factor.to(device))
    return norm


def _squared_norm(members: Sequence[tuple[Tensor, GradMult | None]]) -> Tensor:
    """Return ``sum(M * g^2)`` over gradients of one device and dtype, in little more than one kernel per gradient.

    M is the same for all input channels of a filter, but for the diagonal: so their squares are added up first.
    """
    dtype = torch.promote_types(members[0][0].dtype, torch.float32)  # squares of halves overflow
    plain = [gradient for gradient, mult in members if mult is None]
    pairs: list[tuple[Tensor, ...]] = [
        (mult.filter, torch.linalg.vector_norm(gradient, dim=1, keepdim=True, dtype=dtype))
        for gradient, mult in members
        if mult is not None
    ]
    pairs += [pair for gradient, mult in members if mult is not None for pair in mult.on_diagonal(gradient)]
    if plain:
        norms = torch.stack(torch._foreach_norm(plain, 2, dtype))
        pairs.append((torch.ones_like(norms), norms))
    constants, norms = (torch.cat([tensor.flatten() for tensor in tensors]) for tensors in zip(*pairs, strict=True))
    return (constants * norms.square()).sum()
