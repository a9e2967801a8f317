"""What all RepOptimizers share: multipliers by parameter name, and the loop over the parameters."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from repopt.csla import GradMult
from repopt.errors import UserError

NamedParams = Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]]


class RepOptimizer(torch.optim.Optimizer):
    """An elementwise update rule whose gradients are re-parameterized by constants (Rule of Iteration).

    A subclass is a rule: it states its degree of homogeneity and writes one parameter's update.

    Args:
        params: named parameters, as ``model.named_parameters()`` or groups of them (`repopt.param_groups`) give them.
        defaults: the hyper-parameters of the groups that do not set their own.
        grad_mults: by parameter name; the other parameters are updated plainly.

    Raises:
        UserError: negative hyper-parameters, parameters without names, or multipliers for names or shapes that are
            not among the parameters.
    """

    degree: ClassVar[int]

    def __init__(self, params: NamedParams, defaults: dict[str, Any], grad_mults: Mapping[str, GradMult]) -> None:
        for name, value in defaults.items():
            if any(not number >= 0 for number in (value if isinstance(value, tuple) else (value,))):
                raise UserError(f"{name} of an optimizer is not negative: {value}")
        super().__init__(params, defaults)
        self.grad_mults = dict(grad_mults)
        shapes = {name: p.shape for group in self.param_groups for name, p in _named(group)}
        for name, mult in self.grad_mults.items():
            if name not in shapes:
                raise UserError(f"there is a Grad Mult for {name!r}, but no parameter of that name")
            if shapes[name] != mult.shape:
                raise UserError(f"the Grad Mult of {name!r} is for {tuple(mult.shape)}, not {tuple(shapes[name])}")

    @abstractmethod
    def update(
        self, param: Tensor, gradient: Tensor, mult: GradMult | None, state: dict[str, Any], group: dict[str, Any]
    ) -> None:
        """Update one parameter in place; `gradient` stays as it is, `mult` None means the plain rule."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """One step, as `torch.optim.Optimizer.step`."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for name, param in _named(group):
                if param.grad is not None:
                    self.update(param, param.grad, self._mult(name, param), self.state[param], group)
        return loss

    def _mult(self, name: str, param: Tensor) -> GradMult | None:
        mult = self.grad_mults.get(name)
        if mult is not None and (mult.filter.device, mult.filter.dtype) != (param.device, param.dtype):
            mult = self.grad_mults[name] = mult.to(param.device, param.dtype)
        return mult

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"grad_mults": self.grad_mults}


def _named(group: dict[str, Any]) -> Iterable[tuple[str, Tensor]]:
    if "param_names" not in group:
        raise UserError("a RepOptimizer takes named parameters: model.named_parameters() or repopt.param_groups")
    return zip(group["param_names"], group["params"], strict=True)
