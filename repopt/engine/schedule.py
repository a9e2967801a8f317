"""Learning-rate schedules by optimizer step (timm's), with linear warm-up."""

from __future__ import annotations

import torch
from timm.scheduler import CosineLRScheduler, PolyLRScheduler, StepLRScheduler
from timm.scheduler.scheduler import Scheduler

from repopt.errors import unknown


def build_schedule(
    optimizer: torch.optim.Optimizer,
    name: str,
    *,
    steps_per_epoch: int,
    epochs: int,
    warmup_epochs: int,
    warmup_lr: float = 0.0,
    min_lr: float = 0.0,
    decay_epochs: int = 30,
    decay_rate: float = 0.1,
) -> Scheduler:
    """A schedule whose ``step_update(step)`` sets the learning rate of the optimizer step that comes next.

    Args:
        optimizer: its learning rate is where the warm-up ends.
        name: "cosine" or "linear" (from the start of training to min_lr at its end), or "step" (times decay_rate
            every decay_epochs).
        steps_per_epoch: optimizer steps, not batches.
        warmup_lr, min_lr: scaled as the optimizer's learning rate is.

    Raises:
        UserError: an unknown name.
    """
    total = epochs * steps_per_epoch
    warmup = {
        "warmup_t": warmup_epochs * steps_per_epoch,
        "warmup_lr_init": warmup_lr,
        "warmup_prefix": False,  # the schedule runs on beneath the warm-up
        "t_in_epochs": False,
    }
    if name == "cosine":
        return CosineLRScheduler(optimizer, t_initial=total, lr_min=min_lr, **warmup)
    if name == "linear":
        return PolyLRScheduler(optimizer, t_initial=total, lr_min=min_lr, power=1.0, **warmup)
    if name == "step":
        return StepLRScheduler(optimizer, decay_t=decay_epochs * steps_per_epoch, decay_rate=decay_rate, **warmup)
    raise unknown("schedule", name, ("cosine", "linear", "step"))
