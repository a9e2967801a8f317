"""What a step of training costs in several processes, which exchange their gradients; as model and images grow; and, by
a model on paper, in many processes.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from typing import Any

import torch

import repopt
from benchmarks.arguments import above_zero, add_rounds, positive, rounds_of
from benchmarks.as_trained import mode_on
from benchmarks.processes import AFTERWARDS, ALONE, APART, BARE, DDP, Load, Measured, gradient_bytes, measure
from benchmarks.report import Row, Table, Tables
from benchmarks.timing import Rounds, interleave, peak_extra
from benchmarks.training_step import TrainingStep
from repopt.errors import UserError

MODELS = ("RepOpt-VGG-nano", "RepOpt-VGG-A0", "RepOpt-VGG-B0", "RepOpt-VGG-B1")
IMAGE_SIZES = (32, 64, 128, 224)
ON_PAPER = (8, 16, 64, 256, 1024)
BACKWARD = 2 / 3  # of a step: a backward pass multiplies twice where the forward pass does once


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this subject's arguments."""
    parser.add_argument("--arch", default="RepOpt-VGG-A0", help="model trained in processes (default: %(default)s)")
    parser.add_argument("--processes", type=positive, help="default: one per GPU, 2 on CPUs")
    parser.add_argument("--batch-size", type=positive, default=8, help="per process (default: %(default)s)")
    parser.add_argument("--image-size", type=positive, default=64, help="default: %(default)s")
    parser.add_argument("--steps", type=positive, default=3, help="of the processes per turn (default: %(default)s)")
    add_rounds(parser, 20)
    models = "one process trains all of these, and the last is the one on paper (default: %(default)s)"
    parser.add_argument("--models", nargs="+", default=list(MODELS), help=models)
    sizes = "in which one process trains the model of --arch (default: %(default)s)"
    parser.add_argument("--image-sizes", nargs="+", type=positive, default=list(IMAGE_SIZES), help=sizes)
    bandwidth = "GB/s that a process sends on paper (default: %(default)s, a link of 200 Gbit/s)"
    parser.add_argument("--bandwidth", type=above_zero, default=25.0, help=bandwidth)
    latency = "microseconds of a message on paper (default: %(default)s)"
    parser.add_argument("--latency", type=above_zero, default=10.0, help=latency)
    parser.add_argument("--step-ms", type=above_zero, help="of a process on paper (default: as measured)")


def run(arguments: argparse.Namespace, device: torch.device) -> Iterator[Table]:
    """Yield the tables of processes, of growth, and of the model on paper."""
    if arguments.batch_size < 2:
        raise UserError("--batch-size 1: batch norm needs at least 2 images to train on")
    gpus = torch.cuda.device_count() if device.type == "cuda" else None
    processes = arguments.processes or gpus or 2
    if gpus is not None and processes > gpus:
        raise UserError(f"--processes {processes}, but there are {gpus} GPUs: every process needs one of its own")
    with torch.device("meta"):  # all names are checked before anything is measured
        bytes_of = {
            name: gradient_bytes(repopt.create_model(name, mode="target"))
            for name in (arguments.arch, *arguments.models)
        }
    load = Load(arguments.arch, arguments.batch_size, arguments.image_size, arguments.steps, rounds_of(arguments))
    found = measure(processes, device.type, load)
    yield from processes_tables(found, processes, load, bytes_of[load.arch]).items()

    images = f"{load.image_size} x {load.image_size}"
    by_model = [(model, load.image_size) for model in arguments.models]
    by_size = [(load.arch, size) for size in arguments.image_sizes]
    grown = growth(by_model + by_size, device, batch_size=load.batch_size, rounds=load.rounds)
    where = "a GPU" if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    title = f"A step of one process on {where}, batches of {load.batch_size} images"
    yield f"{title}, by model: images of {images}", [grown[key] for key in by_model]
    yield f"{title}, by image size: {load.arch}", [grown[key] for key in by_size]

    model = arguments.models[-1]
    if arguments.step_ms:
        step_ms, source = arguments.step_ms, "given, not measured"
    else:
        step_ms = grown[model, load.image_size]["ms per step"]
        source = f"measured here with {load.batch_size} images of {images}"
    title = (
        f"On paper: {model}. Assumed: every process sends {arguments.bandwidth:g} GB/s in a ring, a message takes "
        f"{arguments.latency:g} µs, the backward pass is 2/3 of a step. A step of {step_ms:.4g} ms is {source}; "
        f"{bytes_of[model] / 1e6:.1f} MB of fp32 gradients are counted"
    )
    rows = on_paper(
        step_ms / 1e3,
        bytes_of[model],
        bandwidth_bytes_per_s=arguments.bandwidth * 1e9,
        latency_s=arguments.latency / 1e6,
    )
    yield title, rows


def processes_tables(found: dict[str, Measured], processes: int, load: Load, size: int) -> Tables:
    """Return the tables of what `measure` found: settings, the bare all-reduce, and what `predict` makes of them.

    Args:
        found: by setting.
        processes: how many there were.
        load: what they did.
        size: bytes of the gradients.
    """
    alone = load.batch_size / found[ALONE].seconds
    rows = []
    for setting, own in found.items():
        if setting == BARE:
            continue
        count = 1 if setting == ALONE else processes
        exchange = None if setting in (ALONE, APART) else own.seconds - found[APART].seconds
        rate = count * load.batch_size / own.seconds
        rows.append(
            {
                "setting": setting,
                "processes": count,
                "images/s": rate,
                "efficiency": rate / (count * alone),
                "ms per step": 1e3 * own.seconds,
                "exchange ms": exchange and 1e3 * exchange,
                "exchange / step": exchange and exchange / own.seconds,
                "peak MB per process": own.peak_bytes and own.peak_bytes / 1e6,
                "gradients: difference to the mean": own.difference,
            }
        )
    rows.sort(key=lambda row: row["setting"] != ALONE)
    images = f"{load.batch_size} images of {load.image_size} x {load.image_size} each"
    tables: dict[str, Sequence[Row]] = {f"Processes side by side: {load.arch}, {images}": rows}
    if processes == 1:
        return tables
    sent = 2 * (processes - 1) / processes * size
    bandwidth = sent / found[BARE].seconds
    tables[f"All-reduce of the gradients of {load.arch}, {processes} processes"] = [
        {"MB": size / 1e6, "ms": 1e3 * found[BARE].seconds, "GB/s sent per process": bandwidth / 1e9}
    ]
    ring = {"bandwidth_bytes_per_s": bandwidth, "latency_s": 0.0}  # the latency is in the measured bandwidth
    tables["The model on paper beside what was measured: a step without exchange, and the bare all-reduce"] = [
        {
            "setting": setting,
            "overlap": overlap,
            "predicted ms per step": 1e3 * predict(found[APART].seconds, size, processes, **ring, overlap=overlap),
            "measured ms per step": 1e3 * found[setting].seconds,
        }
        for setting, overlap in ((DDP, 1), (AFTERWARDS, 0))
    ]
    return tables


def growth(
    pairs: Sequence[tuple[str, int]], device: torch.device, *, batch_size: int, rounds: Rounds
) -> dict[tuple[str, int], Row]:
    """A step of one process beside what it computes, by model and image size.

    Args:
        pairs: of model and image size.
        device: where it runs.
        batch_size: images per step.
        rounds: in which all take turns.
    """
    steps = {}
    for arch, size in pairs:
        shape: dict[str, Any] = {"batch_size": batch_size, "image_size": size}
        steps[arch, size] = TrainingStep(arch, device, **shape, compile_mode=mode_on(device, **shape))
    seconds = interleave({f"{m} {size}": step for (m, size), step in steps.items()}, device, rounds=rounds)
    rows: dict[tuple[str, int], Row] = {}
    for (model, size), step in steps.items():
        own, operations = seconds[f"{model} {size}"], step.flops()
        rows[model, size] = {
            "model": model,
            "image size": size,
            "parameters (M)": sum(param.numel() for param in step.model.parameters()) / 1e6,
            "GFLOP per step": operations / 1e9,
            "ms per step": 1e3 * own,
            "images/s": batch_size / own,
            "GFLOP/s": operations / own / 1e9,
            "peak extra MB": peak_extra(step, device) / 1e6,
        }
    return rows


def predict(
    step_seconds: float,
    gradient_bytes: int,
    world_size: int,
    *,
    bandwidth_bytes_per_s: float,
    latency_s: float,
    overlap: float,
) -> float:
    """Return the seconds of a step in processes that all-reduce their gradients around a ring.

    Args:
        step_seconds: of a process alone.
        gradient_bytes: that it has per step.
        world_size: processes.
        bandwidth_bytes_per_s: that each sends to the next.
        latency_s: of each of the 2 (n - 1) messages that follow each other.
        overlap: the share of the backward pass, 2/3 of the step, during which messages travel.
    """
    others = world_size - 1
    exchange = 2 * others / world_size * gradient_bytes / bandwidth_bytes_per_s + 2 * others * latency_s
    return step_seconds + max(0.0, exchange - overlap * BACKWARD * step_seconds)


def on_paper(step_seconds: float, gradient_bytes: int, **ring: float) -> Sequence[Row]:
    """Return rows for many processes.

    They lie between the best case, in which messages travel during the whole backward pass, and the worst.

    Args:
        step_seconds, gradient_bytes: as of `predict`.
        ring: its `bandwidth_bytes_per_s` and `latency_s`.
    """
    rows = []
    for world_size in ON_PAPER:
        best, worst = (predict(step_seconds, gradient_bytes, world_size, overlap=overlap, **ring) for overlap in (1, 0))
        rows.append(
            {
                "processes": world_size,
                "exchange ms": 1e3 * (worst - step_seconds),
                "ms per step, full overlap": 1e3 * best,
                "efficiency, full overlap": step_seconds / best,
                "ms per step, no overlap": 1e3 * worst,
                "efficiency, no overlap": step_seconds / worst,
            }
        )
    return rows
