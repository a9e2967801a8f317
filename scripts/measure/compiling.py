"""Models under the modes of torch.compile that a training may choose."""

from __future__ import annotations

import torch
from torch import nn

from train import config
from train.build import compile_mode
from train.compilation import COMPILE_MODES, compiled
from train.distributed import World

MODES = ("off", *COMPILE_MODES)


def under(mode: str, model: nn.Module, device: torch.device) -> nn.Module:
    """The model as `TRAIN.COMPILE` of this value trains it."""
    return model if mode == "off" else compiled(model, device, mode)


AS_IN_TRAINING = "as TRAIN.COMPILE auto chooses"


def mode_on(device: torch.device, batch_size: int, image_size: int, processes: int = 1) -> str:
    """What a training that asks for none chooses."""
    cfg = config.build({"DATA.BATCH_SIZE": batch_size, "DATA.IMG_SIZE": image_size}).cfg
    return compile_mode(cfg, World(0, processes, device))
