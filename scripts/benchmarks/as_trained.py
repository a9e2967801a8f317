"""What the benchmarks take of train/: networks as a training runs them that asks for nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from yacs.config import CfgNode

from data import Loader
from train import build, config, placement
from train.checkpoint import RunFolder
from train.compilation import COMPILE_MODES, compiled
from train.distributed import World
from train.evaluation.classification import evaluate
from train.nonfinite import NonFiniteGuard
from train.parallel import data_parallel
from train.precision import Precision
from train.schedule import build_schedule
from train.state import TrainingState
from train.tasks.classify import Classify
from train.trainer import Trainer

__all__ = ["NonFiniteGuard", "Precision", "data_parallel", "evaluate"]
MODES = ("off", *COMPILE_MODES)
AS_IN_TRAINING = "as TRAIN.COMPILE auto chooses"


def precision_on(device: torch.device) -> Precision:
    """Return autocast to bf16 on GPUs, fp32 on CPUs, where bf16 convolutions of this torch have corrupted memory."""
    return placement.precision_of(config.build({}).cfg, World(0, 1, device))


def memory_format_on(device: torch.device) -> torch.memory_format:
    """Return channels_last on GPUs."""
    return placement.memory_format_of(World(0, 1, device))


def to_device(model: nn.Module, device: torch.device) -> nn.Module:
    """Return the model on a device, in its memory format."""
    return placement.to_device(model, World(0, 1, device))


def mode_on(device: torch.device, batch_size: int, image_size: int, processes: int = 1) -> str:
    """Return the mode of torch.compile that a training chooses which asks for none."""
    cfg = config.build({"DATA.BATCH_SIZE": batch_size, "DATA.IMG_SIZE": image_size}).cfg
    return build.compile_mode(cfg, World(0, processes, device))


def under(mode: str, model: nn.Module, device: torch.device) -> nn.Module:
    """Return the model as `TRAIN.COMPILE` of this value trains it."""
    return model if mode == "off" else compiled(model, device, mode)


def trainer_of(
    cfg: CfgNode,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loader: Loader,
    device: torch.device,
    *,
    compile_mode: str,
    clip: Callable[[], Tensor],
) -> Trainer:
    """Return what trains a classifier by a configuration, at a learning rate that stays as it is."""
    schedule = build_schedule(optimizer, "cosine", steps_per_epoch=10**9, epochs=1, warmup_steps=0)
    state = TrainingState(model, optimizer, schedule, precision_on(device))
    task = Classify(cfg, World(0, 1, device))
    return Trainer(task, state, loader, (), RunFolder(Path()), model=under(compile_mode, model, device), clip=clip)
