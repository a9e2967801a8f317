"""Gradient clipping that keeps the equivalence with the imagined CSLA network."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from repopt.csla import GradMult
from repopt.errors import UserError
from repopt.optim.base import refuse_unclaimed
from repopt.optim.shards import local, local_gradient, local_mult, sum_over_shards


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
    refuse_unclaimed({name: mult for name, mult in grad_mults.items() if name not in names})
    trained = [(name, param) for name, param in named_parameters if param.grad is not None]
    if not trained:
        return torch.zeros(())
    squares = []
    for name, param in trained:
        gradient = local_gradient(param)
        gradient = gradient.to(torch.promote_types(gradient.dtype, torch.float32))  # squares of halves overflow
        mult, weighted = grad_mults.get(name), gradient
        if mult is not None:
            weighted = local_mult(name, param, mult).beside(gradient)(gradient)
        squares.append(sum_over_shards(torch.sum(weighted * gradient), param))
    norm = torch.stack([square.to(squares[0].device) for square in squares]).sum().sqrt()
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for _, param in trained:
        local(param.grad).mul_(factor.to(param.device))
    return norm
