"""What a network is trained for: a task says where its images come from, what stands on the backbone, what is measured.

base        what a task is
classify    main_repopt.py
segment     scripts/downstream/segment.py
detect      scripts/downstream/detect.py
"""

from __future__ import annotations

import importlib

from yacs.config import CfgNode

from train.distributed import World
from train.keys import TASKS
from train.tasks.base import Task

__all__ = ["Task", "create", "task_class"]

# Imported when they are needed: their packages are extras.
MODULES = {task: f"train.tasks.{task}" for task in TASKS}


def task_class(name: str) -> type[Task]:
    """Return the class of a TASK."""
    return importlib.import_module(MODULES[name]).TASK


def create(cfg: CfgNode, world: World) -> Task:
    """Return the task of a configuration in this process."""
    return task_class(cfg.TASK)(cfg, world)
