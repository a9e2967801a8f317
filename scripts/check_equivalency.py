"""Shows that a plain network under a RepOptimizer is the multi-branch (CSLA) network under the plain optimizer.

    python scripts/check_equivalency.py [--model ghost | --model timm/repvgg_a0] [--steps 3]

Both are trained on the same random images, in float64: the plain one by an optimizer that keeps multipliers ("compact")
or the branches ("held", any rule), the other branch by branch, every branch a convolution of its own, by the plain
rule. What is printed is the relative difference of the kernels afterwards. The exit code is 1 if one is above 1e-10.
Training a deep network amplifies rounding (43 blocks of timm's mobileone_s0 by about a thousand a step): `--steps 1`
then tells it from an error.
"""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import _root  # noqa: F401
import torch
import torch.nn.functional as F
from branch_by_branch import run_branch_by_branch
from torch import Tensor, nn
from typing_extensions import override

import repopt
from repopt.csla import (
    LAPLACIAN,
    SOBEL_X,
    SOBEL_Y,
    Block,
    ConvBranch,
    FilterBranch,
    FrozenConvBranch,
    IdentityBranch,
    PriorBranch,
    Target,
    average_filter,
    dbb_block,
    dct_filters,
    distance_prior,
    orepa_block,
    repmlp_block,
)
from repopt.layers import Mode, RepConv1d, RepConv2d, RepConv3d, RepLayer, RepLinear
from repopt.transposed import RepConvTranspose

BOUND = 1e-10


class Setup(NamedTuple):
    """A declared block, the layer that it is of, and that one's settings."""

    block: Block
    settings: Mapping[str, int] = {}
    layer: type[RepLayer] = RepConv2d

    def input_shape(self) -> tuple[int, ...]:
        """Return the shape of a batch."""
        _, per_group, *size = self.block.target.shape
        return (8, per_group * self.block.target.groups, *[7 if len(size) < 3 else 5] * len(size))


def _conv(size: int | tuple[int, ...]) -> ConvBranch:
    return ConvBranch(f"kernel_{size}", f"scale_{size}", size=size)


def _filter(name: str, numbers: tuple[Any, ...]) -> FilterBranch:
    return FilterBranch(name, f"scale_{name}", filter=numbers)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


IDENTITY = IdentityBranch("identity")
BLOCKS = {
    "3x3 + 1x1, stride 2": Setup(Block(Target("conv", (6, 4, 3, 3)), (_conv(3), _conv(1))), {"stride": 2}),
    "3x3 + 1x1 + identity": Setup(Block(Target("conv", (6, 6, 3, 3)), (_conv(3), _conv(1), IDENTITY))),
    "3x3 + 1x1 + identity, dilation 2": Setup(
        Block(Target("conv", (6, 6, 3, 3)), (_conv(3), _conv(1), IDENTITY)), {"dilation": 2}
    ),
    "3x3 + 1x1 + identity, 2 groups": Setup(Block(Target("conv", (6, 3, 3, 3), 2), (_conv(3), _conv(1), IDENTITY))),
    "depthwise 3x3 + identity": Setup(Block(Target("conv", (6, 1, 3, 3), 6), (_conv(3), IDENTITY))),
    "depthwise 5x5 + 3x3 + identity": Setup(Block(Target("conv", (6, 1, 5, 5), 6), (_conv(5), _conv(3), IDENTITY))),
    "5x5 + 3x3 + 1x1": Setup(Block(Target("conv", (5, 3, 5, 5)), (_conv(5), _conv(3), _conv(1)))),
    "3x3 + 1x3 + 3x1": Setup(Block(Target("conv", (5, 3, 3, 3)), (_conv(3), _conv((1, 3)), _conv((3, 1))))),
    "1x1 + identity": Setup(Block(Target("conv", (5, 5, 1, 1)), (_conv(1), IDENTITY))),
    "depthwise 5x5 + 3x3, dilation 2": Setup(
        Block(Target("conv", (6, 1, 5, 5), 6), (_conv(5), ConvBranch("dilated", "scale_dilated", size=3, dilation=2)))
    ),
    "depthwise 31x31 + 5x5": Setup(Block(Target("conv", (4, 1, 31, 31), 4), (_conv(31), _conv(5)))),
    "two 3x3": Setup(Block(Target("conv", (4, 4, 3, 3)), (_conv(3), ConvBranch("other", "scale_other", size=3)))),
}
# Maps that mix entries, or number them: no constants follow rules of degree 0 where entries are mixed.
FIXED = {
    "3x3 + 1x1 + average pooling": Setup(
        Block(Target("conv", (6, 4, 3, 3)), (_conv(3), _conv(1), _filter("pooled", average_filter((3, 3)))))
    ),
    "3x3 + Sobel x + Sobel y + Laplacian": Setup(
        Block(
            Target("conv", (6, 6, 3, 3)),
            (_conv(3), _filter("x", SOBEL_X), _filter("y", SOBEL_Y), _filter("laplacian", LAPLACIAN), IDENTITY),
        )
    ),
    "depthwise 3x3 + average, stride 2": Setup(
        Block(Target("conv", (6, 1, 3, 3), 6), (_conv(3), _filter("pooled", average_filter((3, 3))))), {"stride": 2}
    ),
    "9 frequencies of a 3x3": Setup(
        Block(
            Target("conv", (5, 4, 3, 3)),
            tuple(_filter(f"frequency_{i}", basis) for i, basis in enumerate(dct_filters((3, 3)))),
        )
    ),
    "3x3 + 1x1 before a frozen 3x3": Setup(
        Block(
            Target("conv", (6, 4, 3, 3)),
            (
                _conv(3),
                FrozenConvBranch("first", "scale_first", frozen=torch.randn(6, 5, 3, 3, generator=_generator(4))),
            ),
        )
    ),
    "depthwise 7x7 by distance + 3x3": Setup(
        Block(
            Target("conv", (6, 1, 7, 7), 6),
            (PriorBranch("large", "scale_large", prior=distance_prior((7, 7))), _conv(3)),
        )
    ),
}
LAYERS = {
    "1d: 5 + 3 + identity": Setup(Block(Target("conv", (6, 3, 5), 2), (_conv(5), _conv(3), IDENTITY)), {}, RepConv1d),
    "1d: 3 + average, stride 2": Setup(
        Block(Target("conv", (6, 4, 3)), (_conv(3), _filter("pooled", average_filter((3,))))), {"stride": 2}, RepConv1d
    ),
    "3d: 3x3x3 + 1x1x1 + identity": Setup(
        Block(Target("conv", (5, 5, 3, 3, 3)), (_conv(3), _conv(1), IDENTITY)), {}, RepConv3d
    ),
    "linear + identity": Setup(Block(Target("fc", (6, 6)), (_conv(()), IDENTITY)), {}, RepLinear),
    "transposed 3x3 + 1x1, stride 2": Setup(
        Block(Target("conv", (6, 2, 3, 3), 2), (_conv(3), _conv(1))), {"stride": 2}, RepConvTranspose
    ),
}
# No constants follow these: the branches are held.
FUNCTIONS = {
    "3x3 + 1x1 + 1x1 - 3x3 + average (DBB)": Setup(dbb_block(Target("conv", (6, 4, 3, 3)), 5)),
    "OREPA": Setup(orepa_block(Target("conv", (6, 4, 3, 3)))),
    "RepMLP: fully connected + 3x3 + 1x1": Setup(repmlp_block(2, 3, (4, 4), (3, 1)), {}, RepLinear),
}
ALL_BLOCKS = BLOCKS | FIXED | LAYERS | FUNCTIONS
# Epsilon breaks the degree of homogeneity; where it is far below every gradient, the rules are exact to rounding.
ADAM = {"lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-30, "weight_decay": 0.01}
RMSPROP = {"lr": 0.01, "alpha": 0.9, "eps": 1e-30, "weight_decay": 0.01}
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "sgd": ("sgd", {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    "sgd, dampened": ("sgd", {"lr": 0.05, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.01}),
    "adamw": ("adamw", ADAM),
    "adamw, amsgrad": ("adamw", {**ADAM, "amsgrad": True}),
    "adam, decoupled": ("adam", {**ADAM, "decoupled_weight_decay": True}),
    "rmsprop": ("rmsprop", RMSPROP),
    "rmsprop, centered": ("rmsprop", {**RMSPROP, "centered": True, "momentum": 0.9}),
    "lion": ("lion", {"lr": 0.001, "betas": (0.9, 0.99), "weight_decay": 0.01}),
}
# Rules that no multiplier follows: the branches are held. Rows of SETTINGS are checked in both forms.
HELD_ONLY: dict[str, tuple[str, dict[str, Any]]] = {
    "adam, coupled decay": ("adam", {**ADAM, "weight_decay": 0.05}),
    "adafactor": ("adafactor", {"lr": 0.01, "weight_decay": 0.01}),
    "muon": ("muon", {"lr": 0.01, "weight_decay": 0.01}),
    "lars": ("lars", {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}),
    "lamb": ("lamb", {"lr": 0.01, "weight_decay": 0.01}),
}
SIGNS = {"positive": 0.0, "mixed": 0.5}


class Pooled(RepLayer):
    """The smallest network around a declared layer, (N, C, *size) -> (N, O): batch norm, ReLU, pooling."""

    bn: nn.Module

    @override
    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn(self.linear_part(x)))
        return y.flatten(2).mean(2) if y.dim() > 2 else y


@functools.cache
def _pooled(layer: type[RepLayer]) -> type[Pooled]:
    return type(f"Pooled{layer.__name__}", (Pooled, layer), {})


def one_block(setup: Setup, mode: Mode) -> Pooled:
    """Return the smallest network around a declared block."""
    network: Pooled = _pooled(setup.layer)(setup.block, mode, **setup.settings)
    channels, *size = setup.block.target.shape[0], *setup.block.target.shape[2:]
    network.bn = (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[len(size)](channels)
    return network


def largest_difference(
    csla: nn.Module, target: nn.Module, rule: str, sign: float, images: Tensor, steps: int, form: str = "compact"
) -> float:
    """Train both networks and return the largest relative difference of a declared block's kernel, ||a - b|| / ||b||.

    Args:
        csla, target: the same network in these modes, float64.
        rule: a row of `SETTINGS`, or of `HELD_ONLY` where branches are held.
        sign: probability that a scale is negative.
        images: (N, C, H, W), float64; image n has the class n.
        steps: of training.
        form: of the target's optimizer: it keeps multipliers ("compact"), or the branches ("held").
    """
    generator = torch.Generator().manual_seed(1)

    def random_scale(like: Tensor) -> Tensor:
        magnitudes, chances = torch.rand(2, *like.shape, generator=generator, dtype=like.dtype)
        return torch.where(chances < sign, -0.5 - magnitudes, 0.5 + magnitudes)

    scales = {name: random_scale(values) for name, values in repopt.extract_scales(csla).items()}
    target.load_state_dict(csla.state_dict(), strict=False)  # what is not in a block; the blocks follow
    for model in (csla, target):
        torch.manual_seed(2)
        repopt.initialize(model, scales)
    held = repopt.share_branches(copy.deepcopy(csla), target) if form == "held" else None
    for module in _blocks(csla):
        run_branch_by_branch(module)
    name, settings = (SETTINGS | HELD_ONLY)[rule]
    train(csla, repopt.build_optimizer(name, csla, **settings), images, steps)
    rep = repopt.build_optimizer(name, target, None if held else scales, branches=held, **settings)
    train(target, rep, images, steps)
    pairs = zip(_blocks(csla), _blocks(target), strict=True)
    with torch.no_grad():
        return max(float((a.kernel() - b.kernel()).norm() / b.kernel().norm()) for a, b in pairs)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, steps: int) -> None:
    """Train for some steps, to tell the images apart."""
    torch.manual_seed(3)  # of dropout
    for _ in range(steps):
        optimizer.zero_grad()
        logits = model(images)
        F.cross_entropy(logits, torch.arange(len(images)) % logits.shape[1]).backward()
        optimizer.step()
        optimizer.zero_grad()


def create(model: str, mode: Mode) -> nn.Module:
    """Return a network for as many classes as it is tried on images."""
    return repopt.create_model(model, mode=mode, num_classes=4)


def cases(
    model: str, steps: int = 50, network_steps: int = 3
) -> Iterator[tuple[str, str, str, str, Callable[[], float]]]:
    """Yield (network, form, rule, signs of the scales, what measures the difference): single blocks, then `model`.

    Args:
        model: the name of a network, as `create` takes it.
        steps, network_steps: of training a single block, and `model`.
    """
    networks: list[tuple[str, Block | None, Callable[[Mode], nn.Module], tuple[int, ...], int]] = []
    for name, setup in ALL_BLOCKS.items():
        networks.append((name, setup.block, functools.partial(one_block, setup), setup.input_shape(), steps))
    networks.append((model, None, functools.partial(create, model), (4, 3, 64, 64), network_steps))
    generator = torch.Generator().manual_seed(0)
    compact = itertools.product(["compact"], SETTINGS, SIGNS)
    for form, rule, signs in (*compact, *itertools.product(["held"], [*SETTINGS, *HELD_ONLY], ["mixed"])):
        for name, block, build, shape, trained in networks:
            if form == "compact" and block is not None and not follows(block, rule):
                continue
            images = torch.randn(shape, generator=generator, dtype=torch.float64)
            csla, target = build("csla").double(), build("target").double()
            arguments = csla, target, rule, SIGNS[signs], images, trained, form
            yield name, form, rule, signs, functools.partial(largest_difference, *arguments)


def follows(block: Block, rule: str) -> bool:
    """Return whether constants follow a block under a row of `SETTINGS`."""
    degree = repopt.optim.RULES[SETTINGS[rule][0]].rep.degree
    return block.follows_constants(degree)


def _blocks(model: nn.Module) -> list[RepLayer]:
    return [module for module in model.modules() if isinstance(module, RepLayer)]


def main() -> int:
    """Print every case; 1 if one is above the bound."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="RepOpt-VGG-nano", help="whole network that is checked after the blocks")
    parser.add_argument("--steps", type=int, default=3, help="of training that network")
    args = parser.parse_args()
    differences = []
    for name, form, rule, signs, measure in cases(args.model, network_steps=args.steps):
        differences.append(measure())
        print(f"{name:34} {form:8} {rule:20} {signs:9} {differences[-1]:.1e}")
    equal = all(difference <= BOUND for difference in differences)  # false for NaN too
    print(f"largest relative difference {max(differences):.1e}, bound {BOUND:.0e}: {'equal' if equal else 'NOT EQUAL'}")
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
