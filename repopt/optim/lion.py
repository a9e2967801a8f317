"""Lion (arXiv 2302.06675) with re-parameterized updates (degree 0: a sign does not see the multiplier)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor
from typing_extensions import override

from repopt.csla import Multiplier
from repopt.optim.adam import check_betas
from repopt.optim.base import Implementation, NamedParams, RepOptimizer
from repopt.optim.update import Hyper, State


class RepLion(RepOptimizer):
    """`timm.optim.Lion` with Grad Mults; arguments and state as there. See `RepOptimizer` for the others."""

    degree: ClassVar[int] = 0

    def __init__(
        self,
        params: NamedParams,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        grad_mults: Mapping[str, Multiplier],
        implementation: Implementation = "auto",
    ) -> None:
        check_betas(betas)
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay}, grad_mults, implementation)

    @override
    def state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("exp_avg",)

    @override
    @staticmethod
    def compute_update(gradient: Tensor, state: State, hyper: Hyper) -> Tensor:
        beta1, beta2 = hyper["betas"]
        mean = state["exp_avg"]
        update = (beta1 * mean + (1 - beta1) * gradient).sign()
        mean.lerp_(gradient, 1 - beta2)
        return update
