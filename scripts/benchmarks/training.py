"""Training images per second and memory of RepOpt-VGG and RepVGG, with the share of the device's matrix rate that they
reach, beside table 2 of the paper.
"""

from __future__ import annotations

import argparse
import functools
import gc
import os
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
from reproduction import paper

import repopt
from benchmarks.arguments import add_rounds, positive, rounds_of
from benchmarks.report import Row, Table
from benchmarks.timing import Rounds, interleave, peak_extra, timed
from benchmarks.training_step import AS_IN_TRAINING, MODES, TrainingStep, mode_on
from repopt.errors import UserError

ARCHS = ("RepOpt-VGG-B1", "RepOpt-VGG-B2", "RepOpt-VGG-L1", "RepOpt-VGG-L2")
REPOPT, REPVGG = "RepOpt", "RepVGG"
MODE_OF = {REPOPT: "target", REPVGG: "repvgg"}

Make = Callable[[int], TrainingStep]
"""A step on batches of so many images."""


class Memory(NamedTuple):
    """Bytes of a training, which grow with its batches."""

    fixed: float
    per_image: float

    def largest_batch(self, available: float) -> int:
        """Images of a batch that fit."""
        return max(0, int((available - self.fixed) / self.per_image))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this subject's arguments."""
    parser.add_argument("--arch", nargs="+", default=list(ARCHS), help="models (default: %(default)s)")
    parser.add_argument("--batch-size", type=positive, help="default: 32 on GPUs, as in the paper; 8 on CPUs")
    parser.add_argument("--image-size", type=positive, default=224, help="default: %(default)s")
    parser.add_argument("--compile", choices=MODES, help=f"default: {AS_IN_TRAINING}")
    add_rounds(parser, 5)
    parser.add_argument("--no-largest", action="store_true", help="leave out the memory and the largest batches")


def run(arguments: argparse.Namespace, device: torch.device) -> Iterator[Table]:
    """Yield the tables after each architecture: its network, its baseline, and the textbook's loop take turns."""
    gpu = device.type == "cuda"
    batch_size = arguments.batch_size or (32 if gpu else 8)
    if batch_size < 4:
        raise UserError(f"--batch-size {batch_size}: at least 4, for half of it is measured too")
    with torch.device("meta"):  # all names are checked before anything is measured
        for arch in arguments.arch:
            repopt.create_model(arch, mode="target")
    rounds, size = rounds_of(arguments), arguments.image_size
    mode = arguments.compile or mode_on(device, batch_size, size)
    peak = matrix_rate(device)
    of = f"images of {size} x {size}, compile"
    title = f"Batches of {batch_size} {of} {mode}; the device's measured peak is {peak / 1e12:.2f} TFLOP/s"
    rows: list[Row] = []
    largest: list[Row] = []
    beside: list[Row] = []
    for arch in arguments.arch:
        makes = {kind: maker(arch, kind, device, size, mode) for kind in MODE_OF}
        plain = maker(arch, REPOPT, device, size, mode, textbook=True)
        own = speeds(makes | {"textbook": plain}, batch_size, rounds, peak)
        if arguments.no_largest:
            rows += [{"model": arch, "training": kind, **row} for kind, row in own.items()]
            yield title, rows
            continue
        if gpu:  # where sizes are tried, and each would be compiled anew
            makes = {kind: maker(arch, kind, device, size, "off") for kind in MODE_OF}
        memories = {kind: memory(make, batch_size) for kind, make in makes.items()}
        available = memory_of(device)
        most = {kind: found.largest_batch(available) for kind, found in memories.items()}
        of_largest = {}
        if gpu:
            of_largest = {k: at_most(make, most[k], rounds, peak) for k, make in makes.items()}
            most = {kind: row["batch"] for kind, row in of_largest.items()}
            for kind, row in of_largest.items():
                ratio = row["images/s"] / of_largest[REPVGG]["images/s"]
                largest.append({"model": arch, "training": kind, **row, "speed / RepVGG": ratio})
        rows += [
            {
                "model": arch,
                "training": kind,
                **row,
                "MB per image": memories[kind].per_image / 1e6 if kind in memories else None,
                "largest batch": most.get(kind),
                "images/s in it": of_largest[kind]["images/s"] if kind in of_largest else None,
            }
            for kind, row in own.items()
        ]
        beside.append(beside_the_paper(arch, own, most))
        yield title, rows
        if gpu:
            yield f"The largest batches that fit, {of} off", largest
        how = "tried" if gpu else f"computed from the memory per image for {available / 2**30:.0f} GiB"
        paper_and_here = "Table 2 of the paper (GPUs of type 2080Ti, batches of 32) and here"
        yield f"{paper_and_here}; largest batches here are {how}", beside


def maker(arch: str, kind: str, device: torch.device, size: int, mode: str, *, textbook: bool = False) -> Make:
    """Makes the step of a network by its batch size, as `main_repopt.py` trains it or as textbooks do."""

    def make(batch_size: int) -> TrainingStep:
        _forget(device)
        return TrainingStep(
            arch,
            device,
            mode=MODE_OF[kind],
            batch_size=batch_size,
            image_size=size,
            textbook=textbook,
            compile_mode="off" if textbook else mode,
        )

    return make


def _forget(device: torch.device) -> None:
    """Free what was measured before; and its programs, for torch.compile gives up at the ninth of one function."""
    gc.collect()
    torch.compiler.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def memory(make: Make, batch_size: int) -> Memory:
    """Return the memory of a step, by what it takes with a batch and with half of one."""
    peaks = []
    for size in (batch_size, batch_size // 2):
        step = make(size)
        step()  # makes the optimizer's state, and compiles
        peaks.append(step.kept_bytes() + peak_extra(step, step.device))
        del step
    per_image = (peaks[0] - peaks[1]) / (batch_size - batch_size // 2)
    return Memory(peaks[0] - batch_size * per_image, per_image)


def speeds(makes: Mapping[str, Make], batch_size: int, rounds: Rounds, peak: float) -> dict[str, Row]:
    """Images per second by kind; all kinds take turns."""
    flops = {kind: make(2).flops() / 2 for kind, make in makes.items()}  # of an image: few need little memory
    steps = {kind: make(batch_size) for kind, make in makes.items()}
    seconds = interleave(steps, next(iter(steps.values())).device, rounds=rounds, warm_up=2, settle=True)
    return {
        kind: {
            "batch": batch_size,
            "images/s": batch_size / own,
            "speed / RepVGG": seconds[REPVGG] / own if REPVGG in seconds else None,
            "MFU %": 100 * flops[kind] * batch_size / own / peak,
        }
        for kind, own in seconds.items()
    }


def at_most(make: Make, batch_size: int, rounds: Rounds, peak: float) -> Row:
    """Return the row of the largest batch that really fits, from a computed one on downwards."""
    while batch_size >= 4:
        try:
            return speeds({"": make}, batch_size, rounds, peak)[""]
        except torch.cuda.OutOfMemoryError:
            batch_size = int(batch_size * 0.97)
    raise UserError("not even a batch of 4 images fits on this GPU")


def matrix_rate(device: torch.device) -> float:
    """FLOP/s of large matrix products in the number format of training."""
    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (2048, torch.float32)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / min(timed(functools.partial(torch.mm, a, b), device) for _ in range(20))


def memory_of(device: torch.device) -> float:
    """Bytes that a training may take: of a GPU all that is free, but 3 % for what lies between tensors."""
    if device.type == "cuda":
        _forget(device)
        return 0.97 * torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def beside_the_paper(arch: str, own: Mapping[str, Row], most: Mapping[str, int]) -> Row:
    """RepOpt over RepVGG in speed and largest batch, there and here."""
    there, baseline = (paper.in_training(arch, mode) for mode in MODE_OF.values())

    def ratio(column: str) -> float | None:
        return there[column] / baseline[column] if there and baseline else None

    return {
        "model": arch,
        "images/s: paper": there.get("train samples/s/GPU @BS=32"),
        "images/s: here": own[REPOPT]["images/s"],
        "speed / RepVGG: paper": ratio("train samples/s/GPU @BS=32"),
        "speed / RepVGG: here": own[REPOPT]["speed / RepVGG"],
        "largest batch: paper": there.get("MaxBS"),
        "largest batch: here": most[REPOPT],
        "largest batch / RepVGG: paper": ratio("MaxBS"),
        "largest batch / RepVGG: here": most[REPOPT] / most[REPVGG],
    }
