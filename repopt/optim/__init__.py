"""Update rules. A new rule is one file, which states its degree and computes an update, and one row in `RULES`."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from timm.optim import Lamb, Lars, Lion, Muon
from typing_extensions import override

from repopt.optim.adam import RepAdam, RepAdamW
from repopt.optim.base import Implementation, NamedParams, RepOptimizer
from repopt.optim.clip import clip_grad_norm_
from repopt.optim.held import BranchOptimizer, HeldBranches
from repopt.optim.joint import JointOptimizer
from repopt.optim.lion import RepLion
from repopt.optim.rmsprop import RepRMSprop
from repopt.optim.sgd import RepSGD


class OptimizerPair(NamedTuple):
    """The plain optimizer of an update rule, and the RepOptimizer that follows it."""

    plain: Callable[..., torch.optim.Optimizer]
    rep: type[RepOptimizer]

    @property
    def hyperparameters(self) -> set[str]:
        """Return the names of what the rule can be told."""
        return set(inspect.signature(self.rep).parameters) - {"params", "grad_mults", "implementation"}


class _ZeroInitializedSGD(torch.optim.SGD):
    """torch's SGD, whose momentum buffers begin as zeros, which comes to the same without dampening.

    Where the first step of a fused SGD is skipped, it would leave them unset, and go on with what lies there.
    """

    @override
    def _init_group(self, group: dict[str, Any], params: Any, grads: Any, momentum_buffer_list: Any) -> bool:
        for param in group["params"]:
            if group["momentum"] and param.grad is not None and self.state[param].get("momentum_buffer") is None:
                self.state[param]["momentum_buffer"] = torch.zeros_like(param)
        return super()._init_group(group, params, grads, momentum_buffer_list)


def _sgd(params: NamedParams, dampening: float = 0.0, **settings: Any) -> torch.optim.SGD:
    """Return torch's SGD: fused, but with dampening, which the first step has not."""
    if dampening:
        return torch.optim.SGD(params, dampening=dampening, **settings)
    return _ZeroInitializedSGD(params, fused=True, **settings)


RULES = {  # fused: fast, and a step can be skipped without asking the device
    "sgd": OptimizerPair(_sgd, RepSGD),
    "adamw": OptimizerPair(functools.partial(torch.optim.AdamW, fused=True), RepAdamW),
    "adam": OptimizerPair(functools.partial(torch.optim.Adam, fused=True), RepAdam),
    "rmsprop": OptimizerPair(functools.partial(RepRMSprop, grad_mults={}), RepRMSprop),  # torch's couples the decay
    "lion": OptimizerPair(Lion, RepLion),
}

PLAIN_ONLY: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adafactor": torch.optim.Adafactor,
    "muon": Muon,
    "lars": Lars,
    "lamb": Lamb,
}

_NORMS = "its steps depend on the norms of whole layers, and the branches of the CSLA network have other norms"
WITHOUT_MULTIPLIERS = {  # why; with held branches they are exact
    "muon": "it orthogonalises the whole gradient, so that constants in it do not come out as constants",
    "lars": _NORMS,
    "lamb": _NORMS,
    "adafactor": "its second moments are those of whole rows and columns, not of single entries",
}


def plain_rule(name: str) -> tuple[Callable[..., torch.optim.Optimizer], set[str]]:
    """Return the plain optimizer of an update rule, and the names of the settings that it takes."""
    if name in RULES:
        return RULES[name].plain, RULES[name].hyperparameters
    # Their epsilons are no epsilons of Adam's kind.
    return PLAIN_ONLY[name], set(inspect.signature(PLAIN_ONLY[name]).parameters) - {"params", "lr", "eps"}


__all__ = [
    "PLAIN_ONLY",
    "RULES",
    "WITHOUT_MULTIPLIERS",
    "BranchOptimizer",
    "HeldBranches",
    "Implementation",
    "JointOptimizer",
    "OptimizerPair",
    "RepAdam",
    "RepAdamW",
    "RepLion",
    "RepOptimizer",
    "RepRMSprop",
    "RepSGD",
    "clip_grad_norm_",
    "plain_rule",
]
