"""Results as Markdown tables and as JSON, with what they depend on."""

from __future__ import annotations

import json
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision

Row = Mapping[str, Any]
Table = tuple[str, Sequence[Row]]
"""A title and rows, which have the same columns."""
Tables = Mapping[str, Sequence[Row]]
"""Rows by the title of their table."""


def environment(device: torch.device) -> dict[str, str]:
    """Return what a measurement depends on."""
    if device.type == "cuda":
        machine = torch.cuda.get_device_name(device)
    else:
        info = Path("/proc/cpuinfo")
        lines = info.read_text().splitlines() if info.exists() else []
        models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        name = models[0] if models else platform.processor() or platform.machine()
        machine = f"{name}, {torch.get_num_threads()} threads"
    return {
        "command": f"python scripts/{Path(sys.argv[0]).name} {shlex.join(_without_file(sys.argv[1:]))}",
        "machine": machine,
        "python": platform.python_version(),
        **{package.__name__: package.__version__ for package in (torch, torchvision, timm)},
    }


def _without_file(arguments: list[str]) -> list[str]:
    """Return the arguments but `--json`: where a result is kept changes nothing in it."""
    if "--json" not in arguments:
        return arguments
    at = arguments.index("--json")
    return arguments[:at] + arguments[at + 2 :]


def as_table(rows: Sequence[Row]) -> str:
    """Return rows of one kind as a Markdown table."""
    header = list(rows[0])
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(_shown(row[name]) for name in header) + " |" for row in rows]
    return "\n".join(lines)


def _shown(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, str | int):
        return str(value)
    return f"{value:.0f}" if value >= 100 else f"{value:.2f}" if value >= 0.1 else f"{value:.2g}" if value else "0"


def keep(file: Path, environment: Mapping[str, str], tables: Tables) -> None:
    """Write a result as JSON."""
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_suffix(".writing")  # a run that is cut leaves no half of a file
    beside.write_text(json.dumps({**environment, "tables": tables}, indent=1) + "\n")
    beside.replace(file)
