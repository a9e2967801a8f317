"""Runs that are not done yet are run, or shown."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence

import torch
from tqdm import tqdm
from workers import run_side_by_side

from repopt.errors import UserError
from reproduction.cost import gpu_hours
from reproduction.run import ExperimentRun
from train.command import EXIT_DONE, EXIT_INTERRUPTED


def show(runs: Sequence[ExperimentRun], scale: str) -> str:
    """The commands of runs in their order, with GPUs and hours on those of the paper, as a script for a shell."""
    lines, total, unknown = ["set -e"], 0.0, 0
    for run in runs:
        state = "done" if run.is_done() else "on the CPU"
        if scale == "full" and not run.is_done():
            hours = gpu_hours(run)
            state = f"{gpus(run, scale)} GPU(s), " + ("?" if hours is None else f"{hours / gpus(run, scale):.1f}")
            state += " hours"
            total, unknown = total + (hours or 0), unknown + (hours is None)
        lines += [f"# {run.folder.name}: {state}", run.shell_line(gpus(run, scale))]
    if scale == "full":
        lines += [
            f"# {total:.0f} GPU hours are left at the speed of the paper's GPUs (2080Ti, its table 2), "
            f"and {unknown} run(s) of which it has none"
        ]
    return "\n".join(lines)


def gpus(run: ExperimentRun, scale: str) -> int:
    """Return how many a run takes."""
    return run.training.gpus if scale == "full" else 0


def execute(runs: Sequence[ExperimentRun], scale: str) -> None:
    """Run what is not done: side by side on the CPU at demo scale, one after the other on GPUs at full scale.

    Raises:
        UserError: a data set or GPUs are not there, or a run failed.
        KeyboardInterrupt: a run was asked to stop, and has saved.
    """
    todo = [run for run in runs if not run.is_done()]
    for run in todo:
        run.with_folders()
    by_themselves = [run for run in todo if scale == "full" or run.kind.alone]
    if scale == "full":
        needed, there = max((run.training.gpus for run in todo), default=0), torch.cuda.device_count()
        if needed > there:
            raise UserError(
                f"full scale needs {needed} GPUs, and there are {there}: --dry-run prints the commands to run "
                "elsewhere, --scale demo runs on a CPU"
            )
    elif beside := [run for run in todo if not run.kind.alone]:
        total = sum(run.length() for run in beside)
        with tqdm(total=total, unit="epoch", desc=f"{len(beside)} runs", disable=None) as bar:
            try:
                run_side_by_side(beside, lambda: bar.update(sum(run.progress() for run in beside) - bar.n))
            except RuntimeError as error:
                raise UserError(str(error)) from None
    for run in tqdm(by_themselves, unit="run", disable=None if by_themselves else True):
        alone(run, scale)


def alone(run: ExperimentRun, scale: str) -> None:
    """Run one, and wait for it."""
    processes = gpus(run, scale)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    launcher = launcher if processes and not run.kind.alone else []
    quiet = subprocess.DEVNULL if scale == "demo" else None
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    code = subprocess.run(
        [sys.executable, *launcher, run.script, *run.with_folders()], env=environment, stdout=quiet, check=False
    ).returncode
    if code == EXIT_INTERRUPTED:
        raise KeyboardInterrupt
    if code != EXIT_DONE:
        raise UserError(f"this command failed with exit code {code}: {run.shell_line(processes)}")
