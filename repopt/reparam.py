"""The two rules over a whole model, and the optimizer that follows from them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from repopt.blocks import declared_blocks, key_of, unwrapped
from repopt.csla import Multiplier
from repopt.errors import UserError, unknown
from repopt.optim import (
    PLAIN_ONLY,
    RULES,
    WITHOUT_MULTIPLIERS,
    BranchOptimizer,
    HeldBranches,
    Implementation,
    plain_rule,
)
from repopt.scales import IdentityInit, Scales, bind


def initialize(model: nn.Module, scales: Scales, *, identity: IdentityInit = "searched") -> None:
    """Draw new kernels, weighted by the searched scales, in place (Rule of Initialization). For new trainings only.

    Under the same seed a csla and a target model come out as the same function.

    Args:
        model: in target mode, where the kernels are merged, or csla mode, where kernels and scales are set.
        scales: from `load_scales`, `extract_scales` or `bind`.
        identity: the identity branch enters with its searched values, or with the 1 that the paper names.

    Raises:
        UserError: the scales are not those of this model; the message names the block.
    """
    declared_blocks(model, "csla", "target")  # refuses another mode before it looks at the scales
    bind(model, scales).initialize(identity=identity)


def grad_mults(model: nn.Module, scales: Scales, *, degree: int) -> dict[str, Multiplier]:
    """Return the multiplier of every declared block's gradient, by parameter name (Rule of Iteration).

    Args:
        model: in target mode.
        scales: from `load_scales`, `extract_scales` or `bind`.
        degree: of the update rule: 1 for SGD, 0 for AdamW (``RepSGD.degree``).

    Returns:
        Multipliers by the names of `nn.Module.named_parameters`; kernels that are not trained have none. Blocks that
        share a kernel share its multiplier.

    Raises:
        UserError: the scales are not those of this model, or those of two blocks with one kernel differ; the message
            names the block. Or no constants follow a block under such rules.
    """
    declared_blocks(model, "target")  # refuses another mode before it looks at the scales
    return bind(model, scales).grad_mults(degree)


def param_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return groups of named parameters: decayed, and not decayed (biases and all else of one dimension), if any.

    One-dimensional kernels of identity branches stand for weights: they are decayed where their declaration says so,
    and always in csla mode, where the equivalence needs it.
    """
    kernels = {
        key_of(path, kernel)
        for path, module in declared_blocks(model)
        for kernel, _ in module.block.names()
        if module.mode != "target" and kernel not in module.block.undecayed(searched=module.mode == "hs")
    }
    decayed: list[tuple[str, nn.Parameter]] = []
    rest: list[tuple[str, nn.Parameter]] = []
    for name, param in unwrapped(model).named_parameters():
        if param.requires_grad:
            (decayed if param.dim() > 1 or name in kernels else rest).append((name, param))
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def needs_branches(name: str, model: nn.Module) -> bool:
    """Return whether an update rule follows the branches of a model only where it holds them (`hold_branches`)."""
    if name in WITHOUT_MULTIPLIERS:
        return True
    blocks = {module.block for _, module in declared_blocks(model)}
    return not all(block.follows_constants(RULES[name].rep.degree) for block in blocks)


def _by_learning_rate(group: dict[str, Any], lr: float | Tensor, factors: Mapping[str, float]) -> list[dict[str, Any]]:
    """Return groups of those parameters of a group that have the same factor of the learning rate."""
    parts: dict[float, list[tuple[str, nn.Parameter]]] = {}
    for name, param in group["params"]:
        parts.setdefault(factors.get(name, 1.0), []).append((name, param))
    return [group | {"params": params, "lr": lr * factor} for factor, params in parts.items()]


def build_optimizer(
    name: str,
    model: nn.Module,
    scales: Scales | None = None,
    *,
    lr: float | Tensor,
    weight_decay: float = 0.0,
    implementation: Implementation = "auto",
    branches: Mapping[str, HeldBranches] | None = None,
    max_norm: float | None = None,
    lr_factors: Mapping[str, float] | None = None,
    **settings: Any,
) -> torch.optim.Optimizer:
    """Build an optimizer over the model's parameter groups.

    Args:
        name: of the update rule, one of `RULES` ("sgd", "adamw" ...), or without scales of `PLAIN_ONLY` ("muon" ...).
        model: in target mode if scales or branches are given, else any.
        scales: from `load_scales`, `extract_scales` or `bind`: a RepOptimizer, which keeps their multipliers.
        lr: learning rate.
        weight_decay: of the decayed group (`param_groups`).
        implementation: of the step of a `RepOptimizer` or a `BranchOptimizer`.
        branches: from `hold_branches` or `share_branches`: the rule is on the multi-branch network (`BranchOptimizer`).
        lr_factors: of the learning rate by parameter name, 1 where a name is absent: a group for each. The branches of
            a declared kernel learn at the rate of the kernel.
        max_norm: to which a step clips the gradients of the multi-branch network, where scales or branches are given.
        settings: hyper-parameters of the rules (momentum, nesterov, betas, eps ...). Those of other rules are passed
            over, so that one set of settings serves every rule.

    Raises:
        UserError: an unknown rule or setting, a value that the rule refuses, or scales that are not this model's.
    """
    if name not in RULES and name not in PLAIN_ONLY:
        raise unknown("optimizer", name, (*RULES, *PLAIN_ONLY))
    if scales is not None and name in WITHOUT_MULTIPLIERS:
        raise UserError(
            f"optimizer {name!r} cannot be re-parameterized: {WITHOUT_MULTIPLIERS[name]}; with branches that it "
            "holds it is exact (branches=repopt.hold_branches(model, scales))"
        )
    if scales is not None and branches is not None:
        raise UserError("an optimizer multiplies gradients by constants of scales or holds branches, not both")
    if max_norm is not None and scales is None and branches is None:
        raise UserError(
            "max_norm is of an optimizer with scales or branches; else torch.nn.utils.clip_grad_norm_ clips"
        )
    known = set().union(*(rule.hyperparameters for rule in RULES.values()))
    for key in settings:
        if key not in known:
            raise unknown("optimizer setting", key, known)
    groups, arguments = param_groups(model, weight_decay), dict[str, Any](lr=lr)
    if lr_factors is not None:
        groups = [part for group in groups for part in _by_learning_rate(group, lr, lr_factors)]
    if scales is not None:
        rule = RULES[name]
        arguments |= {key: value for key, value in settings.items() if key in rule.hyperparameters}
        mults = grad_mults(model, scales, degree=rule.rep.degree)
        optimizer = rule.rep(groups, grad_mults=mults, implementation=implementation, **arguments)
        return optimizer.clip_to(max_norm, None if rule.rep.degree == 1 else grad_mults(model, scales, degree=1))
    plain, hyperparameters = plain_rule(name)
    arguments |= {key: value for key, value in settings.items() if key in hyperparameters}
    try:
        if branches is not None:
            order = [name for name, _ in unwrapped(model).named_parameters()]
            own: dict[str, Any] = {"max_norm": max_norm, "order": order, "implementation": implementation}
            return BranchOptimizer(groups, plain, branches, **own, **arguments)
        return plain(groups, **arguments)
    except ValueError as error:
        raise UserError(f"optimizer {name!r}: {error}") from None
