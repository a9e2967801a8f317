"""timm: RepOptimizers under the names of its optimizer registry."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterable
from typing import Any

from timm.optim import OptimInfo
from timm.optim._optim_factory import default_registry  # of create_optimizer_v2; timm has no other name for it
from torch import Tensor, nn

import repopt
from repopt.blocks import unwrapped
from repopt.errors import UserError
from repopt.optim import RULES, RepOptimizer
from repopt.scales import Scales


def register(model: nn.Module) -> list[str]:
    """Add "repsgd", "repadamw" ... to timm's optimizers, for a network in target mode.

    ``timm.optim.create_optimizer_v2(model, "repsgd", lr=0.1, scales="scales.pth")`` is then a RepOptimizer; on the
    command line of a script of timm's kind, ``--opt repsgd --opt-kwargs scales=scales.pth max_norm=5``. Besides the
    rule's settings it takes ``scales`` and ``prefix`` (see `repopt.bind`), ``max_norm``
    (in the place of ``--clip-grad``, which would clip by the plain norm) and ``implementation``.

    Args:
        model: whose names the scales have; registered again, the names are those of another.

    Returns:
        The names.
    """
    known = weakref.ref(unwrapped(model))
    for name, rule in RULES.items():
        own = rule.hyperparameters
        build: Any = functools.partial(_build, known, name)
        default_registry.register(
            OptimInfo(
                name=f"rep{name}",
                opt_class=build,
                description=f"{name} of the multi-branch network that a plain one stands for",
                has_eps="eps" in own,
                has_momentum="momentum" in own,
                has_betas="betas" in own,
                defaults={"nesterov": True} if "nesterov" in own else None,  # as timm's sgd
            )
        )
    return [f"rep{name}" for name in RULES]


def _build(
    model: weakref.ref[nn.Module],
    rule: str,
    params: Iterable[Any],
    *,
    scales: Scales | None = None,
    prefix: str = "",
    max_norm: float | None = None,
    **settings: Any,
) -> RepOptimizer:
    """Return a RepOptimizer over the groups that timm has made."""
    network = model()
    if network is None or scales is None:
        raise UserError(f"rep{rule} needs the scales of a network: register(model), and scales=PATH (--opt-kwargs)")
    names: dict[Tensor, str] = {param: name for name, param in network.named_parameters()}
    params = list(params)
    groups = params if params and isinstance(params[0], dict) else [{"params": params}]
    if any(param not in names for group in groups for param in group["params"]):
        raise UserError(f"rep{rule} is registered for another network: register(model)")
    bound = repopt.bind(network, scales, prefix=prefix)
    rep = RULES[rule].rep
    with_names = [group | {"params": [(names[param], param) for param in group["params"]]} for group in groups]
    optimizer = rep(with_names, grad_mults=bound.grad_mults(rep.degree), **settings)
    return optimizer.clip_to(max_norm, bound.grad_mults(degree=1))
