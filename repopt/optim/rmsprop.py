"""RMSprop with re-parameterized updates (degree 0). For epsilon, see `repopt.optim.adam`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor
from typing_extensions import override

from repopt.csla import Multiplier
from repopt.errors import UserError
from repopt.optim.base import Implementation, NamedParams, RepOptimizer
from repopt.optim.update import Hyper, State


class RepRMSprop(RepOptimizer):
    """`torch.optim.RMSprop` with Grad Mults; state as there. See `RepOptimizer` for what is not an argument there.

    Weight decay is decoupled, as AdamW's is: added to the gradient, as torch's RMSprop does, it would be normalised
    together with it, and no constants could make up for that.
    """

    degree: ClassVar[int] = 0
    uses_step: ClassVar[bool] = True  # only because torch's keeps the number in its state

    def __init__(
        self,
        params: NamedParams,
        lr: float | Tensor = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum: float = 0.0,
        centered: bool = False,
        *,
        capturable: bool = False,
        grad_mults: Mapping[str, Multiplier],
        implementation: Implementation = "auto",
    ) -> None:
        if not alpha < 1:
            raise UserError(f"alpha of RMSprop is below 1, not {alpha}")
        defaults = {
            "lr": lr,
            "alpha": alpha,
            "eps": eps,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "centered": centered,
            "capturable": capturable,
        }
        super().__init__(params, defaults, grad_mults, implementation)

    @override
    def state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        momentum = ["momentum_buffer"] if group["momentum"] else []
        return ("square_avg", *momentum, *(["grad_avg"] if group["centered"] else []))

    @override
    @staticmethod
    def compute_update(gradient: Tensor, state: State, hyper: Hyper) -> Tensor:
        alpha, square = hyper["alpha"], state["square_avg"]
        square.mul_(alpha).addcmul_(gradient, gradient, value=1 - alpha)
        if hyper["centered"]:
            mean = state["grad_avg"].lerp_(gradient, 1 - alpha)
            square = square - mean * mean
        normalised = gradient / (square.sqrt() + hyper["eps"])
        if not hyper["momentum"]:
            return normalised
        return state["momentum_buffer"].mul_(hyper["momentum"]).add_(normalised)
