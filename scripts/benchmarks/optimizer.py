"""A step of RepSGD and RepAdamW, of torch's SGD and AdamW, and of the naive loop that multiplies every gradient by a
dense tensor, on the parameters of one network, with random gradients.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import repopt
from benchmarks.arguments import add_rounds, rounds_of
from benchmarks.report import Table
from benchmarks.timing import interleave, peak_extra
from benchmarks.training_step import to_device
from repopt.optim import RULES

SETTINGS: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 1e-7, "momentum": 0.9, "nesterov": True, "weight_decay": 4e-5},
    "AdamW": {"lr": 1e-7, "weight_decay": 0.05},
}
IMPLEMENTATIONS: tuple[repopt.optim.Implementation, ...] = ("eager", "compiled")


class Contender(NamedTuple):
    """An optimizer in the comparison: what does its step, and the bytes of the multipliers that it keeps."""

    rule: str  # a key of SETTINGS
    label: str
    optimizer: torch.optim.Optimizer
    step: Callable[[], Any]
    mult_bytes: Callable[[], int]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this subject's arguments."""
    parser.add_argument("--arch", default="RepOpt-VGG-B1", help="whose parameters are stepped")
    add_rounds(parser, 30)


def run(arguments: argparse.Namespace, device: torch.device) -> Iterator[Table]:
    """The comparison on a network's parameters, with random gradients and scales."""
    searched = repopt.extract_scales(repopt.create_model(arguments.arch, mode="hs"))
    scales = {name: 0.5 + torch.rand_like(scale) for name, scale in searched.items()}
    model = repopt.create_model(arguments.arch, mode="target")
    to_device(model, device)
    for param in model.parameters():
        param.grad = torch.randn_like(param)
    size = sum(param.nbytes for param in model.parameters())
    contenders = [contender for rule in SETTINGS for contender in _contenders(rule, model, scales)]
    seconds = interleave({c.label: c.step for c in contenders}, device, rounds=rounds_of(arguments))
    rows = []
    for contender in contenders:
        state = sum(v.nbytes for s in contender.optimizer.state.values() for v in s.values() if isinstance(v, Tensor))
        own = seconds[contender.label]
        rows.append(
            {
                "optimizer": contender.label,
                "ms": 1e3 * own,
                "time / fused": own / seconds[f"torch {contender.rule}, fused"],
                "state / parameters": state / size,
                "multipliers / parameters": contender.mult_bytes() / size,
                "peak extra / parameters": peak_extra(contender.step, device) / size,
            }
        )
    yield f"A step on the parameters of {arguments.arch}", rows


def _contenders(rule: str, model: nn.Module, scales: dict[str, Tensor]) -> Iterator[Contender]:
    settings, torchs = SETTINGS[rule], getattr(torch.optim, rule)
    for how, flags in {"loop": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}.items():
        plain = torchs(model.parameters(), **settings, **flags)
        yield Contender(rule, f"torch {rule}, {how}", plain, plain.step, int)
    mults = repopt.grad_mults(model, scales, degree=RULES[rule.lower()].rep.degree)
    dense = {key: mult.dense() for key, mult in mults.items()}
    kept = sum(tensor.nbytes for tensor in dense.values())
    naive = torchs(model.parameters(), **settings, foreach=False)
    step = naive_step(model, naive, dense)
    yield Contender(rule, f"naive Rep{rule}, dense multiplier", naive, step, lambda: kept)
    for how in IMPLEMENTATIONS:
        rep: Any = repopt.build_optimizer(rule.lower(), model, scales, implementation=how, **settings)
        yield Contender(rule, f"Rep{rule}, {how}", rep, rep.step, rep.multiplier_bytes)


def naive_step(model: nn.Module, optimizer: torch.optim.Optimizer, dense: dict[str, Tensor]) -> Callable[[], None]:
    """A step of the plain optimizer on gradients that are multiplied, one parameter after the other."""
    named = dict(model.named_parameters())

    def step() -> None:
        kept = {name: named[name].grad for name in dense}
        for name, gradient in kept.items():
            assert gradient is not None
            named[name].grad = gradient * dense[name]
        optimizer.step()
        for name in dense:
            named[name].grad = kept[name]

    return step
