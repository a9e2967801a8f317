"""What the commands beside it have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from train.command import Program, run_program

if TYPE_CHECKING:
    from yacs.config import CfgNode


def train_and_draw(program: Program, argv: Sequence[str] | None) -> int:
    """Run a program's command line, draw what its network predicts, and return the exit code."""
    return run_program(program, argv, draw=draw)


def draw(cfg: CfgNode) -> None:
    """Draw what the network of a run predicts."""
    from downstream import pictures  # imports torch, which takes seconds

    pictures.draw(cfg)
