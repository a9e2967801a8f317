"""What the benchmarks take of train/: networks as a training runs them that asks for nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from train import build, config, placement
from train.compilation import COMPILE_MODES, compiled
from train.distributed import World
from train.epoch import train_one_epoch
from train.evaluation.classification import evaluate
from train.parallel import data_parallel
from train.precision import Precision
from train.safeguard import Safeguard

__all__ = ["Precision", "Safeguard", "data_parallel", "evaluate"]
MODES = ("off", *COMPILE_MODES)
AS_IN_TRAINING = "as TRAIN.COMPILE auto chooses"


def precision_on(device: torch.device) -> Precision:
    """Return autocast to bf16 on GPUs, fp32 on CPUs, where bf16 convolutions of this torch have corrupted memory."""
    return placement.precision_of(config.build({}).cfg, World(0, 1, device))


def memory_format_on(device: torch.device) -> torch.memory_format:
    """Return channels_last on GPUs."""
    return placement.memory_format_of(World(0, 1, device))


def mode_on(device: torch.device, batch_size: int, image_size: int, processes: int = 1) -> str:
    """Return the mode of torch.compile that a training chooses which asks for none."""
    cfg = config.build({"DATA.BATCH_SIZE": batch_size, "DATA.IMG_SIZE": image_size}).cfg
    return build.compile_mode(cfg, World(0, processes, device))


def under(mode: str, model: nn.Module, device: torch.device) -> nn.Module:
    """Return the model as `TRAIN.COMPILE` of this value trains it."""
    return model if mode == "off" else compiled(model, device, mode)


def train_epoch(
    model: nn.Module,
    loader: Iterable[tuple[Any, Any]],
    criterion: nn.Module,
    optimizer: torch.optim.Optimizer,
    clip: Callable[[], Tensor],
    *,
    batches: int,
    device: torch.device,
) -> None:
    """Train on so many batches with everything that a training does, reports and skipped steps among it."""
    precision = precision_on(device)
    train_one_epoch(model, loader, criterion, optimizer, batches=batches, precision=precision, clip=clip)
