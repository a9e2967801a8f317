"""Where and in which number and memory format a model runs."""

from __future__ import annotations

import torch
from torch import nn
from yacs.config import CfgNode

from train.distributed import World
from train.precision import Precision


def to_device(model: nn.Module, world: World) -> nn.Module:
    """Return the model on its device, in the memory format in which it runs."""
    return model.to(world.device).to(memory_format=memory_format_of(world))


def memory_format_of(world: World) -> torch.memory_format:
    """Return channels_last on GPUs, whose tensor cores it feeds."""
    return torch.channels_last if world.device.type == "cuda" else torch.contiguous_format


def precision_of(cfg: CfgNode, world: World) -> Precision:
    """Return what AMP_OPT_LEVEL asks for: O0 is fp32, O1 and O2 autocast; unasked, autocast on GPUs, fp32 on CPUs."""
    level = cfg.AMP_OPT_LEVEL or ("O1" if world.device.type == "cuda" else "O0")
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[cfg.AMP_DTYPE]
    return Precision(world.device, None if level == "O0" else dtype)
