"""What `bash scripts/soak.sh` chooses, prints and keeps: a table of all rounds, in benchmarks/soak.json."""

from __future__ import annotations

import os
import platform
import shlex
import time
from collections.abc import Sequence

import pytest
import torch
from soak.faults import FAULTS, Result
from soak.record import as_row, as_table, keep


def pytest_addoption(parser):
    group = parser.getgroup("soak", "injected faults (bash scripts/soak.sh)")
    group.addoption("--faults", nargs="*", metavar="FAULT", help=f"of: {', '.join(FAULTS)}; all if none is named")
    group.addoption("--quick", action="store_true", help="one round of each; nothing is kept")


def pytest_configure(config):
    faults = config.getoption("faults", None)
    if faults is not None and not hasattr(config, "workerinput"):
        if unknown := set(faults) - FAULTS.keys():
            raise pytest.UsageError(f"no fault {unknown.pop()!r}: {', '.join(FAULTS)}")
        config.pluginmanager.register(Rounds(faults, config.getoption("quick")))


class Rounds:
    """Collects what came of the rounds."""

    def __init__(self, faults: Sequence[str], quick: bool) -> None:
        self.faults, self.quick, self.started = faults, quick, time.monotonic()
        self.results: dict[str, list[Result]] = {}

    def pytest_runtest_logreport(self, report):
        properties = dict(report.user_properties)
        if report.when == "call" and "fault" in properties:
            self.results.setdefault(properties.pop("fault"), []).append(Result(**properties))

    def pytest_terminal_summary(self, terminalreporter):
        run = {
            "command": shlex.join(["bash", "scripts/soak.sh", *self.faults, *(["--quick"] if self.quick else [])]),
            "machine": f"{os.cpu_count()} CPU cores, {platform.platform()}",
            "versions": f"Python {platform.python_version()}, torch {torch.__version__}",
            "minutes": round((time.monotonic() - self.started) / 60, 1),
        }
        names = [name for name in (*FAULTS, "hostile files") if name in self.results]
        rows = [as_row(name, self.results[name]) for name in names]
        terminalreporter.write_line("\n".join([f"{key}: {value}" for key, value in run.items()] + ["", as_table(rows)]))
        if not self.quick:
            keep(run, rows)
