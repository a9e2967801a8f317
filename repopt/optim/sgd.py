"""SGD with re-parameterized gradients (degree 1: the gradient is multiplied)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor
from typing_extensions import override

from repopt.csla import Multiplier
from repopt.errors import UserError
from repopt.optim.base import Implementation, NamedParams, RepOptimizer
from repopt.optim.update import Hyper, State


class RepSGD(RepOptimizer):
    """`torch.optim.SGD` with Grad Mults; arguments and state as there. See `RepOptimizer` for the others."""

    degree: ClassVar[int] = 1
    first_step_overrides: ClassVar[Hyper] = {"dampening": 0.0}  # the first gradient becomes the buffer

    def __init__(
        self,
        params: NamedParams,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        grad_mults: Mapping[str, Multiplier],
        implementation: Implementation = "auto",
    ) -> None:
        if nesterov and (momentum <= 0 or dampening != 0):
            raise UserError("Nesterov momentum needs a momentum above 0 and no dampening")
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
        }
        super().__init__(params, defaults, grad_mults, implementation)

    @override
    def state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("momentum_buffer",) if group["momentum"] else ()

    @override
    @staticmethod
    def compute_update(gradient: Tensor, state: State, hyper: Hyper) -> Tensor:
        if not hyper["momentum"]:
            return gradient
        buffer = state["momentum_buffer"]
        buffer.mul_(hyper["momentum"]).add_(gradient, alpha=1 - hyper["dampening"])
        return gradient + hyper["momentum"] * buffer if hyper["nesterov"] else buffer
