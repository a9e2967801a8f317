"""What a training asks of a GPU: how many kernels, copies and fills of memory each part of a step is, and a step of the
optimizer alone.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import repopt
from benchmarks.arguments import positive
from benchmarks.data import resident_loader
from benchmarks.hyper_search import RECIPE, criterion
from benchmarks.optimizer import SETTINGS
from benchmarks.report import Row, Table
from benchmarks.training_step import precision_on, to_device
from data import cifar, seeding
from repopt.errors import UserError
from train.nonfinite import NonFiniteGuard

WARM_UP = 3  # steps, in which state is made and the optimizer's step compiled


Training = tuple[str, str, repopt.optim.Implementation]
"""The mode of a network, the name of its optimizer, and how that computes its step."""
TRAININGS: dict[str, Training] = {
    "search, branches in the network": ("hs", "SGD", "auto"),
    "search, branches held": ("search", "SGD", "compiled"),
    "target, RepSGD eager": ("target", "SGD", "eager"),
    "target, RepSGD compiled": ("target", "SGD", "compiled"),
    "target, RepAdamW eager": ("target", "AdamW", "eager"),
    "target, RepAdamW compiled": ("target", "AdamW", "compiled"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this subject's arguments."""
    parser.add_argument("--arch", default="RepOpt-VGG-B1", help="model (default: %(default)s)")
    parser.add_argument("--batch-size", type=positive, default=RECIPE.DATA.BATCH_SIZE, help="default: %(default)s")


def run(arguments: argparse.Namespace, device: torch.device) -> Iterator[Table]:
    """Yield tables of steps of training by their parts, and of steps of the optimizer in a CUDA graph.

    Raises:
        UserError: the device is no GPU.
    """
    if device.type != "cuda":
        raise UserError(f"launches are counted on a GPU (--device cuda), not on {device.type}")
    arch, batch_size = arguments.arch, arguments.batch_size
    of_trainings = {name: parts_of_a_step(arch, training, batch_size, device) for name, training in TRAININGS.items()}
    parts = next(iter(of_trainings.values()))
    rows: list[Row] = [{"part": part, **{name: own[part] for name, own in of_trainings.items()}} for part in parts]
    rows.append({"part": "all", **{name: sum(own.values()) for name, own in of_trainings.items()}})
    size = cifar.SIZE
    yield f"Device operations of a step of {arch}, {batch_size} images of {size} x {size}, the model eager", rows
    yield f"Device operations of the optimizer's compiled step of {arch} in a CUDA graph", list(graphs(arch, device))


@contextmanager
def counted(found: dict[str, int], name: str) -> Iterator[None]:
    """Enter into `found` how many device operations (kernels, copies, fills of memory) what is done within takes."""
    if stand_in := sys.modules.get("nullgpu"):  # for a GPU, which counts by itself and has no profiler
        stand_in.reset()
        yield
        found[name] = sum(stand_in.stats()[kind] for kind in ("launches", "memsets", "d2d", "h2d", "d2h"))
        return
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        yield
        torch.cuda.synchronize()
    events = (event for event in seen.events() if event.device_type is DeviceType.CUDA)
    found[name] = sum(not event.is_user_annotation for event in events)


def parts_of_a_step(arch: str, training: Training, batch_size: int, device: torch.device) -> dict[str, int]:
    """Return device operations by the parts of a step of `train.trainer.Trainer`, after some others."""
    model, optimizer, clip = network(arch, *training, device)
    precision, loss_of = precision_on(device), criterion()
    found: dict[str, int] = {}  # of the last step
    part = functools.partial(counted, found)
    guard, optimizer_step = NonFiniteGuard(model, optimizer, device), optimizer.step
    pixels = np.zeros(((WARM_UP + 1) * batch_size, cifar.SIZE, cifar.SIZE, 3), np.uint8)
    batches = iter(resident_loader("cf100", pixels, device, batch_size=batch_size))
    for step in range(WARM_UP + 1):
        with part("seeds"):
            seeding.reseed(0, 0, seeding.MODEL, step, device=device)
        with part("augmentation"):
            images, targets = next(batches)
        with part("forward pass"), precision.autocast():
            logits = model(images)
        with part("loss"), precision.autocast():
            loss = guard.nan_if_not_finite(loss_of(logits, targets))
        with part("backward pass"):
            loss.backward()
        with part("clipping"):
            norm = clip() if clip else None
        optimizer.found_inf = torch.zeros((), device=device)
        with part("optimizer"):
            optimizer.step()
        optimizer.step = lambda: None
        with part("rest of the safeguard"):
            guard.step(norm)
        optimizer.step = optimizer_step
        optimizer.zero_grad(set_to_none=True)
    return found


def network(
    arch: str, mode: str, name: str, implementation: repopt.optim.Implementation, device: torch.device
) -> tuple[nn.Module, Any, Callable[[], Tensor] | None]:
    """Return a network, its optimizer, and what clips its gradients; None where the optimizer does it."""
    model = repopt.create_model(arch, mode="target" if mode == "search" else mode, num_classes=cifar.NUM_CLASSES)
    scales = repopt.bind(model, source="initial") if mode == "target" else None
    if scales is not None:
        scales.initialize()
    to_device(model, device).train()
    settings, max_norm = SETTINGS[name] | {"implementation": implementation}, RECIPE.TRAIN.CLIP_GRAD
    branches = repopt.hold_branches(model) if mode == "search" else None
    own: dict[str, Any] = {"branches": branches, "max_norm": None if mode == "hs" else max_norm}
    optimizer = repopt.build_optimizer(name.lower(), model, scales, **own, **settings)
    clip = functools.partial(nn.utils.clip_grad_norm_, list(model.parameters()), max_norm)
    return model, optimizer, clip if mode == "hs" else None


def graphs(arch: str, device: torch.device) -> Iterator[Row]:
    """Capture a step of the optimizer with learning rates of either kind, and count what the graph holds."""
    for name, settings in SETTINGS.items():
        for kind, rate in {"a number": settings["lr"], "a tensor": torch.tensor(settings["lr"], device=device)}.items():
            model, optimizer, _ = network(arch, "target", name, "compiled", device)
            for group in optimizer.param_groups:
                group |= {"lr": rate, "capturable": True}
            for param in model.parameters():
                param.grad = torch.zeros_like(param)
            stream, graph = torch.cuda.Stream(device), torch.cuda.CUDAGraph()
            found: dict[str, int] = {}
            with torch.cuda.stream(stream):
                for _ in range(WARM_UP):
                    optimizer.step()
                with counted(found, "operations"):
                    optimizer.step()
            with torch.cuda.graph(graph, stream=stream):
                optimizer.step()
            graph.replay()
            yield {"optimizer": type(optimizer).__name__, "learning rate": kind, **found}
