"""One parameter's step under Grad Mults, from what an update rule says: pure functions on tensors.

    degree 1 (SGD):            gradient -> M -> weight decay -> update rule -> learning rate
    degree 0 (Adam, Lion ...): gradient -> update rule -> M -> decoupled weight decay -> learning rate

The multiplier comes before weight decay and momentum where the rule is linear, so that both act on the kernel as they
act on the branches; where the rule normalises the gradient, it comes after that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from repopt.csla import GradMap, GradMult
from repopt.errors import UserError

State = dict[str, Tensor]
Hyper = Mapping[str, Any]

GRAD_SCALER_KEYS = ("found_inf", "grad_scale")  # not 0: skip the step; and the factor in the gradients
CHUNK_NUMEL = 2**18  # entries: the temporaries of a chunk stay in a CPU's cache, and peak memory stays low


def step_unless(optimizer: torch.optim.Optimizer, found_inf: Tensor | None) -> None:
    """Step an optimizer unless `found_inf`, a scalar tensor, is not 0, as `torch.amp.GradScaler` does; None = step.

    Only an optimizer that does not know `GRAD_SCALER_KEYS` makes the host wait for the answer.
    """
    if found_inf is None:
        optimizer.step()
    elif getattr(optimizer, "_step_supports_amp_scaling", False):
        told = dict(zip(GRAD_SCALER_KEYS, (found_inf, None), strict=True))
        vars(optimizer).update(told)
        optimizer.step()
        for name in told:
            delattr(optimizer, name)
    elif not found_inf:
        optimizer.step()


class Rule(NamedTuple):
    """An elementwise update rule.

    Attributes:
        compute_update: ``u(gradient, state, hyper)`` gives what is subtracted, times the learning rate. It updates the
            tensors of `state` in place and leaves the gradient alone.
        degree: of homogeneity, ``u(c g) = sign(c) |c|^d u(g)``.
    """

    compute_update: Callable[[Tensor, State, Hyper], Tensor]
    degree: int


@dataclass(frozen=True, eq=False)
class ParamSlot:
    """A parameter and what belongs to it, where they are in memory; the same object from step to step.

    Attributes:
        param: what is updated.
        mult: its multiplier; None means the plain rule.
        state: tensors of the same shape that the rule keeps, by name.
        grad_map: what the gradient goes through before all else, where its entries are mixed; then there is no `mult`.
        scratch: of the parameter's shape, where a CPU keeps what comes out of `grad_map`: new memory at every step
            costs it more than the map.
    """

    param: Tensor
    mult: GradMult | None
    state: State
    grad_map: GradMap | None = None
    scratch: Tensor | None = None


class ParamUpdate(NamedTuple):
    """What a step does to one parameter.

    Attributes:
        slot: the parameter.
        gradient: of its shape.
        constants: hyper-parameters of the parameter's group, ``weight_decay`` among them.
        scalars: what changes from step to step, ``lr`` among them: numbers, or tensors of no dimension. Those of
            `GRAD_SCALER_KEYS` are there where a GradScaler gives them. Parameters that have all alike share one object.
    """

    slot: ParamSlot
    gradient: Tensor
    constants: Hyper
    scalars: Hyper


def apply(
    rule: Rule, param: Tensor, gradient: Tensor, mult: Callable[[Tensor], Tensor] | None, state: State, hyper: Hyper
) -> None:
    """Update a parameter and its state in place (see `ParamSlot`, `ParamUpdate`; `hyper`: constants and scalars)."""
    lr, decay, skips = hyper["lr"], hyper["weight_decay"], hyper.get("found_inf")
    before = [] if skips is None else [tensor.clone() for tensor in (param, *state.values())]
    if hyper.get("grad_scale") is not None:
        gradient = gradient / hyper["grad_scale"]
    if rule.degree == 1:
        if mult is not None:
            gradient = mult(gradient)
        if decay:
            gradient = gradient + decay * param
        param.sub_(lr * rule.compute_update(gradient, state, hyper))
    else:
        update = rule.compute_update(gradient, state, hyper)
        if mult is not None:
            update = mult(update)
        if decay:
            param.mul_(1 - lr * decay)
        param.sub_(lr * update)
    if skips is not None:
        for tensor, old in zip((param, *state.values()), before, strict=True):
            torch.where(skips.bool(), old, tensor, out=tensor)


def eager_update(rule: Rule, updates: list[ParamUpdate]) -> None:
    """Do one update after the other, on CPUs large parameters in chunks of some filters."""
    for slot, gradient, constants, scalars in updates:
        param, mult, state, hyper = slot.param, slot.mult, slot.state, {**constants, **scalars}
        if param.numel() <= CHUNK_NUMEL or param.device.type != "cpu":
            apply(rule, param, gradient, mult, state, hyper)
            continue
        count = max(1, CHUNK_NUMEL // param[0].numel())
        for start in range(0, len(param), count):
            rows = slice(start, start + count)
            part = None if mult is None else mult.rows(start, start + count)
            apply(rule, param[rows], gradient[rows], part, {k: v[rows] for k, v in state.items()}, hyper)


def check_degree(name: str, rule: Rule, state_names: tuple[str, ...], hyper: Hyper) -> None:
    """Refuse a rule that is not what it says: elementwise, and homogeneous of its degree (of degree 1: linear).

    Its updates for some gradients are compared with those for the same multiplied entry by entry by constants of both
    signs; and, of degree 1, where weight decay is added to the gradient, those for a sum with the sum of those. The
    gradients are large, so that epsilon has no say.

    Raises:
        UserError: the equivalence does not hold for this rule.
    """
    generator, steps, shape = torch.Generator("cpu").manual_seed(0), 3, (4, 3)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64, device="cpu")

    gradients, others = 1e8 * draw(2, steps, *shape)
    constants = draw(*shape)

    def updates(gradients: Tensor) -> Tensor:
        state = {key: torch.zeros_like(constants) for key in state_names}
        return torch.stack([rule.compute_update(gradient, state, hyper).clone() for gradient in gradients])

    def equal(a: Tensor, b: Tensor) -> bool:
        return torch.allclose(a, b, rtol=1e-5, atol=1e-5)

    plain = updates(gradients)
    holds = equal(updates(constants * gradients), constants.sign() * constants.abs() ** rule.degree * plain)
    if rule.degree == 1:
        holds = holds and equal(updates(gradients + others), plain + updates(others))
    if not holds:
        raise UserError(
            f"{name} cannot be re-parameterized: it is not elementwise and homogeneous of degree {rule.degree}, as "
            "it says, so a plain network would not follow the CSLA network (nor does it under Muon, LARS, LAMB or "
            "Adafactor)"
        )
