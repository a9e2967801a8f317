"""Runs that are not done yet are run, or shown."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence

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
    """That a run takes."""
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
    if scale == "full":
        check_gpus(todo)
        for run in tqdm(todo, unit="run"):
            alone(run, scale)
        return
    beside, by_themselves = ([run for run in todo if run.kind.alone == alone] for alone in (False, True))
    side_by_side(beside)
    for run in tqdm(by_themselves, unit="run", desc="measuring", disable=None if by_themselves else True):
        alone(run, scale)


def check_gpus(runs: Sequence[ExperimentRun]) -> None:
    """UserError where runs need more GPUs than there are."""
    import torch

    most, there = max((run.training.gpus for run in runs), default=0), torch.cuda.device_count()
    if most > there:
        raise UserError(
            f"full scale needs {most} GPUs, and there are {there}: --dry-run prints the commands to run elsewhere, "
            "--scale demo runs on a CPU"
        )


def side_by_side(runs: Sequence[ExperimentRun]) -> None:
    """Run several at a time on the CPU."""
    if not runs:
        return
    with tqdm(total=sum(run.length() for run in runs), unit="epoch", desc=f"{len(runs)} runs", disable=None) as bar:
        try:
            run_side_by_side(runs, lambda: bar.update(sum(run.progress() for run in runs) - bar.n))
        except RuntimeError as error:
            raise UserError(str(error)) from None


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
