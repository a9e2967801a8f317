"""Update rules: a pure function and a thin `torch.optim.Optimizer` shell each. A new rule is one file and one row."""

from typing import NamedTuple

import torch

from repopt.optim.adamw import RepAdamW
from repopt.optim.base import RepOptimizer
from repopt.optim.clip import clip_grad_norm_
from repopt.optim.sgd import RepSGD


class Rule(NamedTuple):
    """An update rule: the plain optimizer, the RepOptimizer that follows it, and the names of its hyper-parameters."""

    plain: type[torch.optim.Optimizer]
    rep: type[RepOptimizer]
    hyperparameters: tuple[str, ...]


RULES = {
    "sgd": Rule(torch.optim.SGD, RepSGD, ("momentum", "nesterov")),
    "adamw": Rule(torch.optim.AdamW, RepAdamW, ("betas", "eps")),
}

__all__ = ["RULES", "RepAdamW", "RepOptimizer", "RepSGD", "Rule", "clip_grad_norm_"]
