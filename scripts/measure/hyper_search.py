"""What a hyper-search costs: its step beside that of the plain network at the same size, branches merged into one
convolution or one by one; and the whole search of CIFAR-100 beside the textbook's loop.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import os
import types
from collections.abc import Iterator

import numpy as np
import torch
from check_equivalency import branch_by_branch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import repopt
from data import cifar
from measure import textbook
from measure.arguments import positive
from measure.compiling import MODES, under
from measure.data import resident_loader
from measure.placement import memory_format_on, precision_on
from measure.report import Row, Tables
from measure.training_step import SGD, TrainingStep, unchanged
from measure.turns import Step, peak_extra, take_turns
from repopt import engine
from repopt.layers import RepConv2d

SIZES = {32: 128, 224: 8}  # pixels: images in a batch
BATCH = 128  # of the published search,
STEPS = 50_000 // BATCH * 240  # which has so many steps
CLIP = 5.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of this subject."""
    parser.add_argument("--arch", default="RepOpt-VGG-B1", help="model (default: %(default)s)")
    parser.add_argument("--compile", nargs="*", choices=MODES, default=["off"], help="modes of torch.compile, or off")
    parser.add_argument("--rounds", type=positive, default=8, help="in which all take turns; medians are reported")
    parser.add_argument("--steps", type=positive, help="of the search in a turn (default: 125 on GPUs, 2 on CPUs)")


def run(arguments: argparse.Namespace, device: torch.device) -> Tables:
    """Both."""
    arch, rounds = arguments.arch, arguments.rounds
    tables = {}
    for size, batch_size in SIZES.items():
        title = f"A step of {arch}, batches of {batch_size} images of {size} x {size}"
        tables[title] = steps(arch, device, arguments.compile, batch_size=batch_size, image_size=size, rounds=rounds)
    per_turn = arguments.steps or (125 if device.type == "cuda" else 2)
    title = f"The hyper-search of {arch} on CIFAR-100: {per_turn} steps of {BATCH} images in a turn, {rounds} turns"
    tables[title] = searches(arch, device, arguments.compile, per_turn=per_turn, rounds=rounds)
    return tables


def one_by_one(model: nn.Module) -> nn.Module:
    """The model with its blocks computed branch by branch."""
    for module in model.modules():
        if isinstance(module, RepConv2d):
            module.conv2d = types.MethodType(branch_by_branch, module)
    return model


def steps(
    arch: str, device: torch.device, modes: list[str], *, batch_size: int, image_size: int, rounds: int
) -> list[Row]:
    """The plain network's step, and that of the hyper-search in both ways, under every mode of torch.compile."""
    torch.compiler.reset()  # it gives up at the ninth program of one function
    kinds = {
        "plain network, RepSGD": ("target", unchanged),
        "hyper-search, branches merged": ("hs", unchanged),
        "hyper-search, branch by branch": ("hs", one_by_one),
    }
    contenders = {}
    for mode, (kind, (form, change)) in itertools.product(modes, kinds.items()):
        contenders[kind, mode] = TrainingStep(
            arch,
            device,
            mode=form,
            batch_size=batch_size,
            image_size=image_size,
            num_classes=100,
            wrap=lambda model, change=change, mode=mode: under(mode, change(model), device),
        )
    seconds = take_turns({str(key): step for key, step in contenders.items()}, device, rounds=rounds, warm_up=3)
    rows = []
    for key, step in contenders.items():
        kind, mode = key
        own = seconds[str(key)]
        rows.append(
            {
                "step": kind,
                "compile": mode,
                "ms": 1e3 * own,
                "time / plain network": own / seconds[str((next(iter(kinds)), mode))],
                "peak extra MB": peak_extra(step, device) / 1e6,
            }
        )
    return rows


def searches(arch: str, device: torch.device, modes: list[str], *, per_turn: int, rounds: int) -> list[Row]:
    """Some steps of the search by the textbook and by ours, and what all of its steps would take."""
    torch.compiler.reset()
    pixels = np.random.default_rng(0).integers(0, 256, (50_000, 32, 32, 3), dtype=np.uint8)
    contenders: dict[str, Step] = {"textbook": textbook_search(arch, pixels, device, per_turn)}
    for mode in modes:
        contenders[f"ours, compile {mode}"] = our_search(arch, pixels, device, per_turn, mode)
    seconds = take_turns(contenders, device, rounds=rounds, warm_up=1)
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
        self._transform = textbook.small(padding=4, flip=True, mean=cifar.MEAN, std=cifar.STD)

    def __len__(self) -> int:
        return len(self._pixels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self._transform(self._pixels[index]), index % 100


def textbook_search(arch: str, pixels: np.ndarray, device: torch.device, count: int) -> Step:
    """So many steps, eagerly in fp32, branch by branch; images one by one in worker processes; the loss is read."""
    torch.manual_seed(0)
    model = one_by_one(repopt.create_model(arch, mode="hs", num_classes=100)).to(device)
    optimizer = torch.optim.SGD(model.parameters(), **SGD)
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
    loader = DataLoader(
        _Images(pixels),
        BATCH,
        shuffle=True,
        drop_last=True,
        num_workers=min(8, os.cpu_count() or 1),
        pin_memory=device.type == "cuda",
    )

    def endless() -> Iterator[list[Tensor]]:
        while True:
            yield from loader

    batches = endless()

    def steps() -> None:
        model.train()
        for images, labels in itertools.islice(batches, count):
            loss = criterion(model(images.to(device, non_blocking=True)), labels.to(device, non_blocking=True))
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            loss.item()

    return steps


def our_search(arch: str, pixels: np.ndarray, device: torch.device, count: int, mode: str) -> Step:
    """So many steps of `main_repopt.py`: its loader, loop, safeguard, clipping and optimizer."""
    torch.manual_seed(0)
    model = repopt.create_model(arch, mode="hs", num_classes=100).to(device, memory_format=memory_format_on(device))
    loader = resident_loader(pixels[: BATCH * count], True, cifar.MEAN, cifar.STD, device, batch_size=BATCH)
    train = functools.partial(
        engine.train_one_epoch,
        under(mode, model, device),
        loader,
        nn.CrossEntropyLoss(label_smoothing=0.1),
        repopt.build_optimizer("sgd", model, None, **SGD),
        batches=count,
        precision=precision_on(device),
        clip=functools.partial(nn.utils.clip_grad_norm_, list(model.parameters()), CLIP),
    )
    epochs = itertools.count()

    def steps() -> None:
        loader.set_epoch(next(epochs))
        train()

    return steps
