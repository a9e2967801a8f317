"""Trainings that faults are injected into, and the comparison with one that nothing has happened to."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch
from PIL import Image
from torch import Tensor

import repopt
from repopt import checkpoint
from repopt.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
ARCH = "RepOpt-VGG-nano-target"
TIMEOUT = 300  # seconds that anything may take

RECIPE = [
    "TRAIN.EPOCHS", 3, "TRAIN.WARMUP_EPOCHS", 1, "TRAIN.BASE_LR", 0.2, "TRAIN.WEIGHT_DECAY", 1e-4,
    "TRAIN.EMA_ALPHA", 0.01, "TRAIN.EMA_UPDATE_PERIOD", 3, "TRAIN.CLIP_GRAD", 1.0, "AUG.MIXUP", 0.2, "AUG.CUTMIX", 1.0,
    "SAVE_EVERY_STEPS", 2, "SAVE_FREQ", 1, "PRINT_FREQ", 1,
]  # fmt: skip


class SurvivalError(Exception):
    """A training did not survive."""


@dataclass
class Training:
    """One training, in a folder of its own.

    Attributes:
        bench: what it shares with others.
        folder: its --output.
        options: configuration keys and values, beside RECIPE.
        processes: that torchrun starts; a single one has no launcher.
        restarts: after which nothing happens to it any more.
        faults: injected so far.
        bytes_lost: so far.
        output: what the process that was last waited for has printed.
    """

    bench: Bench
    folder: Path
    options: Sequence[Any]
    processes: int = 1
    restarts: int = 6
    faults: int = 0
    bytes_lost: int = 0
    output: str = ""
    _logs: dict[int, IO[str]] = field(default_factory=dict)

    @property
    def files(self) -> Path:
        """The folder that it writes to."""
        return self.folder / ARCH / "default"

    def start(self, *launcher: object, **environment: object) -> subprocess.Popen[str]:
        """Start the command, the same at every start; `launcher` are further options of torchrun."""
        command = [sys.executable]
        if self.processes > 1:
            command += ["-m", "torch.distributed.run", f"--nproc_per_node={self.processes}"]
            command += map(str, launcher or ["--standalone"])
        command += [str(ROOT / "main_repopt.py"), "--arch", ARCH, "--output", str(self.folder)]
        if "TRAIN.SEARCH_EPOCHS" not in self.options:
            command += ["--scales-path", str(self.bench.scales)]
        command += ["--data-path", str(self.bench.images)]
        command += ["--opts", *map(str, [*RECIPE, *self.options])]
        variables = os.environ | {"OMP_NUM_THREADS": "1"} | {name: str(value) for name, value in environment.items()}
        log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (it is the process's as long as that runs)
        process = subprocess.Popen(
            command, cwd=ROOT, env=variables, stdout=log, stderr=log, text=True, start_new_session=True
        )
        self._logs[process.pid] = log
        return process

    def wait(self, process: subprocess.Popen[str]) -> int:
        """Return the exit code; what was printed is in `output`."""
        try:
            code = process.wait(TIMEOUT)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise SurvivalError(f"still running after {TIMEOUT} s") from None
        with self._logs.pop(process.pid) as log:
            log.seek(0)
            self.output = log.read()
        return code

    def expect(self, right: object, code: object) -> None:
        """Raise SurvivalError with an exit code and what was printed, unless all is right."""
        if not right:
            raise SurvivalError(f"exit code {code}: {self.output[-2000:]}")

    def finish(self) -> None:
        """Start it and let it end."""
        code = self.wait(self.start())
        self.expect(code == 0, code)

    def trains(self, process: subprocess.Popen[str]) -> None:
        """Wait until it trains (or has ended)."""
        before = self._batches()
        deadline = time.monotonic() + TIMEOUT
        while process.poll() is None and self._batches() <= before and time.monotonic() < deadline:
            time.sleep(0.02)

    def _batches(self) -> int:
        """Return how many lines of its log tell of training."""
        log = self.files / "log_rank0.txt"
        return len(re.findall("^.* batch ", log.read_text(), re.MULTILINE)) if log.is_file() else 0

    def whole(self) -> dict[Path, int]:
        """Return the checkpoints that are whole, and their sizes."""
        return {path: path.stat().st_size for path in self.files.glob("*.pth") if is_whole(path)}

    @contextmanager
    def fault(self, *spoiled: Path) -> Iterator[None]:
        """Around a fault: count it, and what was whole before and is not afterwards, but for what it spoils itself."""
        before = self.whole()
        yield
        self.faults += 1
        after = self.whole()
        # A checkpoint of the same name may have taken its place.
        self.bytes_lost += sum(size for path, size in before.items() if path not in after and path not in spoiled)

    def compare(self, *, statistics: bool = True) -> None:
        """Add the bytes that differ from the training that nothing has happened to.

        Args:
            statistics: whether those of batch norms are compared, and the accuracies that follow from them.
        """
        own, reference = (checkpoint.read(path) for path in (self.files / "latest.pth", self.bench.reference(self)))
        for content in (own, reference):
            if not statistics:
                content["model"] = {name: content["model"][name] for name in self.bench.parameters}
        keys = ("model", "ema", "optimizer", "epoch", "max_accuracy", "max_ema_accuracy", "skipped")
        for key in keys if statistics else ("model", "optimizer", "epoch"):
            self.bytes_lost += differing_bytes(own.get(key), reference.get(key))


class Bench:
    """What all rounds share: scales, images, and the trainings to compare with."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.scales, self.images = folder, folder / "scales.pth", folder / "images"
        self._references: dict[Any, Path] = {}
        torch.manual_seed(0)
        model = repopt.create_model("RepOpt-VGG-nano", mode="hs", num_classes=10)
        repopt.save_scales({k: s * torch.rand_like(s) for k, s in repopt.extract_scales(model).items()}, self.scales)
        write_images(self.images)
        target = repopt.create_model("RepOpt-VGG-nano", mode="target", num_classes=10)
        self.parameters = [name for name, _ in target.named_parameters()]

    def reference(self, training: Training) -> Path:
        """Return the last checkpoint of the same training without faults, which is done where it is not there yet."""
        key = (*training.options, training.processes)
        if key not in self._references:
            folder = self.folder / f"undisturbed-{len(self._references)}"
            undisturbed = Training(self, folder, training.options, training.processes)
            undisturbed.finish()
            self._references[key] = undisturbed.files / "latest.pth"
        return self._references[key]


def write_images(folder: Path) -> None:
    """Write handwritten digits as JPEG files in class folders, 10 of each for training and 3 for validation."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    for label in range(10):
        of_label = digits.images[digits.target == label]
        for split, images in (("train", of_label[:10]), ("val", of_label[10:13])):
            (folder / split / str(label)).mkdir(parents=True)
            for number, image in enumerate(images):
                pixels = Image.fromarray((image * 15).astype("uint8")).convert("RGB").resize((40, 40))
                pixels.save(folder / split / str(label) / f"{number}.jpg")


def is_whole(path: Path) -> bool:
    """Return whether a checkpoint can be read."""
    try:
        checkpoint.read(path)
    except (UserError, OSError):
        return False
    return True


def differing_bytes(a: Any, b: Any) -> int:
    """Return how many bytes of the tensors (a number counts 8) differ in two checkpoints."""
    if isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape and a.dtype == b.dtype:
        return int((a.reshape(-1, 1).view(torch.uint8) != b.reshape(-1, 1).view(torch.uint8)).sum())
    if isinstance(a, Mapping) and isinstance(b, Mapping) and a.keys() == b.keys():
        return sum(differing_bytes(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        return sum(map(differing_bytes, a, b))
    return 0 if type(a) is type(b) and not isinstance(a, Tensor) and a == b else 8


def workers_of(launcher: int) -> list[int]:
    """Return the processes that torchrun has started."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children")
    return [int(pid) for pid in children.read_text().split()] if children.exists() else []


def free_port() -> int:
    """Return a port of the loopback that nobody has."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]
