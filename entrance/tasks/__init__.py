"""What a network is trained for: a task says where its images come from, what stands on the backbone, what is measured.

base        what a task is
classify    main_repopt.py
segment     scripts/downstream/segment.py
detect      scripts/downstream/detect.py
"""

from __future__ import annotations

import importlib

from yacs.config import CfgNode

from entrance.tasks.base import Task

__all__ = ["Task", "of"]


def of(cfg: CfgNode) -> Task:
    """The task of a configuration."""
    return importlib.import_module(f"entrance.tasks.{cfg.TASK.lower()}").TASK
