"""A whole training: epoch after epoch, evaluated, logged and saved on the way."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from timm.utils import distribute_bn
from torch import Tensor, nn
from tqdm import tqdm

from repopt import checkpoint
from repopt.distributed import World
from repopt.engine.evaluate import Evaluation, evaluate
from repopt.engine.state import TrainingState
from repopt.engine.train import Progress, count_steps, train_one_epoch
from repopt.errors import UserError
from repopt.logging import Metrics, logger
from repopt.reparam import extract_scales
from repopt.scales import save_scales


class Loader(Protocol):
    """Batches (images, targets) on the device; which ones may depend on the epoch."""

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]: ...
    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that is iterated next."""


def fit(
    state: TrainingState,
    model: nn.Module,
    train_loader: Loader,
    val_loader: Loader,
    criterion: Callable[[Tensor, Tensor], Tensor],
    *,
    epochs: int,
    folder: Path,
    config: Mapping[str, Any],
    world: World,
    seed: int = 0,
    searching: bool = False,
    clip: Callable[[], Tensor] | None = None,
    accumulation_steps: int = 1,
    ema_update_period: int = 1,
    eval_period: int = 1,
    save_period: int = 20,
    print_period: int = 10,
) -> None:
    """Train from the epoch of `state` to the last.

    Args:
        state: updated in place.
        model: ``state.model``, or what wraps it for training (DDP).
        train_loader, val_loader: of this process.
        epochs: in all, those already done included.
        folder: where the first process writes checkpoints, metrics, and (searching) the scales.
        config: goes into every checkpoint.
        seed: of dropout, which differs by epoch and process, and is the same after resuming.
        searching: whether the model's scales are being searched.
        clip: clips the gradients and returns their norm.
        ema_update_period: optimizer steps between updates of the moving average.
        eval_period, save_period: in epochs; the last one is always evaluated and saved.
        print_period: in batches.

    Raises:
        UserError: the loss is no longer finite; what was saved before stays.
    """
    batches = len(train_loader)
    steps_per_epoch = count_steps(batches, accumulation_steps)
    first_epoch, started = state.epoch, time.perf_counter()
    bar = tqdm(
        total=epochs * batches,
        initial=first_epoch * batches,
        unit="batch",
        disable=None if world.is_main else True,  # None: shown only on a terminal
    )

    def update_average(step: int) -> None:
        if state.ema is not None and step % ema_update_period == 0:
            state.ema.update(state.model)

    def report(epoch: int, progress: Progress) -> None:
        done = epoch - first_epoch + progress.batch / batches
        left = timedelta(seconds=round((time.perf_counter() - started) / done * (epochs - first_epoch - done)))
        speed = progress.images_per_second * world.size
        norm = "" if progress.grad_norm is None else f" grad norm {progress.grad_norm:.3f}"
        logger.info(
            f"epoch {epoch + 1}/{epochs} batch {progress.batch}/{batches} loss {progress.loss:.4f} "
            f"lr {progress.learning_rate:.5f}{norm} {speed:.0f} images/s ETA {left}"
        )
        numbers = {"loss": progress.loss, "learning_rate": progress.learning_rate, "images_per_second": speed}
        metrics.write(progress.step, train=numbers)

    with Metrics(folder if world.is_main else None) as metrics, bar:
        for epoch in range(first_epoch, epochs):
            train_loader.set_epoch(epoch)
            torch.manual_seed(int(np.random.SeedSequence((seed, epoch, world.rank)).generate_state(1)[0]))
            epoch_started = time.perf_counter()
            loss = train_one_epoch(
                model,
                train_loader,
                criterion,
                state.optimizer,
                batches=batches,
                first_step=epoch * steps_per_epoch,
                precision=state.precision,
                accumulation_steps=accumulation_steps,
                clip=clip,
                before_step=state.schedule.step_update,
                after_step=update_average,
                after_batch=bar.update,
                report=functools.partial(report, epoch),
                report_every=print_period,
            )
            if not math.isfinite(loss) and not state.precision.scaler.is_enabled():  # a scaler skips such steps
                raise UserError(
                    f"the training diverged in epoch {epoch + 1}: its loss is {loss}; a lower learning rate or "
                    f"clipped gradients may help, and the checkpoints in {folder} are from before"
                )
            state.epoch = epoch + 1
            numbers: dict[str, Any] = {"epoch": state.epoch, "train_seconds": time.perf_counter() - epoch_started}
            if world.size > 1:
                for averaged in state.models().values():
                    distribute_bn(averaged, world.size, reduce=True)

            last = state.epoch == epochs
            names = []
            if state.epoch % save_period == 0 or last:
                names.append(f"ckpt_epoch_{epoch}.pth")
            if state.epoch % eval_period == 0 or last:
                results = _evaluate(state, val_loader)
                numbers |= {key: result._asdict() for key, result in results.items()}
                names += _new_bests(state, results)
            if not world.is_main:
                continue
            if searching:
                scales = extract_scales(state.model)
                numbers["scales"] = {name: values.mean().item() for name, values in scales.items()}
                save_scales(scales, folder / "scales.pth")
            metrics.write(state.epoch * steps_per_epoch, **numbers)
            content = state.content(config)
            for name in (*names, "latest.pth"):  # last: it claims the best accuracy, so the best has to be there
                checkpoint.write(content, folder / name)
    logger.info(f"best top-1 {state.max_accuracy:.3f} %, checkpoints in {folder}")


def _evaluate(state: TrainingState, loader: Loader) -> dict[str, Evaluation]:
    """Evaluations of the model ("val") and of its moving average ("ema") where there is one."""
    results = {}
    for key, model in state.models().items():
        results[key] = evaluate(model, loader, state.precision)
        logger.info(f"epoch {state.epoch} {key}: {results[key]}")
    return results


def _new_bests(state: TrainingState, results: Mapping[str, Evaluation]) -> list[str]:
    """Checkpoints to write because an accuracy is the best so far; the state remembers it."""
    names = []
    if results["val"].top1 > state.max_accuracy:
        state.max_accuracy = results["val"].top1
        names.append("best_ckpt.pth")
    if "ema" in results and results["ema"].top1 > state.max_ema_accuracy:
        state.max_ema_accuracy = results["ema"].top1
        names.append("best_ema_ckpt.pth")
    return names
