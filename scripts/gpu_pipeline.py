"""A part of the paper's pipeline on the data set glyphs, within a number of seconds (scripts/gpu_pipeline.sh).

    python scripts/gpu_pipeline.py PART --seconds 450 --json output/gpu/glyphs-PART.json

search: the hyper-search. target: the plain network under the RepOptimizer, with its scales. repvgg, sgd: RepVGG, and
the plain network under SGD. They train for 240 epochs, or for as many as fit: two epochs are trained before to see how
long one takes. int8: post-training quantization of target and repvgg under every preset; what of the two is not in
--runs is trained before.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

import _root
import torch
from benchmarks.report import Row, Tables, environment, keep
from runs import epochs_of

from data import glyphs
from repopt.errors import UserError
from repopt.quantization import PRESETS
from train.command import run_command
from train.file_names import ARTIFACTS, RESULTS, SIGNAL_TO_NOISE

MODES = {"search": "hs", "target": "target", "repvgg": "repvgg", "sgd": "target-norepopt"}
QUANTIZED = ("target", "repvgg")
EPOCHS = 240  # of the published search, of which warm-up takes a 24th
EVALUATIONS = 6
QUANTIZATION = 200  # seconds that int8 keeps for it
SCALES = "scales.pth"


class Training(NamedTuple):
    """A training of the pipeline: a part's network, on a data set, in a folder of runs.

    Attributes:
        part: of `MODES`.
        model: without mode.
        dataset: DATA.DATASET.
        runs: folder.
        scales: file of the searched scales, where there are some.
        epochs: most that it is to have.
        tried: epochs that are trained before to see how many fit; the first one compiles. 0: all are to fit.
    """

    part: str
    model: str
    dataset: str
    runs: Path
    scales: Path | None
    epochs: int
    tried: int

    @property
    def arch(self) -> str:
        """The architecture, as main_repopt.py names it."""
        return f"{self.model}-{MODES[self.part]}"

    def folder(self, tag: str) -> Path:
        """Return the folder into which a run writes."""
        return self.runs / self.arch / tag

    @property
    def checkpoint(self) -> Path:
        """The checkpoint that it ends with."""
        return self.folder(self.part) / "latest.pth"

    @property
    def mark(self) -> Path:
        """A file that is there when the training has come to its end: one that was stopped leaves a checkpoint, too."""
        return self.folder(self.part) / "done"

    def train(self, deadline: float) -> Row:
        """Train for as many epochs as end before `deadline` (of time.monotonic), and return what was found.

        Raises:
            UserError: not one epoch does.
        """
        started = time.monotonic()
        epochs = min(self.epochs, self._that_fit(deadline)) if self.tried else self.epochs
        self._run(self.part, epochs)
        self.mark.touch()
        found = epochs_of(self.folder(self.part))
        return {
            "network": self.arch,
            "epochs": epochs,
            "top-1 (%)": found[-1]["val"]["top1"],
            "s per epoch": statistics.median(epoch["train_seconds"] for epoch in found),
            "minutes in all": (time.monotonic() - started) / 60,
        }

    def _that_fit(self, deadline: float) -> int:
        """Return how many epochs fit; a tenth of the time is kept for evaluations and checkpoints on the way."""
        started = time.monotonic()
        self._run("speed", self.tried)
        ended = time.monotonic()
        epoch = epochs_of(self.folder("speed"))[-1]["train_seconds"]
        shutil.rmtree(self.folder("speed"))
        left = deadline - ended - (ended - started - self.tried * epoch)  # the start and the end take as long again
        if (epochs := int(0.9 * left / epoch)) < 1:
            raise UserError(f"not one epoch of {self.arch} fits: it takes {epoch:.1f} s, and {left:.0f} s are left")
        return epochs

    def _run(self, tag: str, epochs: int) -> None:
        shutil.rmtree(self.folder(tag), ignore_errors=True)  # or it would be gone on with
        arguments = ["--cfg", f"configs/glyphs/{'search' if self.part == 'search' else 'train'}.yaml"]
        arguments += ["--arch", self.arch, "--output", str(self.runs), "--tag", tag]
        arguments += ["--scales-path", str(self.scales)] if self.part == "target" else []
        options = {
            "DATA.DATASET": self.dataset,
            "TRAIN.EPOCHS": epochs,
            "TRAIN.WARMUP_EPOCHS": epochs // 24,
            "TEST.PERIOD": -(-epochs // EVALUATIONS),
            "SAVE_FREQ": epochs,
        }
        arguments += ["--opts", *(str(word) for option in options.items() for word in option)]
        if code := start("main_repopt.py", arguments):
            raise UserError(f"main_repopt.py ended with exit code {code}")


class Quantization(NamedTuple):
    """One quantization of a trained network."""

    training: Training
    preset: str

    @property
    def artifacts(self) -> Path:
        """The folder of its files when it is done."""
        return self.training.folder(f"ptq-{self.preset}") / ARTIFACTS

    def run(self) -> None:
        """Do it anew; what is refused leaves no artifacts."""
        shutil.rmtree(self.artifacts.parent, ignore_errors=True)
        arguments = ["--cfg", "configs/glyphs/quantize.yaml", "--arch", self.training.arch, "--method", "ptq"]
        arguments += ["--preset", self.preset, "--resume", str(self.training.checkpoint)]
        arguments += ["--output", str(self.training.runs), "--opts", "DATA.DATASET", self.training.dataset]
        start("scripts/quantize.py", arguments)

    def row(self) -> Row:
        """Return the row of the table."""
        results, ratios = (json.loads((self.artifacts / name).read_text()) for name in (RESULTS, SIGNAL_TO_NOISE))
        finite = [ratio for ratio in ratios.values() if ratio is not None]
        return {
            "preset": self.preset,
            "network": self.training.arch,
            "fp32 top-1 (%)": results["fp32"]["top1"],
            "PTQ": results["INT8"]["top1"],
            "PTQ, onnxruntime": results["INT8, onnxruntime"]["top1"],
            "signal to noise of the logits (dB)": [*ratios.values()][-1],
            "of the worst layer": min(finite, default=None),
        }


def main() -> None:
    """Do a part, and keep what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=[*MODES, "int8"])
    parser.add_argument("--arch", default="RepOpt-VGG-B1", help="model (default: %(default)s)")
    parser.add_argument("--device", default="cuda", help="that is used (default: %(default)s)")
    parser.add_argument("--seconds", type=float, required=True, help="that the part may take")
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="at most (default: %(default)s)")
    parser.add_argument(
        "--tried", type=int, default=2, help="epochs before, to see how many fit; 0: all (default: %(default)s)"
    )
    parser.add_argument("--dataset", default="glyphs", help="default: %(default)s")
    parser.add_argument("--runs", type=Path, default=Path("output/gpu-runs"), help="folder (default: %(default)s)")
    parser.add_argument(
        "--scales", type=Path, help="scale file (default: that of the search, in --runs or benchmarks/)"
    )
    parser.add_argument("--presets", nargs="+", choices=PRESETS, default=list(PRESETS), help="default: all")
    parser.add_argument("--json", type=Path, required=True, help="file of the result; others are written beside it")
    arguments = parser.parse_args()
    deadline = time.monotonic() + arguments.seconds
    if arguments.dataset == "glyphs":
        glyphs.make(Path(glyphs.DEFAULT))

    def training(part: str) -> Training:
        scales = find_scales(arguments) if part == "target" else None
        return Training(
            part, arguments.arch, arguments.dataset, arguments.runs, scales, arguments.epochs, arguments.tried
        )

    def keep_found(tables: Tables) -> None:
        keep(arguments.json, environment(torch.device(arguments.device)), tables)

    if arguments.part == "int8":
        int8([training(part) for part in QUANTIZED], arguments.presets, deadline, keep_found)
        return
    chosen = training(arguments.part)
    # Whoever cuts the part sends SIGTERM: what the run has written until then is kept.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        keep_found({"Trainings on glyphs": [chosen.train(deadline)]})
    finally:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        for name, kept in {"metrics.jsonl": f"{arguments.part}-metrics.jsonl", SCALES: SCALES}.items():
            if (file := chosen.folder(arguments.part) / name).is_file():
                shutil.copy(file, arguments.json.with_name(kept))


def start(script: str, arguments: Sequence[str]) -> int:
    """Run a script in a process of its own and return its exit code."""
    return subprocess.run([sys.executable, script, *arguments], cwd=_root.ROOT).returncode


def find_scales(arguments: argparse.Namespace) -> Path:
    """Return the file of the searched scales.

    Raises:
        UserError: there is none.
    """
    search = arguments.runs / f"{arguments.arch}-hs" / "search" / SCALES
    places = [search, arguments.json.with_name(SCALES), _root.ROOT / "benchmarks" / "glyphs-scales.pth"]
    for place in [arguments.scales] if arguments.scales else places:
        if place.is_file():
            return place
    raise UserError("there are no searched scales: run the part search before, or name its scales.pth (SCALES)")


def int8(
    trainings: Sequence[Training], presets: Sequence[str], deadline: float, keep_found: Callable[[Tables], None]
) -> None:
    """Quantize networks, which are trained before where they are not there; `keep_found` gets what is found so far.

    Raises:
        UserError: a network was refused, or the time is too short to train one.
    """
    missing = [training for training in trainings if not training.mark.is_file()]
    trained: list[Row] = []
    for index, training in enumerate(missing):
        now = time.monotonic()
        trained.append(training.train(now + (deadline - QUANTIZATION - now) / (len(missing) - index)))
    jobs = [Quantization(training, preset) for preset in presets for training in trainings]
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // len(jobs)))
    with ThreadPoolExecutor(min(len(jobs), os.cpu_count() or 1)) as pool:
        for _ in as_completed([pool.submit(job.run) for job in jobs]):
            quantized = [job.row() for job in jobs if job.artifacts.exists()]
            tables = {"Trained on glyphs, to be quantized": trained, "Post-training quantization on glyphs": quantized}
            keep_found({title: rows for title, rows in tables.items() if rows})
    if refused := [f"{job.training.arch} {job.preset}" for job in jobs if not job.artifacts.exists()]:
        raise UserError(f"not quantized: {', '.join(refused)}")


if __name__ == "__main__":
    sys.exit(run_command("gpu_pipeline.py", main))
