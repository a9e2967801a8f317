"""Which branches help a plain network: the blocks of the field, each by three ways of training, and none.

    python scripts/study_branches.py [--data digits patches glyphs] [--seeds 0 1 2 3 4] [--output output/branches.json]

A VGG of 12 convolutions (`study_prior.py`, whose images and schedule these are) is trained

    plain         as it is, by SGD
    multi-branch  with the branches built in, every one with a batch norm of its own, folded after training
    constants     by the RepOptimizer of the branches with scales of 1
    one run       by the optimizer that holds the branches and searches their scales

Every training is one thread, and as many run at a time as there are cores. What is done is kept in the JSON file; the
command goes on there.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import _root  # noqa: F401
import study_prior
import torch
from branch_by_branch import branch_output
from torch import Tensor, nn
from tqdm import tqdm
from typing_extensions import override

import repopt
from repopt.csla import Block
from repopt.priors import PRIORS

WAYS = ("multi-branch", "constants", "one run")
BLOCKS = ("repvgg", "acnet", "average", "edge", "frequency", "distance", "orepa")  # a 3x3 has no dilated one
FUNCTIONS = ("orepa",)  # which no constants follow
PLAIN = "plain"


class Run(NamedTuple):
    """A training: the images, the branches (`PLAIN` without), the way, the learning rate and the seed."""

    images: str
    branches: str
    way: str
    rate: float
    seed: int


class MultiBranch(nn.Module):
    """A block's branches, (N, C, H, W) -> (N, O, H', W'), with a batch norm each."""

    def __init__(self, block: Block, stride: int) -> None:
        super().__init__()
        self.layer = repopt.RepConv2d(block, "csla", stride)
        self.norms = nn.ModuleDict({b.kernel: nn.BatchNorm2d(block.target.shape[0]) for b in block.branches})

    @override
    def forward(self, x: Tensor) -> Tensor:
        outputs = [
            self.norms[branch.kernel](branch_output(branch, self.layer.values(branch.kernel), x, self.layer))
            for branch in self.layer.block.branches
        ]
        return sum(outputs[1:], outputs[0])


def build_in(network: nn.Module, prior: str) -> None:
    """Replace every convolution that the prior has branches for, and the batch norm after it, by a `MultiBranch`."""
    for stage in network.modules():
        if isinstance(stage, nn.Sequential):
            for index, conv in enumerate(stage):
                if isinstance(conv, nn.Conv2d) and (block := PRIORS[prior](conv)) is not None:
                    stage[index], stage[index + 1] = MultiBranch(block, conv.stride[0]), nn.Identity()


def train(run: Run) -> float:
    """Return the top-1 accuracy (%) of a training's end on the val images."""
    torch.set_num_threads(1)
    torch.manual_seed(run.seed)
    images, labels = study_prior.images_of(run.images, "train")
    model = study_prior.plain(12, int(labels.max()) + 1)
    settings: dict[str, Any] = {"lr": run.rate, "momentum": 0.9, "weight_decay": 4e-5}
    if run.way == "multi-branch":
        build_in(model, run.branches)
    elif run.way != PLAIN:
        repopt.declare(model, run.branches)
        if run.way == "constants":
            settings["scales"] = repopt.bind(model, source="one")
            repopt.initialize(model, settings["scales"])
        else:
            settings["branches"] = repopt.hold_branches(model)
    optimizer = repopt.build_optimizer("sgd", model, **settings)
    study_prior.fit(model, optimizer, images, labels)
    return study_prior.evaluate(model.eval(), *study_prior.images_of(run.images, "val"))


def as_markdown(found: dict[Run, float]) -> str:
    """Return the table of means and standard deviations over the seeds, a row for each rate and kind of branches."""
    columns = list(dict.fromkeys(run.images for run in sorted(found)))
    lines = [f"| rate | branches | trained | {' | '.join(columns)} |", "|---" * (3 + len(columns)) + "|"]
    kinds = {(run.rate, run.branches, run.way) for run in found}
    order = {name: number for number, name in enumerate((PLAIN, *BLOCKS, *WAYS))}
    for kind in sorted(kinds, key=lambda k: (k[0], order[k[1]], order[k[2]])):
        cells = []
        for images in columns:
            values = [
                top1 for run, top1 in found.items() if (run.images, run.rate, run.branches, run.way) == (images, *kind)
            ]
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.1f}{spread}" if values else "")
        lines.append(f"| {' | '.join(map(str, (*kind, *cells)))} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is not done yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    images = ["digits", "patches", "glyphs"]
    parser.add_argument("--data", nargs="+", choices=images, default=images, help=f"default: {images}")
    parser.add_argument("--branches", nargs="+", choices=BLOCKS, default=BLOCKS, help="default: all")
    parser.add_argument("--rates", nargs="+", type=float, default=[0.05], help="default: 0.05")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4], help="default: 0 1 2 3 4")
    parser.add_argument("--output", type=Path, default=Path("output/branches.json"), help="default: %(default)s")
    arguments = parser.parse_args(argv)
    kept = json.loads(arguments.output.read_text()) if arguments.output.exists() else []
    found = {Run(*entry["run"]): entry["top1"] for entry in kept}
    kinds = [(PLAIN, PLAIN)]
    for branches, way in itertools.product(arguments.branches, WAYS):
        if branches not in FUNCTIONS or way == "one run":
            kinds.append((branches, way))
    grid = itertools.product(arguments.seeds, arguments.data, kinds, arguments.rates)
    asked = [Run(data, *kind, rate, seed) for seed, data, kind, rate in grid]
    todo = [run for run in asked if run not in found]
    with multiprocessing.get_context("spawn").Pool() as pool:
        for run, top1 in tqdm(pool.imap_unordered(timed, todo), total=len(todo)):
            found[run] = top1
            study_prior.keep(found, arguments.output)
    print(as_markdown(found))
    return 0


def timed(run: Run) -> tuple[Run, float]:
    """Return a run and its accuracy."""
    return run, train(run)


if __name__ == "__main__":
    sys.exit(main())
