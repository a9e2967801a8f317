"""Which plain networks RepVGG's branches help: depth, shortcuts, learning rate, and where the scales begin.

    python scripts/study_prior.py [--data digits patches glyphs] [--rule sgd] [--output output/prior.json]

VGGs and ResNets of torchvision's parts, three stages of 16, 32 and 64 channels on images of 16 x 16, are trained as
they are, and with the branches that `repopt.declare` says. Every training is one thread, and as many run at
a time as there are cores. What is done is kept in the JSON file, beside which a picture is drawn; the command goes on
there.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import multiprocessing
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import _root  # noqa: F401
import torch
from plots import plot_by_rate
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, cross_entropy, pad
from torchvision.models.resnet import BasicBlock
from torchvision.models.vgg import make_layers
from tqdm import tqdm

import repopt
from data import digits, glyphs, patches
from repopt.csla import Block
from repopt.priors import repvgg_prior

WIDTHS = (16, 32, 64)
STEPS, WARM_UP, BATCH = 300, 20, 32
SIZE, SHIFT = 16, 1  # pixels of an image's side, and by which it is moved at random
FEW = {"train": 5000, "val": 2000}  # of the glyphs


class Run(NamedTuple):
    """A training: a network, the images, the rule and its learning rate, the way, and the seed."""

    network: str
    images: str
    rule: str
    rate: float
    way: str
    seed: int


def plain(depth: int, classes: int) -> nn.Module:
    """Return a VGG of so many convolutions after the first, a third of them in each stage."""
    stages = [[width] * (depth // len(WIDTHS)) for width in WIDTHS]
    layers = [WIDTHS[0], *stages[0], "M", *stages[1], "M", *stages[2]]
    return nn.Sequential(make_layers(layers, batch_norm=True), *_head(classes))


def residual(depth: int, classes: int) -> nn.Module:
    """Return a ResNet of so many convolutions after the first, two in a block."""
    layers: list[nn.Module] = [make_layers([WIDTHS[0]], batch_norm=True)]
    before = WIDTHS[0]
    for width in WIDTHS:
        for block in range(depth // (2 * len(WIDTHS))):
            stride = 2 if block == 0 and width != WIDTHS[0] else 1
            shortcut = None
            if before != width:
                shortcut = nn.Sequential(nn.Conv2d(before, width, 1, stride, bias=False), nn.BatchNorm2d(width))
            layers.append(BasicBlock(before, width, stride, shortcut))
            before = width
    return nn.Sequential(*layers, *_head(classes))


def _head(classes: int) -> tuple[nn.Module, ...]:
    return nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(WIDTHS[-1], classes)


NETWORKS: dict[str, Callable[[int], nn.Module]] = {
    "VGG, 6 convolutions": lambda classes: plain(6, classes),
    "VGG, 12 convolutions": lambda classes: plain(12, classes),
    "VGG, 24 convolutions": lambda classes: plain(24, classes),
    "ResNet, 24 convolutions": lambda classes: residual(24, classes),
}
RATES = (0.02, 0.1, 0.4)


def by_depth() -> Callable[[nn.Conv2d], Block | None]:
    """Return RepVGG's prior with scales that begin at sqrt(2 / l) in the l-th convolution of a width (RepOpt-VGG's)."""
    count: Counter[int] = Counter()

    def prior(conv: nn.Conv2d) -> Block | None:
        block = repvgg_prior(conv)
        if block is None:
            return None
        count[conv.out_channels] += 1
        initial = math.sqrt(2 / count[conv.out_channels])
        return replace(block, branches=tuple(replace(branch, initial=initial) for branch in block.branches))

    return prior


WAYS = {  # what declares the branches, and whether their scales are searched
    "no branches": None,
    "scales 1": (lambda: repvgg_prior, False),
    "searched from 1": (lambda: repvgg_prior, True),
    "scales by depth": (by_depth, False),
}


def images_of(name: str, split: str) -> tuple[Tensor, Tensor]:
    """Return normalised images (N, 3, SIZE, SIZE) and labels (N,) of 'train' or 'val'."""
    source = {"digits": digits, "patches": patches, "glyphs": glyphs}[name]
    images, labels = glyphs.load("", split) if name == "glyphs" else source.load(split)  # type: ignore[attr-defined]
    if name == "glyphs":
        images, labels = images[: FEW[split]], labels[: FEW[split]]
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (source.MEAN, source.STD))
    return adaptive_avg_pool2d((images / 255 - mean) / std, SIZE), labels


def train(run: Run) -> float:
    """Return the top-1 accuracy (%) of a training's end on the val images."""
    torch.set_num_threads(1)
    torch.manual_seed(run.seed)
    images, labels = images_of(run.images, "train")
    model = NETWORKS[run.network](int(labels.max()) + 1)
    settings: dict[str, Any] = {"lr": run.rate, "momentum": 0.9, "weight_decay": 4e-5}
    branches: dict[str, repopt.HeldBranches] | None = None
    if (way := WAYS[run.way]) is not None:
        prior, searched = way
        repopt.declare(model, prior())
        constants = None if searched else repopt.constant_scales(model, "initial")
        branches = repopt.hold_branches(model, constants)
    optimizer = repopt.build_optimizer(run.rule, model, branches=branches, **settings)
    fit(model, optimizer, images, labels)
    return evaluate(model.eval(), *images_of(run.images, "val"))


def fit(model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor) -> None:
    """Train for `STEPS` on images that are moved at random."""
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / WARM_UP, 0.5 + 0.5 * math.cos(math.pi * step / STEPS)),
    )
    padded = pad(images, [SHIFT] * 4)
    for _ in range(STEPS):
        chosen = torch.randint(len(labels), (BATCH,))
        y, x = torch.randint(2 * SHIFT + 1, (2,)).tolist()
        loss = cross_entropy(model(padded[chosen, :, y : y + SIZE, x : x + SIZE]), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def evaluate(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the top-1 accuracy (%)."""
    right = sum(int((model(x).argmax(1) == y).sum()) for x, y in zip(images.split(500), labels.split(500), strict=True))
    return 100 * right / len(labels)


def as_markdown(found: dict[Run, float]) -> str:
    """Return the table of means and standard deviations over the seeds, a row for each network, images and rate."""
    lines = [f"| network | images | rule | rate | {' | '.join(WAYS)} |", "|---" * (4 + len(WAYS)) + "|"]
    setups = {run[:4] for run in found}
    for setup in sorted(setups, key=lambda s: ([*NETWORKS].index(s[0]), *s[1:])):
        cells = []
        for way in WAYS:
            values = [v for run, v in found.items() if run[:5] == (*setup, way)]
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.1f}{spread}" if values else "")
        lines.append(f"| {' | '.join(map(str, (*setup, *cells)))} |")
    return "\n".join(lines)


def draw(found: dict[Run, float], path: Path) -> None:
    """Draw what was found: a row of panels for each kind of images and rule."""
    panels: dict[tuple[str, str], dict[str, dict[float, list[float]]]] = {}
    for run, top1 in sorted(found.items(), key=lambda item: ([*NETWORKS].index(item[0].network), item[0].rate)):
        ways = panels.setdefault((f"{run.images}, {run.rule}", run.network), {way: {} for way in WAYS})
        ways[run.way].setdefault(run.rate, []).append(top1)
    plot_by_rate(panels, path)


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is not done yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", choices=["digits", "patches", "glyphs"], default=["digits", "patches"])
    parser.add_argument("--rule", default="sgd", help="update rule (default: %(default)s)")
    parser.add_argument("--rates", nargs="+", type=float, default=RATES, help=f"default: {RATES}")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--output", type=Path, default=Path("output/prior.json"), help="default: %(default)s")
    arguments = parser.parse_args(argv)
    kept = json.loads(arguments.output.read_text()) if arguments.output.exists() else []
    found = {Run(*entry["run"]): entry["top1"] for entry in kept}
    asked = [
        Run(network, images, arguments.rule, rate, way, seed)
        for seed, network, images, rate, way in itertools.product(
            arguments.seeds, NETWORKS, arguments.data, arguments.rates, WAYS
        )
    ]
    todo = [run for run in asked if run not in found]
    with multiprocessing.get_context("spawn").Pool() as pool:
        for run, top1 in tqdm(pool.imap_unordered(timed, todo), total=len(todo)):
            found[run] = top1
            keep(found, arguments.output)
    print(as_markdown(found))
    draw(found, arguments.output.with_suffix(".png"))
    return 0


def keep(found: Mapping[Any, float], path: Path) -> None:
    """Write what was found; a stop in between loses nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".writing")
    unfinished.write_text(json.dumps([{"run": [*run], "top1": value} for run, value in found.items()]))
    unfinished.replace(path)


def timed(run: Run) -> tuple[Run, float]:
    """Return a run and its accuracy."""
    return run, train(run)


if __name__ == "__main__":
    sys.exit(main())
