"""The same step of training in one process and in several, with the ways in which they may exchange their gradients."""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.as_trained import data_parallel, mode_on
from benchmarks.timing import Rounds, interleave_times, peak_extra
from benchmarks.training_step import TrainingStep

ALONE = "one process, the others idle"
APART = "no exchange"
DDP = "DDP, as a training has it"
AFTERWARDS = "no overlap: one all-reduce after the backward pass"
BARE = "all-reduce"


@dataclass(frozen=True)
class Load:
    """What every process does.

    Attributes:
        arch: the model.
        batch_size: images per process and step.
        image_size: their height and width.
        steps: per turn.
        rounds: in which all settings take turns.
    """

    arch: str
    batch_size: int
    image_size: int
    steps: int
    rounds: Rounds


@dataclass(frozen=True)
class Measured:
    """What was measured of a setting.

    Attributes:
        seconds: of a step in the slowest process, median over the rounds.
        peak_bytes: that the first process holds at its worst in two steps, with all that it keeps.
        difference: of the first process's gradients to the mean over the processes, relative to its largest number.
    """

    seconds: float
    peak_bytes: int | None = None
    difference: float | None = None


def measure(processes: int, kind: str, load: Load) -> dict[str, Measured]:
    """Return what was measured, by setting; one process alone has no exchange.

    Args:
        processes: how many are started.
        kind: "cuda", where each has the GPU of its rank, or "cpu", where each has one thread.
        load: what they do.
    """
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_work, (processes, kind, load, folder), nprocs=processes)
        found = json.loads((Path(folder) / "measured").read_text())
    return {name: Measured(**own) for name, own in found.items()}


def _settings(device: torch.device) -> dict[str, dict[str, Any]]:
    """Arguments of `TrainingStep` that say how gradients are exchanged."""
    return {
        APART: {},
        DDP: {"wrap": partial(data_parallel, device=device)},
        "DDP, gradients copied into buckets": {"wrap": partial(data_parallel, device=device, bucket_view=False)},
        "DDP, static graph": {"wrap": partial(data_parallel, device=device, static_graph=True)},
        AFTERWARDS: {"exchange": all_reduce_gradients},
    }


def all_reduce_gradients(model: nn.Module) -> None:
    """Gradients become their means over the processes, in one message."""
    gradients = [param.grad for param in model.parameters() if param.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view(gradient.shape))


def _work(rank: int, size: int, kind: str, load: Load, folder: str) -> None:
    device = torch.device(kind, rank) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", size)
    dist.init_process_group("nccl" if kind == "cuda" else "gloo", store=store, rank=rank, world_size=size)
    hosts: Any = dist.new_group(backend="gloo")
    settings = _settings(device) if size > 1 else {APART: {}}

    def built(setting: dict[str, Any]) -> TrainingStep:
        shape: dict[str, Any] = {"batch_size": load.batch_size, "image_size": load.image_size}
        mode = mode_on(device, **shape, processes=2)  # of a single one too, so that they differ in nothing else
        return TrainingStep(load.arch, device, **shape, seed=rank, compile_mode=mode, **setting)

    peaks = {name: peak_extra(partial(_two_steps, built, setting), device) for name, setting in settings.items()}
    steps = {name: built(setting) for name, setting in settings.items()}
    differences = _differences(steps)
    contenders: dict[str, Callable[[], Any]] = dict(steps)
    if size > 1:
        contenders[ALONE] = steps[APART] if rank == 0 else int
        message = torch.zeros(gradient_bytes(steps[APART].model) // 4, device=device)
        contenders[BARE] = partial(dist.all_reduce, message)
    times = interleave_times(
        {name: partial(_repeat, step, load.steps) for name, step in contenders.items()},
        device,
        rounds=load.rounds,
        before=partial(dist.barrier, hosts),
        agreed=partial(_all_say, hosts),
        bar=rank == 0,
    )
    slowest = torch.tensor([times[name] for name in contenders], dtype=torch.float64)  # (settings, rounds)
    dist.all_reduce(slowest, dist.ReduceOp.MAX, group=hosts)
    seconds = {n: statistics.median(own) / load.steps for n, own in zip(contenders, slowest.tolist(), strict=True)}
    if rank == 0:
        found = {n: Measured(s, peaks.get(n), differences.get(n)) for n, s in seconds.items()}
        if size == 1:
            found = {ALONE: found[APART]}
        (Path(folder) / "measured").write_text(json.dumps({name: asdict(own) for name, own in found.items()}))
    dist.barrier(hosts)  # nobody leaves while another may still speak to it
    dist.destroy_process_group()


def _all_say(hosts: dist.ProcessGroup, own: bool) -> bool:
    said = torch.tensor(own)
    dist.all_reduce(said, dist.ReduceOp.MIN, group=hosts)
    return bool(said)


def _repeat(step: Callable[[], Any], times: int) -> None:
    for _ in range(times):
        step()


def _two_steps(built: Callable[[dict[str, Any]], TrainingStep], setting: dict[str, Any]) -> None:
    _repeat(built(setting), 2)  # the first makes the optimizer's state


def _differences(steps: dict[str, TrainingStep]) -> dict[str, float]:
    """Return how far every setting's gradients are from the mean over the processes."""
    gradients = {}
    for name, step in steps.items():
        step.backward()
        gradients[name] = [p.grad.contiguous().clone() for p in step.model.parameters() if p.grad is not None]
        step.zero_grad()
    means = [gradient.clone() for gradient in gradients[APART]]
    for mean in means:
        dist.all_reduce(mean)
        mean /= dist.get_world_size()
    largest = max(mean.abs().max().item() for mean in means)
    return {name: _furthest(own, means) / largest for name, own in gradients.items()}


def _furthest(tensors: list[Tensor], others: list[Tensor]) -> float:
    return max((a - b).abs().max().item() for a, b in zip(tensors, others, strict=True))


def gradient_bytes(model: nn.Module) -> int:
    """Return the bytes that a process sends per step, before the exchange divides it: all gradients in fp32."""
    return sum(4 * param.numel() for param in model.parameters() if param.requires_grad)
