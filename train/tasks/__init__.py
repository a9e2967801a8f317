"""What a network is trained for: a task says where its images come from, what stands on the backbone, what is measured.

base        what a task is
classify    main_repopt.py
segment     scripts/downstream/segment.py
detect      scripts/downstream/detect.py
"""

from __future__ import annotations

import importlib

from yacs.config import CfgNode

from train import config
from train.tasks.base import Task

__all__ = ["Task", "of"]

# Imported when they are needed: their packages are extras.
MODULES = {task: f"train.tasks.{task}" for task in config.TASKS}


def of(cfg: CfgNode) -> Task:
    """The task of a configuration."""
    return importlib.import_module(MODULES[cfg.TASK]).TASK
