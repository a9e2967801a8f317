"""Gradient clipping that keeps the equivalence with the imagined CSLA network."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from repopt.csla import GradMult
from repopt.errors import UserError


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
        UserError: multipliers of another degree.

    Returns:
        The norm before clipping, a scalar tensor; nothing waits for the device.
    """
    if any(mult.degree != 1 for mult in grad_mults.values()):
        raise UserError(
            "clipping takes the multipliers of degree 1, whatever the optimizer's degree: "
            "repopt.grad_mults(model, scales, degree=1)"
        )
    gradients = {name: p.grad for name, p in named_parameters if p.grad is not None}
    if not gradients:
        return torch.zeros(())
    squares = []
    for name, gradient in gradients.items():
        mult = grad_mults.get(name)
        weighted = gradient if mult is None else mult.to(gradient.device, gradient.dtype)(gradient)
        squares.append(torch.sum(weighted * gradient))
    norm = torch.stack(squares).sum().sqrt()
    torch._foreach_mul_(list(gradients.values()), (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm
