"""In which number and memory format a network is measured: those of a training that asks for nothing else."""

from __future__ import annotations

import torch

from train import config
from train.distributed import World
from train.placement import memory_format_of, precision_of
from train.precision import Precision


def precision_on(device: torch.device) -> Precision:
    """Autocast to bf16 on GPUs, fp32 on CPUs, where bf16 convolutions of this torch have corrupted memory."""
    return precision_of(config.build({}).cfg, World(0, 1, device))


def memory_format_on(device: torch.device) -> torch.memory_format:
    """channels_last on GPUs."""
    return memory_format_of(World(0, 1, device))
