"""What the commands beside it have in common."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from main_repopt import DONE, INTERRUPTED
from repopt.errors import run_command
from train import config


def run_program(program: config.Program, argv: Sequence[str] | None) -> int:
    """Run a command line of a program, draw what its network predicts, and return the exit code."""
    argv = sys.argv[1:] if argv is None else argv

    def command() -> int:
        settings = config.parse(argv, program)
        from train.run import start  # torch and timm take seconds

        cfg = start(settings, argv, program)
        if cfg is None:
            return INTERRUPTED
        if os.environ.get("RANK", "0") == "0":
            from downstream.pictures import draw

            draw(cfg)
        return DONE

    return run_command(program.name, command)
