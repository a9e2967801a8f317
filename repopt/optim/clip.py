"""Gradient clipping that keeps the equivalence with the CSLA network."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from repopt.csla import Multiplier
from repopt.optim.base import check_norm_mults
from repopt.optim.norm import clip_factor, multi_branch_norm
from repopt.optim.shards import local
from repopt.optim.watch import follow_clip, warn


@torch.no_grad()
def clip_grad_norm_(
    named_parameters: Iterable[tuple[str, Tensor]], max_norm: float, grad_mults: Mapping[str, Multiplier]
) -> Tensor:
    """Scale the gradients in place so that the norm which the CSLA network's gradients would have is at most max_norm.

    The plain norm would clip another network. `RepOptimizer.clip_to` does the same within the step, where gradients
    are multiplied by no loss scale any more; those that are when they are clipped here are refused by the step.

    Args:
        named_parameters: those of the plain model.
        max_norm: bound of the 2-norm over all gradients.
        grad_mults: of degree 1 (`repopt.grad_mults`), whatever the optimizer's degree; by parameter name.

    Raises:
        UserError: multipliers of another degree, or of a parameter that is not among those named.

    Returns:
        The norm before clipping, a scalar tensor; nothing waits for the device.
    """
    named_parameters = list(named_parameters)
    if not grad_mults:
        warn("clip_grad_norm_ has no multipliers, so that it clips by the plain norm, as torch.nn.utils has it")
    check_norm_mults(grad_mults, (name for name, _ in named_parameters))
    norm = multi_branch_norm(named_parameters, grad_mults)
    factor = clip_factor(norm, max_norm)
    on_device: dict[torch.device, list[Tensor]] = {}
    for _, param in named_parameters:
        if param.grad is not None:
            gradient = local(param.grad)
            on_device.setdefault(gradient.device, []).append(gradient)
    for device, gradients in on_device.items():
        torch._foreach_mul_(gradients, factor.to(device))
    follow_clip([param for _, param in named_parameters])
    return norm
