"""What a step of training costs in several processes, which exchange their gradients; as model and images grow; and, by
a model on paper, in many processes.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from multiprocessing import get_context
from multiprocessing.queues import SimpleQueue
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.multiprocessing import spawn

import repopt
from benchmarks.arguments import above_zero, add_rounds, positive, rounds_of
from benchmarks.report import Row, Table
from benchmarks.timing import Rounds, Step, interleave, interleave_times, peak_extra
from benchmarks.training_step import TrainingStep, mode_on
from repopt.errors import UserError
from train.parallel import data_parallel

MODELS = ("RepOpt-VGG-nano", "RepOpt-VGG-A0", "RepOpt-VGG-B0", "RepOpt-VGG-B1")
IMAGE_SIZES = (32, 64, 128, 224)
ON_PAPER = (8, 16, 64, 256, 1024)
BACKWARD = 2 / 3  # of a step: a backward pass multiplies twice where the forward pass does once

ALONE = "one process, the others idle"
APART = "no exchange"
DDP = "DDP, as a training has it"
AFTERWARDS = "no overlap: one all-reduce after the backward pass"
BARE = "all-reduce"


class Measured(NamedTuple):
    """What was measured of a setting.

    Attributes:
        seconds: of a step in the slowest process, median over the rounds.
        peak_bytes: that the first process holds at its worst in two steps, with all that it keeps.
        difference: of the first process's gradients to the mean over the processes, relative to its largest number.
    """

    seconds: float
    peak_bytes: int | None = None
    difference: float | None = None


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
    arch, batch_size, image_size = arguments.arch, arguments.batch_size, arguments.image_size
    found = measure(processes, device.type, arguments)
    yield from processes_tables(found, processes, arguments, bytes_of[arch])

    images = f"{image_size} x {image_size}"
    by_model = [(model, image_size) for model in arguments.models]
    by_size = [(arch, size) for size in arguments.image_sizes]
    grown = growth(by_model + by_size, device, batch_size=batch_size, rounds=rounds_of(arguments))
    where = "a GPU" if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    title = f"A step of one process on {where}, batches of {batch_size} images"
    yield f"{title}, by model: images of {images}", [grown[key] for key in by_model]
    yield f"{title}, by image size: {arch}", [grown[key] for key in by_size]

    model = arguments.models[-1]
    step_ms, source = arguments.step_ms, "given, not measured"
    if not step_ms:
        step_ms = grown[model, image_size]["ms per step"]
        source = f"measured here with {batch_size} images of {images}"
    title = (
        f"On paper: {model}. Assumed: every process sends {arguments.bandwidth:g} GB/s in a ring, a message takes "
        f"{arguments.latency:g} µs, the backward pass is 2/3 of a step. A step of {step_ms:.4g} ms is {source}; "
        f"{bytes_of[model] / 1e6:.1f} MB of fp32 gradients are counted"
    )
    ring = {"bandwidth_bytes_per_s": arguments.bandwidth * 1e9, "latency_s": arguments.latency / 1e6}
    yield title, on_paper(step_ms / 1e3, bytes_of[model], **ring)


def measure(processes: int, kind: str, arguments: argparse.Namespace) -> dict[str, Measured]:
    """Return what was measured, by setting; one process alone has no exchange.

    Args:
        processes: how many are started.
        kind: "cuda", where each has the GPU of its rank, or "cpu", where each has one thread.
        arguments: of this subject, which say what they do.
    """
    found: SimpleQueue[dict[str, Measured]] = get_context("spawn").SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        spawn(_work, (processes, kind, arguments, f"{folder}/store", found), nprocs=processes)
    return found.get()


def _work(
    rank: int,
    size: int,
    kind: str,
    arguments: argparse.Namespace,
    store: str,
    found: SimpleQueue[dict[str, Measured]],
) -> None:
    device = torch.device(kind, rank) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    backend = "nccl" if kind == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.FileStore(store, size), rank=rank, world_size=size)
    hosts: Any = dist.new_group(backend="gloo")
    settings: dict[str, dict[str, Any]] = {APART: {}}  # arguments of `TrainingStep` that exchange gradients
    if size > 1:
        wrap = functools.partial(data_parallel, device=device)
        settings |= {
            DDP: {"wrap": wrap},
            "DDP, gradients copied into buckets": {"wrap": functools.partial(wrap, bucket_view=False)},
            "DDP, static graph": {"wrap": functools.partial(wrap, static_graph=True)},
            AFTERWARDS: {"exchange": all_reduce_gradients},
        }
    shape: dict[str, Any] = {"batch_size": arguments.batch_size, "image_size": arguments.image_size}
    mode = mode_on(device, **shape, processes=2)  # of a single one too, so that they differ in nothing else

    def built(setting: str) -> TrainingStep:
        return TrainingStep(arguments.arch, device, **shape, seed=rank, compile_mode=mode, **settings[setting])

    def two_steps(setting: str) -> None:
        _repeat(built(setting), 2)  # the first makes the optimizer's state

    def all_go_on(own: bool) -> bool:
        going_on = torch.tensor(own)
        dist.all_reduce(going_on, dist.ReduceOp.MIN, group=hosts)
        return bool(going_on)

    peaks = {name: peak_extra(functools.partial(two_steps, name), device) for name in settings}
    steps = {name: built(name) for name in settings}
    differences = _differences(steps)
    contenders: dict[str, Step] = dict(steps)
    if size > 1:
        contenders[ALONE] = steps[APART] if rank == 0 else int
        message = torch.zeros(gradient_bytes(steps[APART].model) // 4, device=device)
        contenders[BARE] = functools.partial(dist.all_reduce, message)
    times = interleave_times(
        {name: functools.partial(_repeat, step, arguments.steps) for name, step in contenders.items()},
        device,
        rounds=rounds_of(arguments),
        before=functools.partial(dist.barrier, hosts),
        agreed=all_go_on,
        bar=rank == 0,
    )
    slowest = torch.tensor([times[name] for name in contenders], dtype=torch.float64)  # (settings, rounds)
    dist.all_reduce(slowest, dist.ReduceOp.MAX, group=hosts)
    if rank == 0:
        seconds = zip(contenders, map(statistics.median, slowest.tolist()), strict=True)
        own = {n: Measured(s / arguments.steps, peaks.get(n), differences.get(n)) for n, s in seconds}
        found.put(own if size > 1 else {ALONE: own[APART]})
    dist.barrier(hosts)  # nobody leaves while another may still speak to it
    dist.destroy_process_group()


def all_reduce_gradients(model: nn.Module) -> None:
    """Gradients become their means over the processes, in one message."""
    gradients = [param.grad for param in model.parameters() if param.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view(gradient.shape))


def _repeat(step: Step, times: int) -> None:
    for _ in range(times):
        step()


def _differences(steps: dict[str, TrainingStep]) -> dict[str, float]:
    """Return how far every setting's gradients are from the mean over the processes."""
    gradients = {}
    for name, step in steps.items():
        step.backward()
        gradients[name] = torch.cat([p.grad.flatten() for p in step.model.parameters() if p.grad is not None])
        step.zero_grad()
    mean = gradients[APART].clone()
    dist.all_reduce(mean)
    mean /= dist.get_world_size()
    return {name: ((own - mean).abs().max() / mean.abs().max()).item() for name, own in gradients.items()}


def gradient_bytes(model: nn.Module) -> int:
    """Return the bytes that a process sends per step, before the exchange divides it: all gradients in fp32."""
    return sum(4 * param.numel() for param in model.parameters() if param.requires_grad)


def processes_tables(
    found: dict[str, Measured], processes: int, arguments: argparse.Namespace, size: int
) -> Iterator[Table]:
    """Yield the tables of what `measure` found: settings, the bare all-reduce, and what `predict` makes of them.

    Args:
        found: by setting.
        processes: how many there were.
        arguments: of this subject, which say what they did.
        size: bytes of the gradients.
    """
    arch, batch_size, image_size = arguments.arch, arguments.batch_size, arguments.image_size
    alone = batch_size / found[ALONE].seconds
    rows = []
    for setting, own in found.items():
        if setting == BARE:
            continue
        count = 1 if setting == ALONE else processes
        exchange = None if setting in (ALONE, APART) else own.seconds - found[APART].seconds
        rate = count * batch_size / own.seconds
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
    images = f"{batch_size} images of {image_size} x {image_size} each"
    yield f"Processes side by side: {arch}, {images}", rows
    if processes == 1:
        return
    bandwidth = 2 * (processes - 1) / processes * size / found[BARE].seconds
    message = {"MB": size / 1e6, "ms": 1e3 * found[BARE].seconds, "GB/s sent per process": bandwidth / 1e9}
    yield f"All-reduce of the gradients of {arch}, {processes} processes", [message]
    ring = {"bandwidth_bytes_per_s": bandwidth, "latency_s": 0.0}  # the latency is in the measured bandwidth
    title = "The model on paper beside what was measured: a step without exchange, and the bare all-reduce"
    yield (
        title,
        [
            {
                "setting": setting,
                "overlap": overlap,
                "predicted ms per step": 1e3 * predict(found[APART].seconds, size, processes, **ring, overlap=overlap),
                "measured ms per step": 1e3 * found[setting].seconds,
            }
            for setting, overlap in ((DDP, 1), (AFTERWARDS, 0))
        ],
    )


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
        mode = mode_on(device, batch_size, size)
        steps[arch, size] = TrainingStep(arch, device, batch_size=batch_size, image_size=size, compile_mode=mode)
    seconds = interleave(steps, device, rounds=rounds)
    rows: dict[tuple[str, int], Row] = {}
    for (model, size), step in steps.items():
        own, operations = seconds[model, size], step.flops()
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
