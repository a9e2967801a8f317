"""Trainings, and their runs: the command line, and what it leaves behind."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import quantize
from downstream import detect, segment
from runs import epochs_of

from repopt.errors import UserError, shown
from train import config, file_names
from train.command import MAIN, Program
from train.file_names import ARTIFACTS, CONFIG, RESULTS

# Data sets whose folder is found in an environment variable; the others come with a package.
FOLDERS = {
    "imagenet": "IMAGENET",
    "cf100": "CIFAR",
    "caltech256": "CALTECH",
    "cityscapes": "CITYSCAPES",
    "coco": "COCO",
}

# Keys by which runs do not differ.
_OF_PLACES = {"BASE", "DATA.DATA_PATH", "OUTPUT", "MODEL.RESUME", "MODEL.PRETRAINED", "TRAIN.SCALES_PATH"}


@dataclass(frozen=True, eq=False)
class Kind:
    """A way to run a training.

    Attributes:
        script: that does it.
        result: the file in the run's folder that is there when it came to its end; None: the last epoch's checkpoint.
        program: that reads its command line.
        flags: what the command line says of the run that it goes out from, whose checkpoint it names at last.
        alone: whether other work on the machine would spoil it.
    """

    script: str
    result: str | None = None
    program: Program = MAIN
    flags: tuple[str, ...] = ()
    alone: bool = False


QUANTIZED = f"{ARTIFACTS}/{RESULTS}"
TRAIN = Kind("main_repopt.py")
SEGMENT = Kind("scripts/downstream/segment.py", program=segment.PROGRAM, flags=("--backbone",))
DETECT = Kind("scripts/downstream/detect.py", program=detect.PROGRAM, flags=("--backbone",))
PTQ = Kind("scripts/quantize.py", QUANTIZED, quantize.PROGRAM, ("--method", "ptq", "--resume"))
COMPARE = Kind("scripts/quantize.py", QUANTIZED, quantize.PROGRAM, ("--method", "compare", "--resume"))
QAT = Kind("scripts/quantize.py", QUANTIZED, quantize.PROGRAM, ("--method", "qat", "--resume"))
THROUGHPUT = Kind("main_repopt.py", file_names.THROUGHPUT, alone=True)  # of the deployed network
SPEED = Kind("scripts/benchmark.py", "speed.json", alone=True)  # of training


@dataclass(frozen=True)
class Training:
    """What is run once per seed.

    Attributes:
        name: of its runs.
        arch: of main_repopt.py; empty: that of `base`.
        cfg: recipe.
        kind: how it is run.
        settings: keys and values over the recipe.
        scales: training whose scales it takes.
        base: training whose network is quantized, or is the backbone.
        gpus: at full scale.
        once: whether all seeds share one run, of the first seed.
        arguments: further ones of the command line.
    """

    name: str
    arch: str = ""
    cfg: str | None = None
    kind: Kind = TRAIN
    settings: Mapping[str, Any] = field(default_factory=dict, hash=False)
    scales: Training | None = None
    base: Training | None = None
    gpus: int = 1
    once: bool = False
    arguments: tuple[str, ...] = ()

    def but(self, name: str, settings: Mapping[str, Any] | None = None, **fields: Any) -> Training:
        """Return the same under another name, with other fields and further settings."""
        return replace(self, name=name, settings={**self.settings, **(settings or {})}, **fields)


@dataclass(frozen=True)
class ExperimentRun:
    """A run of a training.

    Attributes:
        training: what is done.
        seed: of everything random in it.
        output: below which all runs are.
        scales, base: the runs whose scales it takes and whose network it goes out from.
    """

    training: Training
    seed: int
    output: Path
    scales: ExperimentRun | None = None
    base: ExperimentRun | None = None

    @classmethod
    def plan(cls, training: Training, seeds: Sequence[int], output: Path) -> list[ExperimentRun]:
        """Return the runs of a training: one per seed, or one in all."""

        def run(training: Training, seed: int) -> ExperimentRun:
            seed = seeds[0] if training.once else seed
            scales, base = (run(before, seed) if before else None for before in (training.scales, training.base))
            return cls(training, seed, output, scales, base)

        return list(dict.fromkeys(run(training, seed) for seed in seeds))

    @property
    def kind(self) -> Kind:
        """The way in which it is run."""
        return self.training.kind

    @property
    def script(self) -> str:
        """The script that does it."""
        return self.kind.script

    @property
    def needs(self) -> list[ExperimentRun]:
        """Runs that come before it."""
        return [run for run in (self.scales, self.base) if run is not None]

    @property
    def arch(self) -> str:
        """The architecture, as main_repopt.py names it."""
        return self.training.arch or (self.base.arch if self.base else "")

    @property
    def tag(self) -> str:
        """The name of its folder."""
        return f"{self.training.name}-seed{self.seed}"

    @property
    def folder(self) -> Path:
        """The folder into which it writes."""
        return self.output / self.arch / self.tag

    @property
    def result(self) -> Path:
        """The file that is there when it came to its end."""
        return self.folder / (self.kind.result or f"ckpt_epoch_{self.cfg.TRAIN.EPOCHS - 1}.pth")

    @cached_property
    def command(self) -> list[str]:
        """Arguments of its script; the data's folder is the name of an environment variable, "$IMAGENET"."""
        if self.kind is SPEED:
            return [*self.training.arguments, "--json", str(self.result)]
        arguments = ["--cfg", self.training.cfg] if self.training.cfg else []
        arguments += ["--arch", self.arch, "--tag", self.tag, "--output", str(self.output)]
        if self.base is not None:
            arguments += [*self.kind.flags, str(self.base.folder / "latest.pth")]
        if self.kind is THROUGHPUT:
            arguments += ["--throughput"]
        if self.scales is not None:
            arguments += ["--scales-path", str(self.scales.folder / "scales.pth")]
        options = ["--opts", "SEED", str(self.seed)]
        options += [str(word) for setting in self.training.settings.items() for word in setting]
        dataset = config.parse([*arguments, *options], self.kind.program).cfg.DATA.DATASET
        if dataset in FOLDERS and self.kind is not THROUGHPUT:
            arguments += ["--data-path", f"${FOLDERS[dataset]}"]
        return [*arguments, *self.training.arguments, *options]

    @cached_property
    def cfg(self) -> Any:
        """The configuration that its command line gives, as the data set leaves it open."""
        return config.parse(self.command, self.kind.program).cfg

    def is_done(self) -> bool:
        """Return whether it came to its end, in whatever start.

        Raises:
            UserError: its folder is that of a run with other settings.
        """
        try:
            before = json.loads((self.folder / CONFIG).read_text())
        except (FileNotFoundError, ValueError):  # not begun; being written
            return self.result.is_file()
        cfg, given = config.parse(self.command, self.kind.program)
        for key in sorted(given - _OF_PLACES):
            then, now = config.lookup(before, key), config.lookup(cfg, key)
            if then != (list(now) if isinstance(now, tuple) else now):
                raise UserError(
                    f"{str(self.folder)!r} holds a run with other settings ({key} was {shown(then)} and is {now!r} "
                    "now): delete it, or give another --output"
                )
        return self.result.is_file()

    def with_folders(self) -> list[str]:
        """Return the command with the folders of data sets in it.

        Raises:
            UserError: an environment variable that it needs is not set.
        """
        for name in (argument[1:] for argument in self.command if argument.startswith("$")):
            if not os.environ.get(name):
                raise UserError(f"where is the data set of {self.training.name!r}? Set {name} to its folder")
        return [os.environ[a[1:]] if a.startswith("$") else a for a in self.command]

    def gpus(self, scale: str) -> int:
        """Return how many it takes."""
        return self.training.gpus if scale == "full" else 0

    def shell_line(self, scale: str) -> str:
        """Return the command as it is typed."""
        gpus = 0 if self.kind.alone else self.gpus(scale)
        launcher = f"torchrun --standalone --nproc_per_node {gpus}" if gpus else "python"
        words = [f'"{word}"' if word.startswith("$") else shlex.quote(word) for word in self.command]
        return " ".join([launcher, self.script, *words])

    def progress(self) -> int:
        """Return the epochs done; 1 of something else that is done."""
        return len(epochs_of(self.folder)) if self.kind.result is None else int(self.is_done())

    def length(self) -> int:
        """Return what `progress` ends at."""
        return self.cfg.TRAIN.EPOCHS if self.kind.result is None else 1


def with_needs(runs: Sequence[ExperimentRun]) -> list[ExperimentRun]:
    """Return these runs and all that come before them, each once, in an order in which they can be run."""
    ordered: dict[ExperimentRun, None] = {}
    for run in runs:
        ordered.update(dict.fromkeys([*with_needs(run.needs), run]))
    return list(ordered)
