"""Faults, injected for real into trainings that are then started again with the same command.

A new kind of fault is a function (training, rng) that injects it and lets the training end, and a row of FAULTS.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import random
import re
import shutil
import signal
import subprocess
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from soak.training import Bench, SurvivalError, Training, free_port, workers_of

MISTAKE, INTERRUPTED = 2, 75  # exit codes of main_repopt.py
# Images on the device, and images that worker processes decode and vary.
DIGITS = ["DATA.DATASET", "digits", "DATA.BATCH_SIZE", 20]
SEARCHING = [*DIGITS, "TRAIN.SEARCH_EPOCHS", 1]
FILES = ["DATA.DATASET", "folder", "DATA.BATCH_SIZE", 8, "DATA.IMG_SIZE", 32, "DATA.NUM_WORKERS", 2]


class PrivilegeError(Exception):
    """A fault cannot be injected here."""


def started(training: Training, rng: random.Random, *launcher: object) -> subprocess.Popen[str]:
    """Start a training, and return its process at a random moment while it trains."""
    process = training.start(*launcher)
    training.trains(process)
    time.sleep(rng.uniform(0, 2))
    return process


def interrupt_again_and_again(training: Training, rng: random.Random, number: signal.Signals) -> None:
    """Send a signal at random moments, from the start of the process to its end, until the training is done."""
    for _ in range(training.restarts):
        with training.fault():
            process = training.start()
            if rng.random() < 0.8:  # else while it starts
                training.trains(process)
                time.sleep(rng.uniform(0, 3))
            else:
                time.sleep(rng.uniform(0, 5))
            running = process.poll() is None
            if running:
                process.send_signal(number)
            code = training.wait(process)
        if not running:
            training.faults -= 1
        if code == 0:
            return
        training.expect(code in (INTERRUPTED, -number), code)  # the latter: it had not begun to train
    training.finish()


def kill_while_it_writes(training: Training, rng: random.Random) -> None:
    """Kill the process when the thread that writes its checkpoints has begun a file, again and again."""
    for _ in range(training.restarts):
        with training.fault():
            process = training.start()
            training.trains(process)
            time.sleep(rng.uniform(0, 1))
            while process.poll() is None and not any(training.files.glob("*.writing")):
                time.sleep(0.0005)
            running = process.poll() is None
            process.kill()
            training.wait(process)
        if not running:
            training.faults -= 1
            break
    training.finish()


def kill_at_the_freeze(training: Training, rng: random.Random) -> None:
    """Kill the process shortly before or after the scales that it has searched become constants."""
    with training.fault():
        process, log = training.start(), training.files / "log_rank0.txt"
        said = rng.choice(["epoch 1 ema", "scales are constants"])
        while process.poll() is None and not (log.is_file() and said in log.read_text()):
            time.sleep(0.0005)
        time.sleep(rng.uniform(0, 0.2))
        process.kill()
        training.wait(process)
    training.finish()


def damage(training: Training, rng: random.Random, spoil: Callable[[Path, random.Random], None]) -> None:
    """Spoil the latest checkpoint of a training that was stopped, and go on from the one before it."""
    process = started(training, rng)
    process.kill()
    training.wait(process)
    latest = training.files / "latest.pth"
    if not (training.files / "latest_1.pth").is_file():  # killed before two were written
        training.finish()
        return
    with training.fault(*(path for path in training.files.glob("*.pth") if path.samefile(latest))):
        spoil(latest, rng)
    training.finish()
    training.expect("the one before it is used" in training.output, "0 without a word of the damage")


def truncate(path: Path, rng: random.Random) -> None:
    """Cut a file at a random place."""
    os.truncate(path, rng.randrange(path.stat().st_size))


def flip(path: Path, rng: random.Random) -> None:
    """Change one bit of the largest tensor; there are bytes between tensors that nobody reads."""
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda info: info.file_size)
    place = largest.header_offset + 256 + rng.randrange(largest.file_size - 256)  # behind the entry's header
    with path.open("r+b") as file:
        file.seek(place)
        (byte,) = file.read(1)
        file.seek(place)
        file.write(bytes([byte ^ 1 << rng.randrange(8)]))


def fill_the_disk(training: Training, rng: random.Random) -> None:
    """Train on a small file system until it is full; then on the same one, enlarged."""
    training.folder.mkdir()
    size = int(rng.uniform(0.5, 3.5) * 9.5e6)  # a checkpoint has 9.5 MB
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(training.folder)]
    mounted = subprocess.run(mount, capture_output=True, text=True)
    if mounted.returncode:
        raise PrivilegeError(f"no right to mount a file system: {mounted.stderr.strip()}")
    try:
        with training.fault():
            code = training.wait(training.start())
        lines = [line for line in training.output.splitlines() if line.startswith("main_repopt.py: ")]
        training.expect(code == MISTAKE and len(lines) == 1 and "Traceback" not in training.output, code)
        subprocess.run(["mount", "-o", "remount,size=1000000000", str(training.folder)], check=True)
        training.finish()
        training.compare()
    finally:
        subprocess.run(["umount", str(training.folder)], check=True)


def start_a_second_one(training: Training, rng: random.Random) -> None:
    """Start the same command while the training runs."""
    process = training.start()
    training.trains(process)
    with training.fault():
        code = training.wait(training.start())
    training.expect(code == MISTAKE and "another run" in training.output, code)
    code = training.wait(process)
    training.expect(code == 0, code)


def kill_a_rank(training: Training, rng: random.Random, *, restarts: int) -> None:
    """Kill one of two processes; torchrun starts both again, or the other one ends within a minute."""
    process = started(training, rng, "--standalone", f"--max-restarts={restarts}")
    workers = workers_of(process.pid)
    with training.fault():
        if workers:
            os.kill(rng.choice(workers), signal.SIGKILL)
        killed = time.monotonic()
        code = training.wait(process)
    if not workers:
        training.faults -= 1
    elif restarts:
        training.expect(code == 0, code)
    else:
        seconds = time.monotonic() - killed
        training.expect(code and seconds < 60, f"{code} after {seconds:.0f} s")
        training.finish()


def leave_a_rank_alone(training: Training, rng: random.Random) -> None:
    """Kill one of two processes that no launcher watches; the other one ends within a minute by itself."""
    names = {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "localhost", "MASTER_PORT": free_port()}
    alone = dataclasses.replace(training, processes=1)
    processes = [alone.start(**names, RANK=rank, LOCAL_RANK=rank) for rank in range(2)]
    training.trains(processes[0])
    victim = rng.randrange(2)
    with training.fault():
        processes[victim].kill()
        killed = time.monotonic()
        codes = [alone.wait(process) for process in processes]
    seconds = time.monotonic() - killed
    training.expect(all(codes) and seconds < 60, f"{codes} after {seconds:.0f} s")
    training.finish()


def stop_torchrun(training: Training, rng: random.Random, *, finish: bool = True) -> None:
    """SIGTERM to the launcher: all processes save at the same step."""
    process = started(training, rng)
    with training.fault():
        process.send_signal(signal.SIGTERM)
        training.wait(process)
    if finish:
        training.finish()


def two_nodes(training: Training, rng: random.Random) -> None:
    """Two launchers of one process each, which meet on the loopback; one of their processes is killed."""
    port = free_port()
    meet = ["--nnodes=2", "--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{port}", "--max-restarts=2"]
    meet += ["--nproc_per_node=1", "--local-addr=localhost"]
    nodes = [training.start(*meet) for _ in range(2)]
    training.trains(nodes[0])
    time.sleep(rng.uniform(0, 2))
    workers = workers_of(rng.choice(nodes).pid)
    with training.fault():
        if workers:
            os.kill(workers[0], signal.SIGKILL)
        codes = [training.wait(node) for node in nodes]
    if not workers:
        training.faults -= 1
    training.expect(not any(codes), codes)


def halve_the_processes(training: Training, rng: random.Random) -> None:
    """Stop two processes within an epoch, and go on with one that takes two batches to a step."""
    stop_torchrun(training, rng, finish=False)
    options = [*training.options, "TRAIN.ACCUMULATION_STEPS", 2]
    dataclasses.replace(training, processes=1, options=options).finish()
    training.compare(statistics=False)  # one process has other batch-norm statistics than the mean of two


@dataclass(frozen=True)
class Fault:
    """What happens to a training, and in how many rounds.

    Attributes:
        inject: makes it happen, and lets the training end.
        rounds: in all.
        options: of the trainings, by turns.
        processes: of each training.
        compares: whether its end is compared afterwards; some faults compare it themselves.
    """

    inject: Callable[[Training, random.Random], None]
    rounds: int
    options: tuple[list[Any], ...] = (DIGITS, FILES)
    processes: int = 1
    compares: bool = True


FAULTS: dict[str, Fault] = {
    "kill -9": Fault(functools.partial(interrupt_again_and_again, number=signal.SIGKILL), 20),
    "kill -9 while a checkpoint is written": Fault(kill_while_it_writes, 8),
    "SIGTERM": Fault(functools.partial(interrupt_again_and_again, number=signal.SIGTERM), 6),
    "SIGUSR1": Fault(functools.partial(interrupt_again_and_again, number=signal.SIGUSR1), 4),
    "kill -9 where scales become constants": Fault(kill_at_the_freeze, 6, (SEARCHING,)),
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
    """What came of one round, or of several."""

    injected: int
    survived: int
    bytes_lost: int
    problem: str = ""
    ran: bool = True


def play(bench: Bench, name: str, seed: int, **options: Any) -> Result:
    """Play one round of a fault; `options` are those of the training."""
    fault = FAULTS[name]
    folder = bench.folder / f"{re.sub('[^a-z0-9]+', '-', name.lower())}-{seed}"
    training = Training(bench, folder, fault.options[seed % len(fault.options)], fault.processes, **options)
    try:
        fault.inject(training, random.Random(seed))
        if fault.compares:
            training.compare()
    except PrivilegeError as error:
        return Result(0, 0, 0, str(error), ran=False)
    except SurvivalError as error:
        lost = training.bytes_lost
        return Result(max(training.faults, 1), max(training.faults - 1, 0), lost, f"round {seed}: {error}")
    shutil.rmtree(training.folder, ignore_errors=True)
    return Result(training.faults, training.faults, training.bytes_lost)
