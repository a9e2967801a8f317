"""AdamW with re-parameterized updates (degree 0: the normalised update is multiplied)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from repopt.csla import GradMult
from repopt.errors import UserError
from repopt.optim.base import NamedParams, RepOptimizer


def adam_direction(
    gradient: Tensor,
    mult: GradMult | None,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: int,
    *,
    betas: tuple[float, float],
    eps: float,
) -> Tensor:
    """What is subtracted, times the learning rate; the moments are updated in place.

    The moments are those of the plain gradient; their ratio does not change when the gradient is multiplied by a
    positive constant, so the multiplier comes after it. eps breaks that by a relative eps / |gradient|.
    """
    beta1, beta2 = betas
    exp_avg.lerp_(gradient, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    deviation = exp_avg_sq.div(1 - beta2**step).sqrt_().add_(eps)
    normalised = exp_avg.div(1 - beta1**step).div_(deviation)
    return normalised if mult is None else mult(normalised)


class RepAdamW(RepOptimizer):
    """`torch.optim.AdamW` with Grad Mults; arguments and state as there. See `RepOptimizer` for params, grad_mults."""

    degree: ClassVar[int] = 0

    def __init__(
        self,
        params: NamedParams,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        grad_mults: Mapping[str, GradMult],
    ) -> None:
        if len(betas) != 2 or not max(betas) < 1:
            raise UserError(f"betas are two numbers below 1, not {betas}")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}, grad_mults)

    def update(
        self, param: Tensor, gradient: Tensor, mult: GradMult | None, state: dict[str, Any], group: dict[str, Any]
    ) -> None:
        """One parameter's step."""
        if not state:
            state["step"] = torch.zeros(())  # on the CPU, as torch.optim keeps it
            state["exp_avg"] = torch.zeros_like(param)
            state["exp_avg_sq"] = torch.zeros_like(param)
        state["step"] += 1
        direction = adam_direction(
            gradient,
            mult,
            state["exp_avg"],
            state["exp_avg_sq"],
            int(state["step"]),
            betas=group["betas"],
            eps=group["eps"],
        )
        param.mul_(1 - group["lr"] * group["weight_decay"])  # decoupled: the decay is not multiplied
        param.add_(direction, alpha=-group["lr"])
