"""Models under the modes of torch.compile that a training may choose."""

from __future__ import annotations

import torch
from torch import nn

from entrance.build import compile_mode
from repopt import config
from repopt.distributed import World
from repopt.engine import COMPILE_MODES, compiled

MODES = ("off", *COMPILE_MODES)


def under(mode: str, model: nn.Module, device: torch.device) -> nn.Module:
    """The model as `TRAIN.COMPILE` of this value trains it."""
    return model if mode == "off" else compiled(model, device, mode)


def mode_on(device: torch.device) -> str:
    """Of a training that asks for none."""
    return compile_mode(config.build({}).cfg, World(0, 1, device))
