"""One epoch of training."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from train.precision import Precision
from train.safeguard import Safeguard

Forward = Callable[[nn.Module, Any, Any], Any]
"""Calls a model in training with the images and targets of a batch."""


def images_alone(model: nn.Module, images: Any, targets: Any) -> Any:
    """As classifiers take them."""
    return model(images)


@dataclass(frozen=True)
class Progress:
    """What is known when `batch` of `batches` is done; the numbers are means since the last report.

    Attributes:
        batch, batches: of the epoch.
        step: optimizer steps since training began.
        loss: of this process, where it was finite.
        grad_norm: of the last step, before clipping; None where nothing is clipped.
        images_per_second: of this process.
        skipped, skipped_in_a_row: steps that were left out because something was not finite, in all and at last.
    """

    batch: int
    batches: int
    step: int
    loss: float
    learning_rate: float
    grad_norm: float | None
    images_per_second: float
    skipped: int
    skipped_in_a_row: int


def count_steps(batches: int, accumulation_steps: int) -> int:
    """Optimizer steps in an epoch; the last one takes what is left."""
    return -(-batches // accumulation_steps)


def train_one_epoch(
    model: nn.Module,
    loader: Iterable[tuple[Any, Any]],
    criterion: Callable[[Any, Any], Tensor],
    optimizer: torch.optim.Optimizer,
    *,
    forward: Forward = images_alone,
    batches: int,
    first_batch: int = 0,
    first_step: int = 0,
    precision: Precision,
    safeguard: Safeguard | None = None,
    accumulation_steps: int = 1,
    clip: Callable[[], Tensor] | None = None,
    before_batch: Callable[[int], object] = lambda done: None,
    before_step: Callable[[int], object] = lambda step: None,
    after_step: Callable[[int, int], object] = lambda step, done: None,
    after_batch: Callable[[], object] = lambda: None,
    report: Callable[[Progress], object] = lambda progress: None,
    report_every: int = 10,
) -> float:
    """Train on every batch of a loader once; the host waits for the device only where something is reported.

    Args:
        model: plain or wrapped in DDP.
        loader: (images, targets) on the device; the batches of the epoch that are left.
        criterion: mean loss of a batch, of what `forward` gives and the targets.
        forward: calls the model.
        batches: of the whole epoch.
        first_batch: batches of the epoch that are done already.
        first_step: optimizer steps before the first of these batches.
        safeguard: leaves out steps that are not finite; one of its own where none is given.
        accumulation_steps: batches per optimizer step; the last step takes what is left.
        clip: clips the gradients and returns their norm.
        before_batch: called with the batches done here.
        before_step: called with the number of the coming optimizer step (a schedule's ``step_update``).
        after_batch: called without arguments (a progress bar).
        report: called every `report_every` batches and after the last.
        after_step: called last, with the optimizer steps done since training began, and the batches done here (a moving
            average's update, a checkpoint).

    Returns:
        The mean loss of this process over these batches, as far as it was finite (NaN if nowhere).
    """
    model.train()
    safeguard = safeguard or Safeguard(model, optimizer, precision.device)
    safeguard.keep()
    step, left, images_seen, started = first_step, batches - first_batch, 0, time.perf_counter()
    norm = None
    total = recent = torch.zeros(2, device=precision.device)  # sum of the finite losses, and how many they are
    for done, (images, targets) in enumerate(loader, start=1):
        before_batch(done - 1)
        window = min(accumulation_steps, left - (done - 1) // accumulation_steps * accumulation_steps)
        last_of_window = done % accumulation_steps == 0 or done == left
        waits = isinstance(model, DistributedDataParallel) and not last_of_window
        with model.no_sync() if waits else nullcontext():
            with precision.autocast():
                loss = criterion(forward(model, images, targets), targets)
            precision.scaler.scale(safeguard.poison(loss) / window).backward()
        if last_of_window:
            before_step(step)
            precision.scaler.unscale_(optimizer)
            norm = None if clip is None else clip()
            safeguard.step(norm)
            precision.scaler.update()
            optimizer.zero_grad(set_to_none=True)
            step += 1
        loss = loss.detach()
        finite = torch.isfinite(loss)
        recent = recent + torch.stack([torch.where(finite, loss, 0.0), finite])
        images_seen += len(images)
        after_batch()
        if (first_batch + done) % report_every == 0 or done == left:
            total = total + recent
            mean = _mean(recent)  # waits for the device, so the clock is read after it
            seconds = time.perf_counter() - started
            skipped, in_a_row = safeguard.skipped()
            report(
                Progress(
                    batch=first_batch + done,
                    batches=batches,
                    step=step,
                    loss=mean,
                    learning_rate=optimizer.param_groups[0]["lr"],
                    grad_norm=None if norm is None else norm.item(),
                    images_per_second=images_seen / seconds,
                    skipped=skipped,
                    skipped_in_a_row=in_a_row,
                )
            )
            recent = torch.zeros_like(recent)
            images_seen, started = 0, time.perf_counter()
        if last_of_window:
            after_step(step, done)
    return _mean(total)


def _mean(sum_and_count: Tensor) -> float:
    total, count = sum_and_count.tolist()
    return total / count if count else math.nan
