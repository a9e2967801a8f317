"""What a search costs a training: whole trainings of the command line, without one, with one within, with one before.

All are of `configs/digits`, with fewer epochs; the start and the one evaluation, at the end, are part of each.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import tempfile
from collections.abc import Iterator
from pathlib import Path

import _root
import torch

from benchmarks.arguments import add_rounds, positive, rounds_of
from benchmarks.report import Row, Table
from benchmarks.timing import Step, interleave
from main_repopt import main
from repopt.errors import UserError
from train.command import EXIT_DONE

ALONE = "the target alone"
RECIPES = _root.ROOT / "configs/digits"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this subject's arguments."""
    parser.add_argument("--arch", default="RepOpt-VGG-nano", help="model (default: %(default)s)")
    parser.add_argument("--epochs", type=positive, default=20, help="of every training (default: %(default)s)")
    add_rounds(parser, 5)


def run(arguments: argparse.Namespace, device: torch.device) -> Iterator[Table]:
    """Yield one table, of trainings that take turns."""
    epochs = arguments.epochs
    with tempfile.TemporaryDirectory() as folder:
        contenders = trainings(arguments.arch, epochs, Path(folder))
        seconds = interleave(contenders, device, rounds=rounds_of(arguments), warm_up=1)
    rows: list[Row] = [
        {"training": name, "s": own, f"time / {ALONE}": own / seconds[ALONE]} for name, own in seconds.items()
    ]
    yield f"Trainings of {arguments.arch} on digits, {epochs} epochs", rows


def trainings(arch: str, epochs: int, folder: Path) -> dict[str, Step]:
    """Return what does each training, anew at every call, in a folder of its own."""
    numbers = itertools.count()

    def train(mode: str, recipe: str, *options: object) -> Path:
        """Return the folder of a training that has been done."""
        tag = str(next(numbers))
        cfg, end = str(RECIPES / f"{recipe}.yaml"), ("TRAIN.EPOCHS", epochs, "TEST.PERIOD", epochs)
        command = ["--cfg", cfg, "--arch", f"{arch}-{mode}", "--output", str(folder), "--tag", tag, "--opts"]
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as errors:
            code = main([*command, *map(str, (*end, *options))])
        if code != EXIT_DONE:
            raise UserError(errors.getvalue().strip())
        return folder / f"{arch}-{mode}" / tag

    def two_runs() -> None:
        scales = train("hs", "search") / "scales.pth"
        train("target", "train", "TRAIN.SCALES_PATH", scales)

    tenth = max(1, epochs // 10)
    return {
        ALONE: lambda: train("target", "train", "TRAIN.CONSTANTS", "initial"),
        f"one run, searching for {tenth}": lambda: train("target", "train", "TRAIN.SEARCH_EPOCHS", tenth),
        f"one run, searching for {epochs}": lambda: train("target", "train", "TRAIN.SEARCH_EPOCHS", epochs),
        "two runs": two_runs,
    }
