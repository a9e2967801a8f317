"""Faults, injected for real into trainings that are then started again with the same command.

    bash scripts/soak.sh                  # all rounds; tens of minutes on 2 cores
    python scripts/soak.py --quick        # one round of each
    python scripts/soak.py "kill -9"      # one fault

Every round ends with a comparison: the weights, their moving average and the optimizer's state against those of a
training that nothing has happened to, byte by byte. "Bytes lost" are those of tensors that differ, and of checkpoints
that were whole before a fault and are not after it.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import _root
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import repopt
from repopt import checkpoint
from repopt.errors import UserError

ARCH = "RepOpt-VGG-nano-target"
PATIENCE = 300  # seconds that anything may take
RESTARTS = 6  # of one training, after which nothing happens to it any more
MISTAKE, INTERRUPTED = 2, 75  # exit codes of main_repopt.py

RECIPE = [
    "TRAIN.EPOCHS", 3, "TRAIN.WARMUP_EPOCHS", 1, "TRAIN.BASE_LR", 0.2, "TRAIN.WEIGHT_DECAY", 1e-4,
    "TRAIN.EMA_ALPHA", 0.01, "TRAIN.EMA_UPDATE_PERIOD", 3, "TRAIN.CLIP_GRAD", 1.0, "AUG.MIXUP", 0.2, "AUG.CUTMIX", 1.0,
    "SAVE_EVERY_STEPS", 2, "SAVE_FREQ", 1, "PRINT_FREQ", 1,
]  # fmt: skip
# Images on the device, and images that worker processes decode and vary.
DIGITS = ["DATA.DATASET", "digits", "DATA.BATCH_SIZE", 20]
FILES = ["DATA.DATASET", "folder", "DATA.BATCH_SIZE", 8, "DATA.IMG_SIZE", 32, "DATA.NUM_WORKERS", 2]


class SurvivalError(Exception):
    """A training did not survive."""


@dataclass
class Run:
    """One training, in a folder of its own."""

    bench: Bench
    folder: Path
    options: list[Any]
    processes: int = 1
    faults: int = 0
    bytes_lost: int = 0
    output: str = ""

    @property
    def files(self) -> Path:
        """The folder that it writes to."""
        return self.folder / ARCH / "default"

    def start(self, *launcher: object) -> subprocess.Popen[str]:
        """The command, the same at every start; `launcher` are further options of torchrun."""
        command = [sys.executable]
        if self.processes > 1:
            command += ["-m", "torch.distributed.run", f"--nproc_per_node={self.processes}"]
            command += map(str, launcher or ["--standalone"])
        command += [str(_root.ROOT / "main_repopt.py"), "--arch", ARCH, "--output", str(self.folder)]
        command += ["--scales-path", str(self.bench.scales), "--data-path", str(self.bench.images)]
        command += ["--opts", *map(str, [*RECIPE, *self.options])]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (it is the process's as long as that runs)
        process = subprocess.Popen(
            command, cwd=_root.ROOT, env=environment, stdout=log, stderr=log, text=True, start_new_session=True
        )
        process.log = log  # type: ignore[attr-defined]
        return process

    def wait(self, process: subprocess.Popen[str]) -> int:
        """The exit code; what was printed is in `output`."""
        try:
            code = process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise SurvivalError(f"still running after {PATIENCE} s") from None
        process.log.seek(0)  # type: ignore[attr-defined]
        self.output = process.log.read()  # type: ignore[attr-defined]
        process.log.close()  # type: ignore[attr-defined]
        return code

    def finish(self) -> None:
        """Start it and let it end."""
        code = self.wait(self.start())
        if code != 0:
            raise SurvivalError(f"exit code {code}: {self.output[-2000:]}")

    def trains(self, process: subprocess.Popen[str]) -> None:
        """Wait until it trains (or has ended)."""
        before = self.lines()
        deadline = time.monotonic() + PATIENCE
        while process.poll() is None and self.lines() <= before and time.monotonic() < deadline:
            time.sleep(0.02)

    def lines(self) -> int:
        """Lines of its log that tell of training."""
        log = self.files / "log_rank0.txt"
        return len(re.findall("^.* batch ", log.read_text(), re.MULTILINE)) if log.is_file() else 0

    def whole(self) -> dict[Path, int]:
        """The checkpoints that are whole, and their sizes."""
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


@dataclass
class Bench:
    """What all rounds share: data, scales, and the trainings to compare with."""

    folder: Path
    references: dict[Any, Path] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.scales, self.images = self.folder / "scales.pth", self.folder / "images"
        torch.manual_seed(0)
        model = repopt.create_model("RepOpt-VGG-nano", mode="hs", num_classes=10)
        repopt.save_scales({k: s * torch.rand_like(s) for k, s in repopt.extract_scales(model).items()}, self.scales)
        write_images(self.images)
        target = repopt.create_model("RepOpt-VGG-nano", mode="target", num_classes=10)
        self.parameters = [name for name, _ in target.named_parameters()]

    def run(self, name: str, options: list[Any], processes: int = 1) -> Run:
        """A training, not started yet."""
        return Run(self, self.folder / name, options, processes)

    def reference(self, run: Run) -> Path:
        """The last checkpoint of the same training without faults."""
        return self.references[key_of(run)]

    def prepare(self, run: Run) -> None:
        """Do the training without faults, unless it is there."""
        if key_of(run) not in self.references:
            undisturbed = self.run(f"undisturbed-{len(self.references)}", run.options, run.processes)
            undisturbed.finish()
            self.references[key_of(run)] = undisturbed.files / "latest.pth"


def key_of(run: Run) -> tuple[Any, ...]:
    """Trainings of the same key end with the same weights."""
    return (*run.options, run.processes)


def write_images(folder: Path) -> None:
    """Handwritten digits as JPEG files in class folders, 10 of each for training and 3 for validation."""
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
    """Whether a checkpoint can be read."""
    try:
        checkpoint.read(path)
    except (UserError, OSError):
        return False
    return True


def differing_bytes(a: Any, b: Any) -> int:
    """Bytes of the tensors (a number counts 8) that differ in two checkpoints."""
    if isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape and a.dtype == b.dtype:
        return int((a.reshape(-1, 1).view(torch.uint8) != b.reshape(-1, 1).view(torch.uint8)).sum())
    if isinstance(a, Mapping) and isinstance(b, Mapping) and a.keys() == b.keys():
        return sum(differing_bytes(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        return sum(map(differing_bytes, a, b))
    return 0 if type(a) is type(b) and not isinstance(a, Tensor) and a == b else 8


def workers_of(launcher: int) -> list[int]:
    """The processes that torchrun has started."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children")
    return [int(pid) for pid in children.read_text().split()] if children.exists() else []


def interrupt_again_and_again(run: Run, draw: random.Random, number: signal.Signals) -> None:
    """Send a signal at random moments, from the start of the process to its end, until the training is done."""
    for _ in range(RESTARTS):
        with run.fault():
            process = run.start()
            if draw.random() < 0.8:  # else while it starts
                run.trains(process)
                time.sleep(draw.uniform(0, 3))
            else:
                time.sleep(draw.uniform(0, 5))
            running = process.poll() is None
            if running:
                process.send_signal(number)
            code = run.wait(process)
        if not running:
            run.faults -= 1
        if code == 0:
            return
        if code not in (INTERRUPTED, -number):  # the latter: it had not begun to train
            raise SurvivalError(f"exit code {code}: {run.output[-2000:]}")
    run.finish()


def damage(run: Run, draw: random.Random, spoil: Callable[[Path, random.Random], None]) -> None:
    """Spoil the latest checkpoint of a training that was stopped, and go on from the one before it."""
    process = run.start()
    run.trains(process)
    time.sleep(draw.uniform(0.5, 2))
    process.kill()
    run.wait(process)
    latest = run.files / "latest.pth"
    if not (run.files / "latest_1.pth").is_file():  # killed before two were written
        return run.finish()
    with run.fault(*(path for path in run.files.glob("*.pth") if path.samefile(latest))):
        spoil(latest, draw)
    run.finish()
    if "the one before it is used" not in run.output:
        raise SurvivalError(f"no word of the damage: {run.output[-2000:]}")
    return None


def truncate(path: Path, draw: random.Random) -> None:
    """Cut a file at a random place."""
    os.truncate(path, draw.randrange(path.stat().st_size - 100))  # within the seal itself nothing is missing


def flip(path: Path, draw: random.Random) -> None:
    """Change one bit."""
    place = draw.randrange(path.stat().st_size - 100)
    with path.open("r+b") as file:
        file.seek(place)
        (byte,) = file.read(1)
        file.seek(place)
        file.write(bytes([byte ^ 1 << draw.randrange(8)]))


def fill_the_disk(run: Run, draw: random.Random) -> None:
    """Train on a small file system until it is full; then on the same one, enlarged."""
    run.folder.mkdir()
    size = int(draw.uniform(0.5, 3.5) * 9.5e6)  # a checkpoint has 9.5 MB
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(run.folder)]
    mounted = subprocess.run(mount, capture_output=True, text=True)
    if mounted.returncode:
        raise PrivilegeError(f"no right to mount a file system: {mounted.stderr.strip()}")
    try:
        with run.fault():
            code = run.wait(run.start())
        lines = [line for line in run.output.splitlines() if line.startswith("main_repopt.py: ")]
        if code != MISTAKE or len(lines) != 1 or "Traceback" in run.output:
            raise SurvivalError(f"exit code {code}: {run.output[-2000:]}")
        subprocess.run(["mount", "-o", "remount,size=1000000000", str(run.folder)], check=True)
        run.finish()
        run.compare()
    finally:
        subprocess.run(["umount", str(run.folder)], check=True)


class PrivilegeError(Exception):
    """A fault cannot be injected here."""


def start_a_second_one(run: Run, draw: random.Random) -> None:
    """Start the same command while the training runs."""
    process = run.start()
    run.trains(process)
    with run.fault():
        second = Run(run.bench, run.folder, run.options)
        code = second.wait(second.start())
    if code != MISTAKE or "another run" not in second.output:
        raise SurvivalError(f"exit code {code}: {second.output[-2000:]}")
    if code := run.wait(process):
        raise SurvivalError(f"exit code {code}: {run.output[-2000:]}")


def kill_a_rank(run: Run, draw: random.Random, *, restarts: int) -> None:
    """Kill one of two processes; torchrun starts both again, or the other one ends within a minute."""
    process = run.start("--standalone", f"--max-restarts={restarts}")
    run.trains(process)
    time.sleep(draw.uniform(0, 2))
    workers = workers_of(process.pid)
    with run.fault():
        if workers:
            os.kill(draw.choice(workers), signal.SIGKILL)
        killed = time.monotonic()
        code = run.wait(process)
    if not workers:
        run.faults -= 1
    elif restarts and code:
        raise SurvivalError(f"exit code {code}: {run.output[-2000:]}")
    elif not restarts:
        if not code or time.monotonic() - killed > 60:
            raise SurvivalError(f"exit code {code} after {time.monotonic() - killed:.0f} s")
        run.finish()


def free_port() -> int:
    """A port of the loopback that nobody has."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def leave_a_rank_alone(run: Run, draw: random.Random) -> None:
    """Kill one of two processes that no launcher watches; the other one ends within a minute by itself."""
    port = free_port()
    alone = Run(run.bench, run.folder, run.options)
    processes = []
    for rank in range(2):
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
        os.environ |= {name: str(value) for name, value in names.items()} | {"MASTER_ADDR": "localhost"}
        processes.append(alone.start())
    for name in (*names, "MASTER_ADDR"):
        del os.environ[name]
    run.trains(processes[0])
    victim = draw.randrange(2)
    with run.fault():
        processes[victim].kill()
        killed = time.monotonic()
        codes = [alone.wait(process) for process in processes]
    if not all(codes) or time.monotonic() - killed > 60:
        raise SurvivalError(f"exit codes {codes} after {time.monotonic() - killed:.0f} s")
    run.finish()


def stop_torchrun(run: Run, draw: random.Random, *, finish: bool = True) -> None:
    """SIGTERM to the launcher: all processes save at the same step."""
    process = run.start()
    run.trains(process)
    time.sleep(draw.uniform(0, 2))
    with run.fault():
        process.send_signal(signal.SIGTERM)
        run.wait(process)
    if finish:
        run.finish()


def two_nodes(run: Run, draw: random.Random) -> None:
    """Two launchers of one process each, which meet on the loopback; one of their processes is killed."""
    port = free_port()
    meet = ["--nnodes=2", "--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{port}", "--max-restarts=2"]
    meet += ["--nproc_per_node=1", "--local-addr=localhost"]
    nodes = [run.start(*meet) for _ in range(2)]
    run.trains(nodes[0])
    time.sleep(draw.uniform(0, 2))
    workers = workers_of(draw.choice(nodes).pid)
    with run.fault():
        if workers:
            os.kill(workers[0], signal.SIGKILL)
        codes = [run.wait(node) for node in nodes]
    if not workers:
        run.faults -= 1
    if any(codes):
        raise SurvivalError(f"exit codes {codes}: {run.output[-2000:]}")


def halve_the_processes(run: Run, draw: random.Random) -> None:
    """Stop two processes within an epoch, and go on with one that takes two batches to a step."""
    stop_torchrun(run, draw, finish=False)
    alone = Run(run.bench, run.folder, [*run.options, "TRAIN.ACCUMULATION_STEPS", 2])
    alone.finish()
    run.compare(statistics=False)  # one process has other batch-norm statistics than the mean of two


@dataclass(frozen=True)
class Fault:
    """What happens to a training, and in how many rounds.

    Attributes:
        inject: makes it happen, and lets the training end.
        rounds: in all; `--quick` has one.
        options: of the trainings, by turns.
        processes: of each training.
        compares: whether its end is compared afterwards; some faults compare it themselves.
    """

    inject: Callable[[Run, random.Random], None]
    rounds: int
    options: tuple[list[Any], ...] = (DIGITS, FILES)
    processes: int = 1
    compares: bool = True


FAULTS: dict[str, Fault] = {
    "kill -9": Fault(functools.partial(interrupt_again_and_again, number=signal.SIGKILL), 20),
    "SIGTERM": Fault(functools.partial(interrupt_again_and_again, number=signal.SIGTERM), 6),
    "SIGUSR1": Fault(functools.partial(interrupt_again_and_again, number=signal.SIGUSR1), 4),
    "latest.pth cut off": Fault(functools.partial(damage, spoil=truncate), 10, (DIGITS,)),
    "a bit of latest.pth flipped": Fault(functools.partial(damage, spoil=flip), 10, (DIGITS,)),
    "disk full": Fault(fill_the_disk, 8, (DIGITS,), compares=False),
    "second run in the folder": Fault(start_a_second_one, 2, (DIGITS,)),
    "rank killed, torchrun restarts": Fault(functools.partial(kill_a_rank, restarts=2), 4, processes=2),
    "rank killed, no restarts": Fault(functools.partial(kill_a_rank, restarts=0), 2, (DIGITS,), processes=2),
    "rank killed, no launcher": Fault(leave_a_rank_alone, 2, (DIGITS,), processes=2),
    "SIGTERM to torchrun, three processes": Fault(stop_torchrun, 2, processes=3),
    "rank killed, two nodes": Fault(two_nodes, 2, (DIGITS,), processes=2),
    "two processes, then one": Fault(halve_the_processes, 2, (FILES,), processes=2, compares=False),
}


@dataclass
class Result:
    """What came of one round."""

    injected: int
    survived: int
    bytes_lost: int
    problem: str = ""
    ran: bool = True


def play(bench: Bench, name: str, seed: int) -> Result:
    """One round of a fault."""
    fault = FAULTS[name]
    folder = f"{re.sub('[^a-z0-9]+', '-', name.lower())}-{seed}"
    run = bench.run(folder, fault.options[seed % len(fault.options)], fault.processes)
    try:
        bench.prepare(run)
        fault.inject(run, random.Random(seed))
        if fault.compares:
            run.compare()
    except PrivilegeError as error:
        return Result(0, 0, 0, str(error), ran=False)
    except SurvivalError as error:
        return Result(max(run.faults, 1), max(run.faults - 1, 0), run.bytes_lost, f"round {seed}: {error}")
    shutil.rmtree(run.folder, ignore_errors=True)
    return Result(run.faults, run.faults, run.bytes_lost)


def fuzz(quick: bool) -> Result:
    """Generated files with something wrong, for the readers of checkpoints, scales, zips and recipes."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "--hypothesis-show-statistics"]
    environment = os.environ | {"HYPOTHESIS_PROFILE": "ci" if quick else "soak", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "tests/repopt/test_hostile.py"], cwd=_root.ROOT, env=environment, capture_output=True, text=True
    )
    counts = re.findall(r"(\d+) passing, (\d+) failing", done.stdout)
    passing, failing = (sum(int(count[i]) for count in counts) for i in range(2))
    return Result(passing + failing, passing, 0, done.stdout[-2000:] if done.returncode else "")


COLUMNS = ("fault", "rounds", "injected", "survived", "bytes lost", "final weights")


def as_row(name: str, results: list[Result]) -> dict[str, Any]:
    """What all rounds of a fault came to, by column."""
    if not all(result.ran for result in results):
        return dict(zip(COLUMNS, (name, 0, 0, 0, 0, f"not run: {results[0].problem}"), strict=True))
    sums = [sum(getattr(result, key) for result in results) for key in ("injected", "survived", "bytes_lost")]
    equal = not sums[-1] and not any(result.problem for result in results)
    return dict(zip(COLUMNS, (name, len(results), *sums, "equal" if equal else "NOT EQUAL"), strict=True))


def as_table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [COLUMNS, ["---"] * len(COLUMNS), *([str(row[column]) for column in COLUMNS] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def keep(header: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Write what was measured to benchmarks/soak.json; the rows of some faults take the places of theirs."""
    path, runs = _root.ROOT / "benchmarks" / "soak.json", [header]
    if path.is_file() and len(rows) <= len(FAULTS):
        before, new = json.loads(path.read_text()), {row["fault"]: row for row in rows}
        runs, rows = [*before["runs"], header], [new.get(row["fault"], row) for row in before["rows"]]
    path.write_text(json.dumps({"runs": runs, "rows": rows}, indent=1) + "\n")


def main() -> int:
    """Play the rounds, two at a time; print the table; 1 if something did not survive."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("faults", nargs="*", metavar="FAULT", help=f"of: {', '.join(FAULTS)}; all if none is given")
    parser.add_argument("--quick", action="store_true", help="one round of each")
    arguments = parser.parse_args()
    for name in arguments.faults:
        if name not in FAULTS:
            parser.error(f"no fault {name!r}: {', '.join(FAULTS)}")
    chosen = arguments.faults or list(FAULTS)
    rounds = [(name, seed) for name in chosen for seed in range(1 if arguments.quick else FAULTS[name].rounds)]
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="soak-") as folder, ThreadPoolExecutor(2) as pool:
        bench = Bench(Path(folder))
        for name in chosen:  # first, so that rounds side by side do not both make them
            for options in FAULTS[name].options:
                bench.prepare(bench.run("reference", options, FAULTS[name].processes))
        played = pool.map(lambda round_: play(bench, *round_), rounds)
        results: dict[str, list[Result]] = {}
        for (name, _), result in tqdm(zip(rounds, played, strict=True), total=len(rounds), unit="round"):
            results.setdefault(name, []).append(result)
            if result.problem:
                tqdm.write(f"{name}: {result.problem}")
        if not arguments.faults:
            results["hostile files"] = [fuzz(arguments.quick)]
    header = {
        "command": shlex.join(["bash", "scripts/soak.sh", *sys.argv[1:]]),
        "machine": f"{os.cpu_count()} CPU cores, {platform.platform()}",
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}",
        "minutes": round((time.monotonic() - started) / 60, 1),
    }
    rows = [as_row(name, of_fault) for name, of_fault in results.items()]
    print("\n".join(f"{key}: {value}" for key, value in header.items()), as_table(rows), sep="\n\n")
    if not arguments.quick:
        keep(header, rows)
    return int(any((result.ran and result.problem) or result.bytes_lost for r in results.values() for result in r))


if __name__ == "__main__":
    sys.exit(main())
