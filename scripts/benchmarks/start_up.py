"""CPU seconds until the command line answers, beside the import of torch."""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
from collections.abc import Iterator

import _root
import torch

from benchmarks.arguments import add_rounds, rounds_of
from benchmarks.report import Table

COMMANDS = {
    "import torch": ["-c", "import torch"],
    "import timm": ["-c", "import timm"],
    "import repopt": ["-c", "import repopt"],
    "main_repopt.py --help": ["main_repopt.py", "--help"],
    "main_repopt.py --flag (which there is not)": ["main_repopt.py", "--flag"],
    "main_repopt.py --arch B1 (which there is not)": ["main_repopt.py", "--arch", "B1"],
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this subject's arguments."""
    add_rounds(parser, 5)


def run(arguments: argparse.Namespace, device: torch.device) -> Iterator[Table]:
    """Yield one table, of commands that take turns."""
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in rounds_of(arguments).in_time():
        for name, command in COMMANDS.items():
            times[name].append(cpu_seconds(command))
    seconds = {name: statistics.median(own) for name, own in times.items()}
    rows = [
        {"command": name, "CPU s": own, "CPU s more than import torch": own - seconds["import torch"]}
        for name, own in seconds.items()
    ]
    yield "A new process", rows


def cpu_seconds(command: list[str]) -> float:
    """Return the CPU seconds of a Python process, in user and system mode."""

    def used() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    before = used()
    subprocess.run([sys.executable, *command], cwd=_root.ROOT, capture_output=True, check=False)
    return used() - before
