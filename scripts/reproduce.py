"""The paper's tables and figures, from one command each: its numbers and yours side by side.

    python scripts/reproduce.py --table 4 [6 9 ...] [--scale demo|full] [--seeds 0 1 2] [--dry-run]
    python scripts/reproduce.py --figure 6

`demo` is the same experiment with small networks on images that come with scikit-learn, minutes on a CPU; `full` is the
paper's own setting, on GPUs, with the data sets in the folders that the environment variables IMAGENET, CIFAR, CALTECH,
COCO and CITYSCAPES name. Runs go to <output>/<scale>/<arch>/<name>-seed<seed>/; tables share them. What is done is
skipped, what was stopped goes on. `--dry-run` prints what would be run, as a script for a shell, with GPUs and hours.

The result is printed and written beside the runs: table4.md, table4.json (`scripts/report.py` makes a page of it), and
the pictures of figures.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import _root
import torch
from reproduction import paper, result
from reproduction.experiment import multiply_adds, network
from reproduction.run import QAT, TRAIN, ExperimentRun, with_needs
from reproduction.tables import load
from torch import nn
from tqdm import tqdm
from workers import run_side_by_side

from repopt.errors import UserError
from repopt.models import parse_arch
from train.command import EXIT_DONE, EXIT_INTERRUPTED, run_command

TRAINING_IMAGES = {"imagenet": 1_281_167, "cf100": 50_000, "caltech256": 257 * 60}
REFERENCE = "RepOpt-VGG-B1"  # whose speed is that of models that the paper has not measured


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; 0, 2 after a mistake of the user, 75 where it was interrupted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for kind in ("table", "figure"):
        parser.add_argument(f"--{kind}", nargs="+", default=[], metavar="N", help=f"{kind}s of the paper")
    parser.add_argument("--scale", choices=("full", "demo"), default="demo", help="default: %(default)s")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="SEED", help="default: 0 1 2")
    parser.add_argument("--output", type=Path, default=Path("output/reproduce"), help="default: %(default)s")
    parser.add_argument("--dry-run", action="store_true", help="print the commands, and run nothing")
    arguments = parser.parse_args(argv)
    names = [f"{kind} {number}" for kind in ("table", "figure") for number in getattr(arguments, kind)]
    if not names:
        parser.error("what? --table N or --figure N")
    os.chdir(_root.ROOT)

    def command() -> int:
        try:
            reproduce(names, arguments.scale, arguments.seeds, arguments.output, dry_run=arguments.dry_run)
        except KeyboardInterrupt:
            print("reproduce.py: stopped; the same command goes on from there", file=sys.stderr)
            return EXIT_INTERRUPTED
        return EXIT_DONE

    return run_command("reproduce.py", command)


def reproduce(names: Sequence[str], scale: str, seeds: Sequence[int], output: Path, *, dry_run: bool) -> None:
    """Run and show tables and figures, or show what would be run.

    Raises:
        UserError: an unknown one, one that there is not at this scale, or a run that cannot be run or failed.
        KeyboardInterrupt: the user, or a signal, stopped it.
    """
    folder = output / scale
    for name, experiment in {name: load(name, scale) for name in names}.items():
        runs = {training: ExperimentRun.plan(training, seeds, folder) for training in experiment.trainings}
        every = with_needs([run for of_training in runs.values() for run in of_training])
        if dry_run:
            print(as_script(every, scale))
            continue
        run_all(every, scale)
        folder.mkdir(parents=True, exist_ok=True)
        content = result.build_result(name, scale, experiment, runs, folder)
        stem = folder / name.replace(" ", "")
        text = result.as_markdown(content)
        stem.with_suffix(".md").write_text(f"{text}\n")
        stem.with_suffix(".json").write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
        print(f"{text}\n\n{stem}.md, {stem}.json")


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


if __name__ == "__main__":
    sys.exit(main())
