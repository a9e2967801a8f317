"""SGD with re-parameterized gradients (degree 1: the gradient is multiplied)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from repopt.csla import GradMult
from repopt.errors import UserError
from repopt.optim.base import NamedParams, RepOptimizer


def sgd_direction(
    param: Tensor,
    gradient: Tensor,
    mult: GradMult | None,
    buffer: Tensor | None,
    *,
    weight_decay: float,
    momentum: float,
    dampening: float,
    nesterov: bool,
) -> tuple[Tensor, Tensor | None]:
    """What is subtracted, times the learning rate, and the momentum buffer (updated in place once it exists).

    The multiplier comes first: weight decay and momentum act on the kernel as they act on the imagined branches.
    """
    if mult is not None:
        gradient = mult(gradient)
    if weight_decay:
        gradient = gradient.add(param, alpha=weight_decay)
    if not momentum:
        return gradient, None
    if buffer is None:
        buffer = gradient.clone()
    else:
        buffer.mul_(momentum).add_(gradient, alpha=1 - dampening)
    return (gradient.add(buffer, alpha=momentum) if nesterov else buffer), buffer


class RepSGD(RepOptimizer):
    """`torch.optim.SGD` with Grad Mults; arguments and state as there. See `RepOptimizer` for params and grad_mults."""

    degree: ClassVar[int] = 1

    def __init__(
        self,
        params: NamedParams,
        lr: float = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        grad_mults: Mapping[str, GradMult],
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
        super().__init__(params, defaults, grad_mults)

    def update(
        self, param: Tensor, gradient: Tensor, mult: GradMult | None, state: dict[str, Any], group: dict[str, Any]
    ) -> None:
        """One parameter's step."""
        direction, buffer = sgd_direction(
            param,
            gradient,
            mult,
            state.get("momentum_buffer"),
            weight_decay=group["weight_decay"],
            momentum=group["momentum"],
            dampening=group["dampening"],
            nesterov=group["nesterov"],
        )
        if buffer is not None:
            state["momentum_buffer"] = buffer
        param.add_(direction, alpha=-group["lr"])
