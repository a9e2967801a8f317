"""One epoch of training."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from repopt.engine.precision import Precision


@dataclass(frozen=True)
class Progress:
    """What is known when `batch` of `batches` is done; the numbers are means since the last report.

    Attributes:
        step: optimizer steps since training began.
        loss: of this process.
        grad_norm: of the last step, before clipping; None where nothing is clipped.
        images_per_second: of this process.
    """

    batch: int
    batches: int
    step: int
    loss: float
    learning_rate: float
    grad_norm: float | None
    images_per_second: float


def count_steps(batches: int, accumulation_steps: int) -> int:
    """Optimizer steps in an epoch; the last one takes what is left."""
    return -(-batches // accumulation_steps)


def train_one_epoch(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    criterion: Callable[[Tensor, Tensor], Tensor],
    optimizer: torch.optim.Optimizer,
    *,
    batches: int,
    first_step: int = 0,
    precision: Precision,
    accumulation_steps: int = 1,
    clip: Callable[[], Tensor] | None = None,
    before_step: Callable[[int], object] = lambda step: None,
    after_step: Callable[[int], object] = lambda step: None,
    after_batch: Callable[[], object] = lambda: None,
    report: Callable[[Progress], object] = lambda progress: None,
    report_every: int = 10,
) -> float:
    """Train on every batch of a loader once; the host waits for the device only where something is reported.

    Args:
        model: plain or wrapped in DDP.
        loader: (images, targets) on the device, `batches` of them.
        criterion: mean loss of a batch.
        first_step: optimizer steps before this epoch.
        accumulation_steps: batches per optimizer step; the last step takes what is left.
        clip: clips the gradients and returns their norm.
        before_step: called with the number of the coming optimizer step (a schedule's ``step_update``).
        after_step: called with the optimizer steps done (a moving average's update).
        after_batch: called without arguments (a progress bar).
        report: called every `report_every` batches and after the last.

    Returns:
        The mean loss of this process over the epoch.
    """
    model.train()
    step, images_seen, batches_seen, started = first_step, 0, 0, time.perf_counter()
    norm = None
    total = recent = torch.zeros((), device=precision.device)
    for batch, (images, targets) in enumerate(loader, start=1):
        window = min(accumulation_steps, batches - (batch - 1) // accumulation_steps * accumulation_steps)
        last_of_window = batch % accumulation_steps == 0 or batch == batches
        waits = isinstance(model, DistributedDataParallel) and not last_of_window
        with model.no_sync() if waits else nullcontext():
            with precision.autocast():
                loss = criterion(model(images), targets)
            precision.scaler.scale(loss / window).backward()
        if last_of_window:
            before_step(step)
            if clip is not None:
                precision.scaler.unscale_(optimizer)
                norm = clip()
            precision.scaler.step(optimizer)
            precision.scaler.update()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            after_step(step)
        recent = recent + loss.detach()
        images_seen, batches_seen = images_seen + len(images), batches_seen + 1
        after_batch()
        if batch % report_every == 0 or batch == batches:
            total = total + recent
            mean = recent.item() / batches_seen  # waits for the device, so the clock is read after it
            seconds = time.perf_counter() - started
            report(
                Progress(
                    batch=batch,
                    batches=batches,
                    step=step,
                    loss=mean,
                    learning_rate=optimizer.param_groups[0]["lr"],
                    grad_norm=None if norm is None else norm.item(),
                    images_per_second=images_seen / seconds,
                )
            )
            recent = torch.zeros_like(recent)
            images_seen, batches_seen, started = 0, 0, time.perf_counter()
    return total.item() / batches if batches else math.nan
