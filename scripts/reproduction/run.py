"""One training and seed: its command line, and what it leaves behind."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import quantize
from downstream import detect, segment
from runs import epochs_of

from repopt.errors import UserError, shown
from reproduction.experiment import Experiment, Training
from train import config
from train.command import MAIN, Program
from train.files import ARTIFACTS, CONFIG, RESULTS, THROUGHPUT

# Data sets whose folder is found in an environment variable; the others come with a package.
FOLDERS = {
    "imagenet": "IMAGENET",
    "cf100": "CIFAR",
    "caltech256": "CALTECH",
    "cityscapes": "CITYSCAPES",
    "coco": "COCO",
}

# Keys by which runs do not differ.
_OF_PLACES = {"BASE", "DATA.DATA_PATH", "OUTPUT", "MODEL.RESUME", "MODEL.BACKBONE", "TRAIN.SCALES_PATH"}


class Kind(NamedTuple):
    """A way to run a training.

    Attributes:
        script: that does it.
        left: the file in the run's folder that is there when it came to its end.
        program: that reads its command line.
        of: what the command line says of the run that it goes out from, whose checkpoint it names at last.
        trains: whether it does so epoch by epoch.
        alone: whether other work on the machine would spoil it.
    """

    script: str
    left: Callable[[Run], str]
    program: Program = MAIN
    of: tuple[str, ...] = ()
    trains: bool = False
    alone: bool = False


def _last_checkpoint(run: Run) -> str:
    return f"ckpt_epoch_{run.cfg.TRAIN.EPOCHS - 1}.pth"


def _trained(script: str, program: Program, of: tuple[str, ...] = ("--backbone",)) -> Kind:
    return Kind(script, _last_checkpoint, program, of, trains=True)


def _quantized(method: str) -> Kind:
    of = ("--method", method, "--resume")
    return Kind("scripts/quantize.py", lambda run: f"{ARTIFACTS}/{RESULTS}", quantize.PROGRAM, of)


KINDS = {
    "train": _trained("main_repopt.py", MAIN, of=()),
    "segment": _trained("scripts/downstream/segment.py", segment.PROGRAM),
    "detect": _trained("scripts/downstream/detect.py", detect.PROGRAM),
    "ptq": _quantized("ptq"),
    "qat": _quantized("qat"),
    "throughput": Kind("main_repopt.py", lambda run: THROUGHPUT, alone=True),
    "training speed": Kind("scripts/benchmark.py", lambda run: "speed.json", alone=True),
}


@dataclass(frozen=True)
class Run:
    """A run of an experiment.

    Attributes:
        training: what is done.
        seed: of everything random in it.
        output: below which all runs are.
        scales, of: the runs whose scales it takes and whose network it goes out from.
    """

    training: Training
    seed: int
    output: Path
    scales: Run | None = None
    of: Run | None = None

    @property
    def kind(self) -> Kind:
        """How it is run."""
        return KINDS[self.training.do]

    @property
    def needs(self) -> list[Run]:
        """Runs that come before it."""
        return [run for run in (self.scales, self.of) if run is not None]

    @property
    def script(self) -> str:
        """That does it."""
        return self.kind.script

    @property
    def arch(self) -> str:
        """Of main_repopt.py."""
        arch = self.training.arch or (self.of.arch if self.of else None)
        assert arch is not None
        return arch

    @property
    def folder(self) -> Path:
        """Where it writes."""
        return self.output / self.arch / self._tag

    @property
    def _tag(self) -> str:
        return f"{self.training.name}-seed{self.seed}"

    @cached_property
    def command(self) -> list[str]:
        """Arguments of its script; the data's folder is the name of an environment variable, "$IMAGENET"."""
        if self.training.do == "training speed":
            return [*self.training.arguments, "--json", str(self.folder / self.kind.left(self))]
        arguments = [*(("--cfg", self.training.cfg) if self.training.cfg else ()), "--arch", self.arch]
        arguments += ["--tag", self._tag, "--output", str(self.output)]
        if self.of is not None:
            arguments += [*self.kind.of, str(self.of.folder / "latest.pth")]
        if self.training.do == "throughput":
            arguments += ["--throughput"]
        if self.scales is not None:
            arguments += ["--scales-path", str(self.scales.folder / "scales.pth")]
        options = ["--opts", "SEED", str(self.seed)]
        for key, value in self.training.set.items():
            options += [key, str(tuple(value) if isinstance(value, list) else value)]
        dataset = config.parse([*arguments, *options], self.kind.program).cfg.DATA.DATASET
        if dataset in FOLDERS and self.training.do != "throughput":
            arguments += ["--data-path", f"${FOLDERS[dataset]}"]
        return [*arguments, *self.training.arguments, *options]

    @cached_property
    def cfg(self) -> Any:
        """The configuration that its command line gives, as the data set leaves it open."""
        return config.parse(self.command, self.kind.program).cfg

    def is_done(self) -> bool:
        """Whether it came to its end, in whatever start.

        Raises:
            UserError: its folder is that of a run with other settings.
        """
        self._check_settings()
        return (self.folder / self.kind.left(self)).is_file()

    def _check_settings(self) -> None:
        path = self.folder / CONFIG
        if not path.is_file():
            return
        try:
            before = json.loads(path.read_text())
        except ValueError:
            return  # it was being written
        cfg, given = config.parse(self.command, self.kind.program)
        for key in sorted(given - _OF_PLACES):
            then, now = config.lookup(before, key), config.lookup(cfg, key)
            if then != (list(now) if isinstance(now, tuple) else now):
                raise UserError(
                    f"{str(self.folder)!r} holds a run with other settings ({key} was {shown(then)} and is {now!r} "
                    "now): delete it, or give another --output"
                )

    def with_folders(self) -> list[str]:
        """The command with the folders of data sets in it.

        Raises:
            UserError: an environment variable that it needs is not set.
        """
        for name in (argument[1:] for argument in self.command if argument.startswith("$")):
            if not os.environ.get(name):
                raise UserError(f"where is the data set of {self.training.name!r}? Set {name} to its folder")
        return [os.environ[a[1:]] if a.startswith("$") else a for a in self.command]

    def shell_line(self, gpus: int) -> str:
        """The command as it is typed: on so many GPUs, or without for 0."""
        launcher = f"torchrun --standalone --nproc_per_node {gpus}" if gpus and not self.kind.alone else "python"
        words = [f'"{word}"' if word.startswith("$") else shlex.quote(word) for word in self.command]
        return " ".join([launcher, self.script, *words])

    def progress(self) -> int:
        """Epochs done, or 1 where there are none."""
        return len(epochs_of(self.folder)) if self.kind.trains else int(self.is_done())

    def length(self) -> int:
        """What `progress` ends at."""
        return self.cfg.TRAIN.EPOCHS if self.kind.trains else 1


def runs_of(experiment: Experiment, names: Sequence[str], seeds: Sequence[int], output: Path) -> dict[str, list[Run]]:
    """The runs of trainings, by name: one per seed, or one in all."""

    def run(name: str, seed: int) -> Run:
        training = experiment.trainings[name]
        if training.once:
            seed = seeds[0]
        needed: Mapping[str, Run | None] = {
            "scales": run(training.scales, seed) if training.scales else None,
            "of": run(training.of, seed) if training.of else None,
        }
        return Run(training, seed, output, **needed)

    return {name: list(dict.fromkeys(run(name, seed) for seed in seeds)) for name in names}


def with_needs(runs: Sequence[Run]) -> list[Run]:
    """These runs and all that come before them, each once, in an order in which they can be run."""
    ordered: dict[Run, None] = {}
    for run in runs:
        for needed in (*with_needs(run.needs), run):
            ordered.setdefault(needed)
    return list(ordered)
