"""How the commands beside it make their programs, and draw what their networks predict."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import _root

from train.command import Program, run_program
from train.keys import flags_of

if TYPE_CHECKING:
    from yacs.config import CfgNode


def program_of(task: str, name: str, description: str, recipe: str) -> Program:
    """Return the program of a task; its recipe is a file below configs/."""
    return Program(name, description, flags_of(task), recipe=str(_root.ROOT / "configs" / recipe), task=task)


def train_and_draw(program: Program, argv: Sequence[str] | None) -> int:
    """Run a program's command line, draw what its network predicts, and return the exit code."""

    def draw(cfg: CfgNode) -> None:
        from downstream import pictures  # imports torch, which takes seconds

        pictures.draw(cfg)

    return run_program(program, argv, draw=draw)
