"""The device's own ceilings, and what no other subject measures: a hyper-search between its epochs, the kernels that
take the time of its steps, and the demo's trainings with their accuracy.
"""

from __future__ import annotations

import argparse
import functools
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import _root
import numpy as np
import torch
from demo import EPOCHS, FAMILIES, demo_run
from runs import epochs_of
from torch.profiler import ProfilerActivity, profile

import main_repopt
import repopt
from benchmarks.arguments import add_rounds, positive, rounds_of
from benchmarks.hyper_search import BATCH, RECIPE, our_search
from benchmarks.report import Row, Table
from benchmarks.timing import Step, interleave, synchronize
from benchmarks.training import matrix_rate
from benchmarks.training_step import AS_IN_TRAINING, MODES, SGD, memory_format_on, mode_on, precision_on, to_device
from data import cifar
from repopt import checkpoint
from repopt.errors import UserError
from train.command import EXIT_DONE
from train.evaluation.classification import evaluate

TEST_BATCHES = -(-10_000 // BATCH)  # of CIFAR-100
LAUNCHES = 1000
PROFILED = 5  # steps
KERNELS = 15  # that are shown


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this subject's arguments."""
    parser.add_argument("--arch", default="RepOpt-VGG-B1", help="model that is searched (default: %(default)s)")
    parser.add_argument("--compile", choices=MODES, help=f"of the profiled steps (default: {AS_IN_TRAINING})")
    parser.add_argument(
        "--epochs", type=positive, default=EPOCHS, help="of the demo's trainings (default: %(default)s)"
    )
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts (default: all)")
    add_rounds(parser, 5)


def run(arguments: argparse.Namespace, device: torch.device) -> Iterator[Table]:
    """Yield the tables of one part after the other."""
    for part in arguments.only:
        yield from PARTS[part](arguments, device)


def ceilings(arguments: argparse.Namespace, device: torch.device) -> Iterator[Table]:
    """A copy in the device's memory, a matrix product in the number format of training, and the start of a kernel."""
    source = torch.randn(2**28 if device.type == "cuda" else 2**24, device=device)
    target, number = torch.empty_like(source), torch.zeros(1, device=device)

    def launches() -> None:
        for _ in range(LAUNCHES):
            number.add_(1)

    steps: dict[str, Step] = {"copy": functools.partial(target.copy_, source), "launches": launches}
    seconds = interleave(steps, device, rounds=rounds_of(arguments))
    rows: list[Row] = [
        {"what": "copy, bytes read and written", "measured": 2e-9 * source.nbytes / seconds["copy"], "unit": "GB/s"},
        {"what": "matrix product", "measured": 1e-12 * matrix_rate(device), "unit": "TFLOP/s"},
        {"what": "kernel on one number", "measured": 1e6 * seconds["launches"] / LAUNCHES, "unit": "us"},
    ]
    yield "Ceilings of the device", rows


def between_epochs(arguments: argparse.Namespace, device: torch.device) -> Iterator[Table]:
    """An evaluation of the searched network, and a checkpoint of it with its optimizer."""
    model = repopt.create_model(arguments.arch, mode="hs", num_classes=cifar.NUM_CLASSES)
    to_device(model, device)
    optimizer = repopt.build_optimizer("sgd", model, None, **SGD)
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    optimizer.step()  # makes the momentum
    images = torch.randn(BATCH, 3, cifar.SIZE, cifar.SIZE, device=device)
    images = images.contiguous(memory_format=memory_format_on(device))
    batches = [(images, torch.zeros(BATCH, dtype=torch.int64, device=device))] * (
        TEST_BATCHES if device.type == "cuda" else 4
    )
    (_root.ROOT / "output").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=_root.ROOT / "output") as folder:  # on the disk on which a run writes
        file = Path(folder, "checkpoint.pth")
        steps = {
            "evaluation": lambda: evaluate(model, batches, precision_on(device)),
            "checkpoint": lambda: checkpoint.write(
                {"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file
            ),
        }
        seconds = interleave(steps, device, rounds=rounds_of(arguments), warm_up=1)
        megabytes = file.stat().st_size / 1e6
    evaluations = -(-RECIPE.TRAIN.EPOCHS // RECIPE.TEST.PERIOD)
    rows: list[Row] = [
        {
            "what": f"evaluation, {len(batches)} batches of {BATCH} images",
            "s": seconds["evaluation"],
            "in a search": evaluations,
            "minutes of a search": seconds["evaluation"] / len(batches) * TEST_BATCHES * evaluations / 60,
        },
        {
            "what": f"checkpoint of {megabytes:.0f} MB, synced to the disk",
            "s": seconds["checkpoint"],
            "in a search": None,
            "minutes of a search": None,
        },
    ]
    yield f"Between two epochs of the hyper-search of {arguments.arch}", rows


def kernels(arguments: argparse.Namespace, device: torch.device) -> Iterator[Table]:
    """Steps of the hyper-search by the kernels (on CPUs: operations) that take most of the device's time."""
    mode = arguments.compile or mode_on(device, BATCH, cifar.SIZE)
    pixels = np.random.default_rng(0).integers(0, 256, (BATCH * PROFILED, cifar.SIZE, cifar.SIZE, 3), dtype=np.uint8)
    steps = our_search(arguments.arch, pixels, device, PROFILED, mode)
    for _ in range(2):  # compile, and record what is replayed
        steps()
    synchronize(device)
    gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU]) as seen:
        steps()
        synchronize(device)
    events = [event for event in seen.key_averages() if not event.is_user_annotation]
    microseconds = {event.key: event.self_device_time_total if gpu else event.self_cpu_time_total for event in events}
    whole = sum(microseconds.values())
    rows: list[Row] = [
        {
            "kernel": " ".join(event.key.split())[:80].replace("|", " "),
            "launches per step": event.count / PROFILED,
            "ms per step": 1e-3 * microseconds[event.key] / PROFILED,
            "share %": 100 * microseconds[event.key] / whole,
        }
        for event in sorted(events, key=lambda event: microseconds[event.key], reverse=True)[:KERNELS]
    ]
    each = 1e-3 * whole / PROFILED
    yield f"A step of the hyper-search of {arguments.arch}, compile {mode}: {each:.2f} ms in kernels", rows


def digits(arguments: argparse.Namespace, device: torch.device) -> Iterator[Table]:
    """The demo's hyper-search, and the plain network trained with its scales, by `main_repopt.py` as it stands."""
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        family = FAMILIES["vgg"]._replace(folder=Path(folder))
        for name, mode in {"hyper-search": "hs", "plain network": "target"}.items():
            trained = demo_run(family, mode)
            if main_repopt.main([*trained.command, "TRAIN.EPOCHS", str(arguments.epochs)]) != EXIT_DONE:
                raise UserError(f"the training on digits has failed ({name})")
            epochs = epochs_of(trained.folder)
            seconds = sum(epoch["train_seconds"] for epoch in epochs)
            rows.append({"training": name, "top-1 (%)": epochs[-1]["val"]["top1"], "training (s)": seconds})
            yield f"{family.model} on digits, {arguments.epochs} epochs, fp32 on CPUs and bf16 on GPUs", rows


PARTS: dict[str, Callable[[argparse.Namespace, torch.device], Iterator[Table]]] = {
    "ceilings": ceilings,
    "between-epochs": between_epochs,
    "kernels": kernels,
    "digits": digits,
}
