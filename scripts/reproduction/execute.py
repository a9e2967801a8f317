"""Runs that are not done yet: as a script with the GPUs and hours that they take, or run."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence

import torch
from torch import nn
from tqdm import tqdm
from workers import run_side_by_side

from repopt.errors import UserError
from repopt.models import parse_arch
from reproduction import paper
from reproduction.experiment import multiply_adds, network
from reproduction.run import QAT, TRAIN, ExperimentRun
from train.command import EXIT_DONE, EXIT_INTERRUPTED

TRAINING_IMAGES = {"imagenet": 1_281_167, "cf100": 50_000, "caltech256": 257 * 60}
REFERENCE = "RepOpt-VGG-B1"  # whose speed is that of models that the paper has not measured


def as_script(runs: Sequence[ExperimentRun], scale: str) -> str:
    """Return the commands of runs as a script for a shell, with the GPUs and hours that they take at full scale."""
    lines, total, unknown = ["set -e"], 0.0, 0
    for run in runs:
        state = "done" if run.is_done() else "on the CPU"
        if scale == "full" and not run.is_done():
            gpus, hours = run.gpus(scale), gpu_hours(run)
            state = f"{gpus} GPU(s), {'?' if hours is None else f'{hours / gpus:.1f}'} hours"
            total, unknown = total + (hours or 0), unknown + (hours is None)
        lines += [f"# {run.tag}: {state}", run.shell_line(scale)]
    if scale == "full":
        lines += [
            f"# {total:.0f} GPU hours are left at the speed of the paper's GPUs (2080Ti, its table 2), "
            f"and {unknown} run(s) of which it has none"
        ]
    return "\n".join(lines)


def gpu_hours(run: ExperimentRun) -> float | None:
    """Return the hours of a training on one of the paper's GPUs (2080Ti), at the speed that its table 2 prints.

    Models that are not in it take as long as their multiply-adds do at the speed of RepOpt-VGG-B1. That is too short
    for small images (a search on CIFAR-100), and far too short for grouped convolutions.

    Returns:
        None where nothing is trained, on a data set whose size is not known, and of a network with grouped convolutions
        that is not in the table.
    """
    cfg = run.cfg if run.kind in (TRAIN, QAT) else None
    if cfg is None or cfg.DATA.DATASET not in TRAINING_IMAGES:
        return None
    model, mode, _ = parse_arch(run.arch)
    reference, row = run.arch, paper.in_training(model, mode)
    if not row:
        if any(isinstance(m, nn.Conv2d) and m.groups > 1 for m in network(run.arch).modules()):
            return None
        reference, row = f"{REFERENCE}-target", paper.in_training(REFERENCE, "target")
    size = 32 if cfg.DATA.DATASET == "cf100" else cfg.DATA.IMG_SIZE
    speed = row["train samples/s/GPU @BS=32"] * multiply_adds(reference) / multiply_adds(run.arch, size)
    return TRAINING_IMAGES[cfg.DATA.DATASET] * cfg.TRAIN.EPOCHS / speed / 3600


def run_all(runs: Sequence[ExperimentRun], scale: str) -> None:
    """Run what is not done: side by side on the CPU at demo scale, one after the other on GPUs at full scale.

    Raises:
        UserError: a data set or GPUs are not there, or a run failed.
        KeyboardInterrupt: a run was asked to stop, and has saved.
    """
    todo = [run for run in runs if not run.is_done()]
    for run in todo:
        run.with_folders()
    needed, there = max((run.gpus(scale) for run in todo), default=0), torch.cuda.device_count()
    if needed > there:
        raise UserError(
            f"full scale needs {needed} GPUs, and there are {there}: --dry-run prints the commands to run "
            "elsewhere, --scale demo runs on a CPU"
        )
    beside = [run for run in todo if scale == "demo" and not run.kind.alone]
    if beside:
        total = sum(run.length() for run in beside)
        with tqdm(total=total, unit="epoch", desc=f"{len(beside)} runs", disable=None) as bar:
            try:
                run_side_by_side(beside, lambda: bar.update(sum(run.progress() for run in beside) - bar.n))
            except RuntimeError as error:
                raise UserError(str(error)) from None
    by_themselves = [run for run in todo if run not in beside]
    for run in tqdm(by_themselves, unit="run", disable=None if by_themselves else True):
        run_alone(run, scale)


def run_alone(run: ExperimentRun, scale: str) -> None:
    """Run one, and wait for it."""
    command = [sys.executable]
    if run.gpus(scale) and not run.kind.alone:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={run.gpus(scale)}"]
    code = subprocess.run(
        [*command, run.script, *run.with_folders()],
        env={name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"},
        stdout=subprocess.DEVNULL if scale == "demo" else None,
        check=False,
    ).returncode
    if code == EXIT_INTERRUPTED:
        raise KeyboardInterrupt
    if code != EXIT_DONE:
        raise UserError(f"this command failed with exit code {code}: {run.shell_line(scale)}")
