"""Adam and AdamW with re-parameterized updates (degree 0: the normalised update is multiplied).

A multiplied gradient has a multiplied first moment and the same ratio of moments: the constants must enter after it.
Epsilon is what breaks the degree. Under RepAdamW with epsilon e, the network that is followed is the CSLA network whose
branch k has the epsilon ``|s_k| e``; as long as both are far below the gradients, this is the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from repopt.csla import Multiplier
from repopt.errors import UserError
from repopt.optim.base import Implementation, NamedParams, RepOptimizer
from repopt.optim.update import Hyper, State


class RepAdam(RepOptimizer):
    """`torch.optim.Adam` with Grad Mults; arguments and state as there. See `RepOptimizer` for the others.

    Raises:
        UserError: weight decay that is not decoupled.
    """

    degree: ClassVar[int] = 0
    uses_step: ClassVar[bool] = True

    def __init__(
        self,
        params: NamedParams,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        capturable: bool = False,
        decoupled_weight_decay: bool = False,
        grad_mults: Mapping[str, Multiplier],
        implementation: Implementation = "auto",
    ) -> None:
        check_betas(betas)
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "capturable": capturable,
            "decoupled_weight_decay": decoupled_weight_decay,
        }
        super().__init__(params, defaults, grad_mults, implementation)

    @override
    def check_group(self, group: dict[str, Any]) -> None:
        super().check_group(group)
        decoupled = group.get("decoupled_weight_decay", self.defaults["decoupled_weight_decay"])
        if group["weight_decay"] and not decoupled:
            raise UserError(
                "weight decay that is added to the gradient breaks the equivalence under Adam, whose update would "
                "normalise it together with the gradient: set decoupled_weight_decay=True, or use AdamW"
            )

    @override
    def state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if group["amsgrad"] else []))

    @override
    @staticmethod
    def corrections(step: Any, group: dict[str, Any]) -> dict[str, Any]:
        beta1, beta2 = group["betas"]
        return {"unbias_mean": 1 / (1 - beta1**step), "unbias_deviation": (1 - beta2**step) ** -0.5}

    @override
    @staticmethod
    def compute_update(gradient: Tensor, state: State, hyper: Hyper) -> Tensor:
        beta1, beta2 = hyper["betas"]
        mean, square = state["exp_avg"], state["exp_avg_sq"]
        mean.lerp_(gradient, 1 - beta1)
        square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        if hyper["amsgrad"]:
            square = state["max_exp_avg_sq"].copy_(torch.maximum(state["max_exp_avg_sq"], square))
        return hyper["unbias_mean"] * mean / (square.sqrt() * hyper["unbias_deviation"] + hyper["eps"])


class RepAdamW(RepAdam):
    """`torch.optim.AdamW` with Grad Mults: RepAdam, whose weight decay is decoupled."""

    def __init__(
        self,
        params: NamedParams,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        capturable: bool = False,
        grad_mults: Mapping[str, Multiplier],
        implementation: Implementation = "auto",
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            capturable=capturable,
            decoupled_weight_decay=True,
            grad_mults=grad_mults,
            implementation=implementation,
        )


def check_betas(betas: tuple[float, float]) -> None:
    """Raise UserError unless betas are two numbers below 1."""
    if len(betas) != 2 or not max(betas) < 1:
        raise UserError(f"betas are two numbers below 1, not {betas}")
