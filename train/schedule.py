"""Learning-rate schedules by optimizer step (timm's), with linear warm-up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.scheduler import CosineLRScheduler, MultiStepLRScheduler, PolyLRScheduler, StepLRScheduler
from timm.scheduler.scheduler import Scheduler

from repopt.errors import unknown


def build_schedule(
    optimizer: torch.optim.Optimizer,
    name: str,
    *,
    steps_per_epoch: int,
    epochs: int,
    warmup_steps: int,
    warmup_lr: float = 0.0,
    min_lr: float = 0.0,
    decay_epochs: int = 30,
    decay_rate: float = 0.1,
    milestones: Sequence[int] = (),
    power: float = 1.0,
) -> Scheduler:
    """Build a schedule whose ``step_update(step)`` sets the learning rate of the optimizer step that comes next.

    Args:
        optimizer: its learning rate is where the warm-up ends.
        name: "cosine", "linear" or "poly" (from the start of training to min_lr at its end; "poly" by `power` of what
            is left), "step" (times decay_rate every decay_epochs) or "multistep" (times decay_rate after each of the
            epochs in `milestones`).
        steps_per_epoch: optimizer steps, not batches.
        warmup_steps: of them, at the beginning.
        warmup_lr, min_lr: scaled as the optimizer's learning rate is.

    Raises:
        UserError: an unknown name.
    """
    total = epochs * steps_per_epoch
    warmup: dict[str, Any] = {
        "warmup_t": warmup_steps,
        "warmup_lr_init": warmup_lr,
        "warmup_prefix": False,  # the schedule runs on beneath the warm-up
        "t_in_epochs": False,
    }
    if name == "cosine":
        return CosineLRScheduler(optimizer, t_initial=total, lr_min=min_lr, **warmup)
    if name in ("linear", "poly"):
        power = power if name == "poly" else 1.0
        return PolyLRScheduler(optimizer, t_initial=total, lr_min=min_lr, power=power, **warmup)
    if name == "step":
        return StepLRScheduler(optimizer, decay_t=decay_epochs * steps_per_epoch, decay_rate=decay_rate, **warmup)
    if name == "multistep":
        steps = [epoch * steps_per_epoch + 1 for epoch in sorted(milestones)]  # timm's come a step early
        return MultiStepLRScheduler(optimizer, decay_t=steps, decay_rate=decay_rate, **warmup)
    raise unknown("schedule", name, ("cosine", "linear", "poly", "step", "multistep"))
