"""Several optimizers that are one: re-parameterized blocks by one rule, everything else by another."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from repopt.errors import UserError
from repopt.optim.base import RepOptimizer, params_in
from repopt.optim.held import BranchOptimizer, scale_gradients
from repopt.optim.norm import clip_factor, plain_norm
from repopt.optim.update import GRAD_SCALER_KEYS, step_unless


class JointOptimizer(torch.optim.Optimizer):
    """Several optimizers that are stepped, saved and clipped as one, as frameworks with one optimizer want it.

    Its groups are theirs, the same dictionaries, so that schedulers and hyper-parameters reach them.

    Args:
        optimizers: by a name that the state dict has; each of other parameters. None of them clips by itself.
        max_norm: bound of the 2-norm over all gradients of all of them, those of a `RepOptimizer` or `BranchOptimizer`
            being those of the multi-branch network; None = no clipping.

    Attributes:
        norm: of all gradients in the last step, before they were clipped; None without ``max_norm``.

    Raises:
        UserError: a parameter that two of them have, or one of them that clips.
    """

    _step_supports_amp_scaling: ClassVar[bool] = True  # by which GradScaler knows it

    def __init__(self, optimizers: Mapping[str, torch.optim.Optimizer], *, max_norm: float | None = None) -> None:
        self.optimizers = dict(optimizers)
        self.max_norm = max_norm
        self.norm: Tensor | None = None
        owners: dict[Tensor, str] = {}
        for name, optimizer in self.optimizers.items():
            if getattr(optimizer, "max_norm", None) is not None:
                raise UserError(f"optimizer {name!r} clips by itself: give JointOptimizer the max_norm")
            for _, param in params_in(optimizer.param_groups):
                if owners.setdefault(param, name) != name:
                    raise UserError(f"optimizers {owners[param]!r} and {name!r} have a parameter in common")
        super().__init__([{"params": [*owners]}], {})
        self._take_groups()
        self.defaults = next(iter(self.optimizers.values())).defaults  # which frameworks show

    def _take_groups(self) -> None:
        self.param_groups[:] = [group for optimizer in self.optimizers.values() for group in optimizer.param_groups]

    @override
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Do one step of each, as `torch.optim.Optimizer.step`; a GradScaler's attributes hold for all."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for own in self.optimizers.values():
            if isinstance(own, RepOptimizer | BranchOptimizer):
                own.watch.check(self)
        found_inf, grad_scale = (getattr(self, name, None) for name in GRAD_SCALER_KEYS)
        factor = None if grad_scale is None else 1 / grad_scale
        if self.max_norm is not None:
            self.norm = self.grad_norm() if factor is None else self.grad_norm() * factor
            clip = clip_factor(self.norm, self.max_norm)
            factor = clip if factor is None else clip * factor
        for optimizer in self.optimizers.values():
            self._step(optimizer, found_inf, factor)
        return loss

    @torch.no_grad()
    def grad_norm(self) -> Tensor:
        """Return the 2-norm over all gradients as they are now, a scalar tensor; nothing waits for the device."""
        norms = [
            optimizer.grad_norm()
            if isinstance(optimizer, RepOptimizer | BranchOptimizer)
            else plain_norm(param for _, param in params_in(optimizer.param_groups))
            for optimizer in self.optimizers.values()
        ]
        return torch.stack([norm.to(norms[0].device) for norm in norms]).norm()

    def _step(self, optimizer: torch.optim.Optimizer, found_inf: Tensor | None, factor: Tensor | None) -> None:
        """Step one of them unless `found_inf`, with its gradients times a factor."""
        params = [param for _, param in params_in(optimizer.param_groups) if param.grad is not None]
        gradients = [param.grad for param in params]
        if factor is not None:
            scale_gradients(params, factor)
        step_unless(optimizer, found_inf)
        for param, gradient in zip(params, gradients, strict=True):
            param.grad = gradient

    @override
    def zero_grad(self, set_to_none: bool = True) -> None:
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none)

    @override
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refuse a group, of which nobody knows whose it is, but for that of the constructor."""
        if self.param_groups:
            raise UserError("add the group to one of JointOptimizer's optimizers, and join them again")
        super().add_param_group(param_group)

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return the state dicts of the optimizers by their names."""
        return {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()}

    @override
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load what `state_dict` gave.

        Raises:
            UserError: it is of other optimizers.
        """
        if state_dict.keys() != self.optimizers.keys():
            raise UserError(f"the state is of {sorted(state_dict)}, the optimizers are {sorted(self.optimizers)}")
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state_dict[name])
        self._take_groups()

    def __getstate__(self) -> dict[str, Any]:
        own = ("optimizers", "max_norm", "norm")
        return super().__getstate__() | {name: getattr(self, name) for name in own}
