"""A step of SGD by the branches that it follows: multipliers (RepSGD) where entries are placed one by one, maps where
they are mixed, and branches that the optimizer holds; on 3x3 kernels of one size, with random gradients.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

import repopt
from benchmarks.arguments import add_rounds, positive, rounds_of
from benchmarks.report import Table
from benchmarks.timing import interleave, peak_extra

SETTINGS: dict[str, Any] = {"lr": 1e-7, "momentum": 0.9, "nesterov": True, "weight_decay": 4e-5}
COMPACT = ("repvgg", "average", "edge", "frequency", "distance")
HELD = ("repvgg", "average", "orepa")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this subject's arguments."""
    parser.add_argument("--channels", type=positive, default=1024, help="of every kernel (default: %(default)s)")
    parser.add_argument("--kernels", type=positive, default=4, help="how many (default: %(default)s)")
    add_rounds(parser, 20)


def run(arguments: argparse.Namespace, device: torch.device) -> Iterator[Table]:
    """Yield the comparison; see the module's docstring."""

    def network() -> nn.Module:
        convs = (nn.Conv2d(channels, channels, 3, bias=False) for _ in range(arguments.kernels))
        return nn.Sequential(*convs).to(device)

    channels = arguments.channels
    plain = network()
    steps: dict[str, tuple[Callable[[], Any], float]] = {}
    size = sum(param.nbytes for param in plain.parameters())
    for param in plain.parameters():
        param.grad = torch.randn_like(param)
    steps["torch SGD, fused"] = torch.optim.SGD(plain.parameters(), fused=True, **SETTINGS).step, 0.0
    for prior in COMPACT:
        rep: Any = repopt.build_optimizer("sgd", *_declared(network(), plain, prior), **SETTINGS)
        rep.step()
        steps[f"RepSGD, {prior}"] = rep.step, rep.multiplier_bytes() / size
    for prior in HELD:
        model, _ = _declared(network(), plain, prior)
        branches = repopt.hold_branches(model)
        held = repopt.build_optimizer("sgd", model, branches=branches, **SETTINGS)
        kept = sum(tensor.nbytes for of_one in branches.values() for tensor in of_one.trained().values())
        steps[f"held, {prior}"] = held.step, kept / size
    seconds = interleave({label: step for label, (step, _) in steps.items()}, device, rounds=rounds_of(arguments))
    yield (
        f"A step on {arguments.kernels} kernels ({channels}, {channels}, 3, 3)",
        [
            {
                "optimizer, branches": label,
                "ms": 1e3 * seconds[label],
                "time / fused": seconds[label] / seconds["torch SGD, fused"],
                "kept / parameters": kept,
                "peak extra / parameters": peak_extra(step, device) / size,
            }
            for label, (step, kept) in steps.items()
        ],
    )


def _declared(model: nn.Module, plain: nn.Module, prior: str) -> tuple[nn.Module, repopt.BoundScales]:
    """Return a network with branches, the gradients of another, and constants of 1."""
    repopt.declare(model, prior, names="*")
    for param, other in zip(model.parameters(), plain.parameters(), strict=True):
        param.grad = other.grad
    return model, repopt.bind(model, source="one")
