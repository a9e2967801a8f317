"""What a run writes of itself for programs to read: its configuration, and when and how it was started."""

from __future__ import annotations

import json
import platform
from datetime import UTC, datetime
from typing import Any

import torch

import repopt
from train import config
from train.checkpoint import RunFolder
from train.file_names import CONFIG, RUN
from train.tasks.base import Task


def write(task: Task, folder: RunFolder, **sizes: int) -> None:
    """Write ``config.json``, and add this start to ``run.json``; only the first process does.

    Args:
        task: with the configuration and this process.
        folder: of the run.
        sizes: "parameters", "training_images" and "test_images", where they are known.
    """
    if not task.world.is_main:
        return
    (folder.path / CONFIG).write_text(json.dumps(config.as_dict(task.cfg), indent=1) + "\n")
    start = {
        "command": folder.command,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "repopt": repopt.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processes": task.world.size,
        "device": task.world.device.type,
    }
    record = {"starts": [*read(folder).get("starts", ()), start], **sizes}
    new = (folder.path / RUN).with_suffix(".writing")
    new.write_text(json.dumps(record, indent=1) + "\n")
    new.replace(folder.path / RUN)


def read(folder: RunFolder) -> dict[str, Any]:
    """Return what ``run.json`` says; nothing where there is none, or it is damaged."""
    try:
        record = json.loads((folder.path / RUN).read_text())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) and isinstance(record.get("starts"), list) else {}
