"""Update rules: a pure function and a thin `torch.optim.Optimizer` shell each. A new rule is one file and one row."""

import inspect
from typing import NamedTuple

import torch

from repopt.optim.adamw import RepAdamW
from repopt.optim.base import RepOptimizer
from repopt.optim.clip import clip_grad_norm_
from repopt.optim.sgd import RepSGD


class Rule(NamedTuple):
    """An update rule: the plain optimizer, and the RepOptimizer that follows it."""

    plain: type[torch.optim.Optimizer]
    rep: type[RepOptimizer]

    @property
    def hyperparameters(self) -> set[str]:
        """Names of what the rule can be told."""
        return set(inspect.signature(self.rep).parameters) - {"params", "grad_mults"}


RULES = {
    "sgd": Rule(torch.optim.SGD, RepSGD),
    "adamw": Rule(torch.optim.AdamW, RepAdamW),
}

__all__ = ["RULES", "RepAdamW", "RepOptimizer", "RepSGD", "Rule", "clip_grad_norm_"]
