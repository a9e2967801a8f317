"""What a hyper-search costs: its step beside that of the plain network at the same size, the branches held by the
optimizer, merged into one convolution by the network, or one by one; and the whole search of CIFAR-100 beside the
textbook's loop.
"""

from __future__ import annotations

import argparse
import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import _root
import numpy as np
import torch
from branch_by_branch import run_branch_by_branch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, RandomSampler

import repopt
from benchmarks import baseline
from benchmarks.arguments import add_rounds, positive, rounds_of
from benchmarks.data import resident_loader
from benchmarks.report import Row, Table
from benchmarks.timing import Rounds, Step, interleave, peak_extra
from benchmarks.training_step import AS_IN_TRAINING, MODES, SGD, TrainingStep, mode_on, precision_on, to_device, under
from data import cifar
from repopt.layers import RepConv2d
from train import config
from train.checkpoint import RunFolder
from train.distributed import World
from train.schedule import build_schedule
from train.state import TrainingState
from train.tasks.classify import Classify
from train.trainer import Trainer

SIZES = {32: 128, 224: 8}  # pixels: images in a batch
RECIPE = config.parse(
    ["--cfg", str(_root.ROOT / "configs/hyper_search/b1.yaml"), "--opts", "TRAIN.ACCUMULATION_STEPS", "1"]
).cfg
BATCH = RECIPE.DATA.BATCH_SIZE
PARTS = STEP, SEARCH = "steps", "search"
STEPS = 50_000 // BATCH * RECIPE.TRAIN.EPOCHS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this subject's arguments."""
    parser.add_argument("--arch", default="RepOpt-VGG-B1", help="model (default: %(default)s)")
    parser.add_argument("--compile", nargs="+", choices=MODES, help=f"default: {AS_IN_TRAINING}")
    add_rounds(parser, 5)
    parser.add_argument("--steps", type=positive, help="of the search in a turn (default: 200 on GPUs, 4 on CPUs)")
    sizes = "pixels of the images of single steps (default: all)"
    parser.add_argument("--image-size", nargs="+", type=positive, choices=SIZES, default=list(SIZES), help=sizes)
    parser.add_argument("--only", choices=PARTS, help="single steps, or the whole search (default: both)")


def run(arguments: argparse.Namespace, device: torch.device) -> Iterator[Table]:
    """Yield the tables of single steps and of the whole search."""
    arch, rounds = arguments.arch, rounds_of(arguments)
    if arguments.only != SEARCH:
        for size in arguments.image_size:
            rows: list[Row] = []
            for mode in arguments.compile or [mode_on(device, SIZES[size], size)]:
                rows += steps(arch, device, mode, batch_size=SIZES[size], image_size=size, rounds=rounds)
                yield f"A step of {arch}, batches of {SIZES[size]} images of {size} x {size}", rows
    if arguments.only != STEP:
        per_turn = arguments.steps or (200 if device.type == "cuda" else 4)
        title = f"The hyper-search of {arch} on CIFAR-100: {per_turn} steps of {BATCH} images in a turn, {rounds}"
        modes = arguments.compile or [mode_on(device, BATCH, cifar.SIZE)]
        yield title, searches(arch, device, modes, per_turn=per_turn, rounds=rounds)


def one_by_one(model: nn.Module) -> nn.Module:
    """Return the model, whose blocks are now computed branch by branch."""
    for module in model.modules():
        if isinstance(module, RepConv2d):
            run_branch_by_branch(module)  # type: ignore[method-assign]  # of this one
    return model


def steps(arch: str, device: torch.device, mode: str, *, batch_size: int, image_size: int, rounds: Rounds) -> list[Row]:
    """Return rows of a step of the plain network, and of the hyper-search in both ways, under one compile mode."""
    torch.compiler.reset()  # it keeps eight programs of one function
    shape: dict[str, Any] = {
        "batch_size": batch_size,
        "image_size": image_size,
        "num_classes": cifar.NUM_CLASSES,
        "compile_mode": mode,
    }
    contenders = {
        "plain network, RepSGD": TrainingStep(arch, device, **shape),
        "hyper-search, branches held": TrainingStep(arch, device, mode="search", **shape),
        "hyper-search, branches merged": TrainingStep(arch, device, mode="hs", **shape),
        "hyper-search, branch by branch": TrainingStep(arch, device, mode="hs", **shape),
    }
    one_by_one(contenders["hyper-search, branch by branch"].model)
    seconds = interleave(contenders, device, rounds=rounds, settle=True)
    return [
        {
            "step": name,
            "compile": mode,
            "ms": 1e3 * seconds[name],
            "time / plain network": seconds[name] / seconds["plain network, RepSGD"],
            "peak extra MB": peak_extra(step, device) / 1e6,
        }
        for name, step in contenders.items()
    ]


def searches(arch: str, device: torch.device, modes: list[str], *, per_turn: int, rounds: Rounds) -> list[Row]:
    """Return rows of some steps of the search by the textbook and by ours, and what all of its steps would take."""
    torch.compiler.reset()
    pixels = np.random.default_rng(0).integers(0, 256, (50_000, 32, 32, 3), dtype=np.uint8)
    contenders: dict[str, Step] = {"textbook": textbook_search(arch, pixels, device, per_turn)}
    for mode in modes:
        contenders[f"ours, compile {mode}"] = our_search(arch, pixels, device, per_turn, mode)
    seconds = interleave(contenders, device, rounds=rounds, warm_up=1)
    return [
        {
            "search": name,
            "ms per step": 1e3 * own / per_turn,
            f"extrapolated minutes of {STEPS:,} steps": own / per_turn * STEPS / 60,
            "speed / textbook": seconds["textbook"] / own,
        }
        for name, own in seconds.items()
    ]


class _Images(Dataset):
    """CIFAR's images, transformed one by one."""

    def __init__(self, pixels: np.ndarray) -> None:
        self._pixels = pixels
        self._transform = baseline.small("cf100")

    def __len__(self) -> int:
        return len(self._pixels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self._transform(self._pixels[index]), index % cifar.NUM_CLASSES


def criterion() -> nn.Module:
    """Return the search's loss."""
    return nn.CrossEntropyLoss(label_smoothing=RECIPE.MODEL.LABEL_SMOOTHING)


def textbook_search(arch: str, pixels: np.ndarray, device: torch.device, count: int) -> Step:
    """Return so many steps in eager fp32, branch by branch; worker processes load image by image; the loss is read."""
    torch.manual_seed(0)
    model = one_by_one(repopt.create_model(arch, mode="hs", num_classes=cifar.NUM_CLASSES)).to(device)
    optimizer, loss_of = torch.optim.SGD(model.parameters(), **SGD), criterion()
    images_of_a_turn = _Images(pixels)
    loader = DataLoader(
        images_of_a_turn,
        BATCH,
        sampler=RandomSampler(images_of_a_turn, num_samples=BATCH * count),
        num_workers=min(8, os.cpu_count() or 1),
        pin_memory=device.type == "cuda",
        persistent_workers=True,  # which are idle while others have their turn
    )

    def steps() -> None:
        model.train()
        for images, labels in loader:
            loss = loss_of(model(images.to(device, non_blocking=True)), labels.to(device, non_blocking=True))
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), RECIPE.TRAIN.CLIP_GRAD)
            optimizer.step()
            loss.item()

    return steps


def our_search(arch: str, pixels: np.ndarray, device: torch.device, count: int, mode: str) -> Step:
    """Return so many steps of `main_repopt.py`: its loader, loop, skipped steps, clipping and optimizer."""
    torch.manual_seed(0)
    model = repopt.create_model(arch, mode="target", num_classes=cifar.NUM_CLASSES)
    to_device(model, device)
    loader = resident_loader("cf100", pixels[: BATCH * count], device, batch_size=BATCH)
    branches, max_norm = repopt.hold_branches(model), RECIPE.TRAIN.CLIP_GRAD
    optimizer = repopt.build_optimizer("sgd", model, branches=branches, max_norm=max_norm, **SGD)
    schedule = build_schedule(optimizer, "cosine", steps_per_epoch=10**9, epochs=1, warmup_steps=0)  # constant
    state, task = TrainingState(model, optimizer, schedule, precision_on(device)), Classify(RECIPE, World(0, 1, device))
    trainer = Trainer(task, state, loader, (), RunFolder(Path()), model=under(mode, model, device))
    epochs = itertools.count()

    def steps() -> None:
        loader.set_epoch(next(epochs))
        trainer.train_epoch()

    return steps
