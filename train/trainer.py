"""The training loop: from where a `TrainingState` stands to the last epoch, evaluated, logged and saved on the way."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from data import Loader, seeding
from repopt.errors import UserError
from repopt.optim import BranchOptimizer
from repopt.reparam import needs_branches
from repopt.scales import extract_scales, save_scales
from train import config
from train.checkpoint import RunFolder
from train.distributed import AsyncMax, gather
from train.evaluation.base import Result
from train.interruption import Interrupted, Request, stop_requests
from train.logging import Metrics, logger
from train.nonfinite import NonFiniteGuard
from train.parallel import average_statistics
from train.search import movement, problems, search_is_over, start_of_search
from train.state import TrainingState, count_steps
from train.tasks.base import Task

CONTINUE, SAVE, STOP = range(3)  # what a process votes for after a step


class Trainer:
    """Trains a network; `fit` does it.

    A training that is stopped and restored ends with the same weights as one that never was, bit for bit where the
    device's operations are deterministic: everything random follows from the seed and the place in the training. That
    rests on an order, the same in every process:

    - after a step: moving average, vote (does any process have to stop, is it time to save?), checkpoint;
    - after an epoch: vote, statistics of batch norms averaged over the processes, evaluation, scales, metrics,
      checkpoint. What is saved for a stop before or within the evaluation are the statistics from before the average.

    Args:
        task: the loss, the forward pass and the evaluation, with the configuration and this process.
        state: updated in place.
        train_loader, val_loader: of this process.
        folder: where the first process writes checkpoints, metrics, and (in a hyper-search) the scales.
        model: what computes in training: ``state.model``, or what stands for it, in DDP or compiled.
        frozen: modules of the network that stay in eval mode.
        clip: clips the gradients and returns their norm before; None = no clipping, or the optimizer does it.
        added_loss: gives what is added to the loss of a batch that the network has just seen; None = nothing.
    """

    def __init__(
        self,
        task: Task,
        state: TrainingState,
        train_loader: Loader,
        val_loader: Iterable[tuple[Any, Any]],
        folder: RunFolder,
        *,
        model: nn.Module | None = None,
        frozen: Sequence[nn.Module] = (),
        clip: Callable[[], Tensor] | None = None,
        added_loss: Callable[[], Tensor] | None = None,
    ) -> None:
        self.task, self.cfg, self.world = task, task.cfg, task.world
        self.state, self.folder = state, folder
        self.train_loader, self.val_loader = train_loader, val_loader
        self.model = state.model if model is None else model
        self.clip, self.frozen, self.added_loss = clip, frozen, added_loss
        self.guard = NonFiniteGuard(state.model, state.optimizer, state.precision.device)
        self.metrics = Metrics(None)
        train_loader.set_epoch(state.epoch)
        self._batches = len(train_loader)  # of a whole epoch
        self._steps_per_epoch = count_steps(self._batches, self.cfg.TRAIN.ACCUMULATION_STEPS)
        self._skipped_before = state.skipped
        self._vote, self._request, self._saved_at = AsyncMax(), Request(), time.monotonic()
        self._bar, self._eta = tqdm(disable=True), _Eta(0, self._batches)
        if state.seen:
            train_loader.set_epoch(state.epoch, state.seen)
            logger.info(f"epoch {state.epoch + 1} goes on behind {train_loader.images_seen} images")

    def fit(self) -> None:
        """Train to the last epoch.

        Raises:
            UserError: the training has diverged, or a file cannot be written; what was saved before stays.
            Interrupted: a process was asked to stop by a signal; everything is saved.
        """
        cfg, state = self.cfg, self.state
        if step := self._first_step():
            state.schedule.step_update(step - 1)  # if no step is left, its learning rate is what is kept
        total, done = (epochs * self._batches for epochs in (cfg.TRAIN.EPOCHS, state.epoch))
        done += self._batches_done()
        # disable=None: shown only on a terminal
        self._bar = tqdm(total=total, initial=done, unit="batch", disable=None if self.world.is_main else True)
        self._eta = _Eta(done, total)
        self.metrics = Metrics(
            self.folder.path if self.world.is_main else None, epochs=state.epoch, images=self._images(0), step=step
        )
        with stop_requests() as self._request, self.metrics, self._bar:
            while state.epoch < cfg.TRAIN.EPOCHS:
                if search_is_over(cfg, state.epoch, settled=state.settled):
                    self.freeze_scales()
                self.fit_epoch()
        self.folder.wait()
        logger.info(f"best {self.task.metric_name} {state.max_accuracy:.3f} %, checkpoints in {self.folder.path}")

    def searched_scales(self) -> dict[str, Tensor] | None:
        """Return the scales as they are, where they are being searched."""
        optimizer = self.state.optimizer
        if not isinstance(optimizer, BranchOptimizer) or not optimizer.searching:
            return None
        return extract_scales(self.model, optimizer.branches)

    def freeze_scales(self) -> None:
        """Make constants of the scales, unless they are: the rest is the training of a target with these scales.

        Nothing else changes, neither the model nor what wraps it. Under SGD a RepOptimizer takes over.
        """
        state, scales = self.state, self.searched_scales()
        if scales is None:
            return
        assert isinstance(state.optimizer, BranchOptimizer)
        state.optimizer.freeze_scales()
        state.scales, state.searched = scales, {}
        if self.cfg.TRAIN.OPTIMIZER.NAME == "sgd" and not needs_branches("sgd", self.model):
            state.optimizer = state.optimizer.collapsed(implementation=self.cfg.TRAIN.OPTIMIZER.IMPLEMENTATION)
            state.schedule.optimizer = state.optimizer
        self._skipped_before = state.skipped
        self.guard = NonFiniteGuard(state.model, state.optimizer, state.precision.device)
        if self.world.is_main and scales:
            save_scales(scales, self.folder.path / "scales.pth")
        logger.info(f"scales are constants from epoch {state.epoch + 1} on")

    def _observe_search(self, scales: Mapping[str, Tensor], fall: float | None) -> dict[str, Any]:
        """Keep the scales that an epoch has found, warn where they look wrong, and return what is recorded of them."""
        cfg, state = self.cfg, self.state
        start = start_of_search(state.model)
        moved = movement(start, state.searched, scales)
        state.searched, state.settled = scales, moved.settled
        over = state.epoch == cfg.TRAIN.EPOCHS or search_is_over(cfg, state.epoch, settled=state.settled)
        for problem in problems(start, scales, fall=fall, over=moved if over else None):
            logger.warning(problem)
        if self.world.is_main and scales:
            save_scales(scales, self.folder.path / "scales.pth")
        means = {name: values.mean().item() for name, values in scales.items()}
        return {"scales": means, "search": moved._asdict()}

    def fit_epoch(self) -> None:
        """Train what is left of an epoch, evaluate, and save."""
        cfg, state, loader, started = self.cfg, self.state, self.train_loader, time.perf_counter()
        self.train_epoch()
        numbers: dict[str, Any] = {"epoch": state.epoch + 1, "train_seconds": time.perf_counter() - started}
        if unreadable := sum(gather(len(loader.unreadable))):
            logger.warning(f"{unreadable} training images could not be read so far, and others took their places")
            numbers["unreadable_images"] = unreadable
        position, buffers = loader.position_after(len(loader)), self._buffers()  # before they are averaged
        decision = self._vote.sync(self._wish())
        if decision == STOP:
            self._stop(position, buffers)
        if self.world.size > 1:
            for averaged in state.models().values():
                average_statistics(averaged)
        last = state.epoch + 1 == cfg.TRAIN.EPOCHS
        names, fall = [], None
        if (state.epoch + 1) % cfg.TEST.PERIOD == 0 or last:
            results = self.evaluate()
            if results is None:
                self._stop(position, buffers)
            numbers |= {key: result.numbers() for key, result in results.items()}
            fall = state.max_accuracy - results["val"].score
            names = state.new_bests({key: result.score for key, result in results.items()})
        state.epoch, state.seen = state.epoch + 1, ()
        if state.epoch % cfg.SAVE_FREQ == 0 or last:
            names.append(f"ckpt_epoch_{state.epoch - 1}.pth")
        self._check_finite()
        if scales := self.searched_scales():
            numbers |= self._observe_search(scales, fall)
        self.metrics.write(state.epoch * self._steps_per_epoch, state.epoch * loader.num_images, **numbers)
        if names or decision == SAVE or not cfg.SAVE_EVERY_MINUTES:
            self._save(names)
        if not last:
            loader.set_epoch(state.epoch)

    def train_epoch(self) -> float:
        """Train on what is left of an epoch; the host waits for the device only where something is reported.

        Returns:
            The mean loss of this process over these batches, as far as it was finite (NaN if nowhere).
        """
        cfg, accumulation = self.cfg, self.cfg.TRAIN.ACCUMULATION_STEPS
        self.model.train()
        for module in self.frozen:
            module.eval()
        self.guard.snapshot_buffers()
        self._done, self._first = 0, self._batches_done()  # batches of this iteration, and of the epoch before it
        self._recent, total = _Average(self.state.precision.device), _Average(self.state.precision.device)
        step, left, batches = self._first_step(), len(self.train_loader), iter(self.train_loader)
        while left:
            size = min(accumulation, left)
            self.state.schedule.step_update(step)
            self.train_step(itertools.islice(batches, size), size)
            step, left = step + 1, left - size
            self._bar.update(size)
            done = self._first + self._done
            if not left or done // cfg.PRINT_FREQ > (done - size) // cfg.PRINT_FREQ:
                total.add(self._recent.sums)
                self.report(step)
            self._after_step(step)
        next(batches, None)  # the loader comes to its end
        return total.mean()

    def train_step(self, window: Iterable[tuple[Any, Any]], size: int) -> None:
        """Do one step of the optimizer on the mean gradient of `size` batches."""
        optimizer, precision = self.state.optimizer, self.state.precision
        optimizer.zero_grad(set_to_none=True)
        for number, (images, targets) in enumerate(window, start=1):
            self._seed_batch()
            with self._no_sync() if number < size else nullcontext():
                with precision.autocast():
                    outputs = self.task.forward(self.model, images, targets)
                    loss = self.task.criterion(outputs, targets)
                    if self.added_loss is not None:
                        loss = loss + self.added_loss()
                precision.scaler.scale(self.guard.nan_if_not_finite(loss) / size).backward()
            self._recent.add_loss(loss.detach(), len(images))
            self._done += 1
        precision.scaler.unscale_(optimizer)
        self.norm = self.clip() if self.clip else None
        self.guard.step(self.norm)
        if self.clip is None:  # a RepOptimizer clips by itself, as one that holds branches does
            self.norm = getattr(optimizer, "norm", None)
        precision.scaler.update()

    def evaluate(self) -> dict[str, Result] | None:
        """Evaluate the model and its moving average; None where a process was asked to stop meanwhile."""
        results: dict[str, Result] = {}
        for key, model in self.state.models().items():
            result = self.task.evaluate(model, self.val_loader, self.state.precision, stops=lambda: self._request)
            if result is None:
                return None
            logger.info(f"epoch {self.state.epoch + 1} {key}: {result}")
            results[key] = result
        return results

    def report(self, step: int) -> None:
        """Log and write what was measured since the last report, up to an optimizer step.

        Raises:
            UserError: too many steps were skipped in a row.
        """
        cfg, epoch, done = self.cfg, self.state.epoch, self._first + self._done
        loss = self._recent.mean()  # waits for the device, so the clock is read after it
        speed = self._recent.images_per_second() * self.world.size
        skipped, in_a_row = self.guard.skipped()
        if in_a_row >= cfg.TRAIN.MAX_SKIPPED_STEPS:
            raise UserError(
                f"the training diverged in epoch {epoch + 1}: loss or gradients were not finite in {in_a_row} steps in "
                f"a row, up to step {step}; {self._last_good()}"
            )
        optimizer = self.state.optimizer
        rate = max(group["lr"] for group in optimizer.param_groups)
        numbers = {"loss": loss, "learning_rate": rate, "images_per_second": speed}
        if cfg.TRAIN.SEARCH_EPOCHS:
            numbers["searching"] = int(isinstance(optimizer, BranchOptimizer) and optimizer.searching)
        numbers["skipped_steps"] = skipped = self._skipped_before + skipped
        notes = f" skipped {skipped}" if skipped else ""
        if self.norm is not None:
            numbers["grad_norm"] = self.norm.item()
            notes = f" grad norm {numbers['grad_norm']:.3f}{notes}"
        logger.info(
            f"epoch {epoch + 1}/{cfg.TRAIN.EPOCHS} batch {done}/{self._batches} loss {loss:.4f} lr {rate:.5f}{notes} "
            f"{speed:.0f} images/s ETA {self._eta(epoch * self._batches + done)}"
        )
        self.metrics.write(step, self._images(self._done), train=numbers)
        self._recent = _Average(self.state.precision.device)

    def _no_sync(self) -> AbstractContextManager[object]:
        """Let DDP exchange no gradients: those of a window's other batches are still to come."""
        return self.model.no_sync() if isinstance(self.model, DistributedDataParallel) else nullcontext()

    def _seed_batch(self) -> None:
        """Let what the model draws (dropout) follow from the seed and the place of this process's batch."""
        of_process = self.world.rank * (self.train_loader.images_per_batch // self.world.size)
        images = self.train_loader.images_seen + self._done * self.train_loader.images_per_batch + of_process
        seeding.reseed(self.cfg.SEED, self.state.epoch, seeding.MODEL, images, device=self.world.device)

    def _batches_done(self) -> int:
        """Batches of the chosen epoch before this iteration, counted in batches of this number of processes."""
        return self._batches - len(self.train_loader)

    def _first_step(self) -> int:
        """Optimizer steps before those of this iteration, as they are counted now."""
        per_step = self.train_loader.images_per_batch * self.cfg.TRAIN.ACCUMULATION_STEPS
        return self.state.epoch * self._steps_per_epoch + count_steps(self.train_loader.images_seen, per_step)

    def _images(self, batches: int) -> int:
        """Images of all epochs up to so many batches of this iteration: a measure of progress for any batch size."""
        loader = self.train_loader
        return self.state.epoch * loader.num_images + loader.images_seen + batches * loader.images_per_batch

    def _after_step(self, step: int) -> None:
        """Update the moving average; save where it is time to, or where a process was asked to stop."""
        cfg, ema = self.cfg, self.state.ema
        if ema is not None and step % cfg.TRAIN.EMA_UPDATE_PERIOD == 0:
            ema.update(self.state.model)
        decision = self._vote.push(self._wish())
        if decision == STOP:
            self._stop(self.train_loader.position_after(self._done), self._buffers())
        if decision == SAVE or (cfg.SAVE_EVERY_STEPS and step % cfg.SAVE_EVERY_STEPS == 0):
            self._save_within_epoch(self.train_loader.position_after(self._done), self._buffers())

    def _wish(self) -> int:
        """Return what this process votes for; the first one asks for a checkpoint when it is time, once for each."""
        if self._request:
            return STOP
        now = time.monotonic()
        if not self.world.is_main or not 0 < self.cfg.SAVE_EVERY_MINUTES <= (now - self._saved_at) / 60:
            return CONTINUE
        self._saved_at = now
        return SAVE

    def _buffers(self) -> list[Any]:
        """Batch-norm statistics of all processes, where they differ."""
        return gather(self.state.buffers()) if self.world.size > 1 else []

    def _save_within_epoch(self, position: Sequence[Mapping[str, Any]], buffers: Sequence[Any]) -> None:
        self.state.seen = position
        self._check_finite()
        self._save(buffers=buffers)

    def _save(self, names: Sequence[str] = (), buffers: Sequence[Any] = ()) -> None:
        if self.world.is_main:
            self.folder.save(
                self.state.state_dict() | {"config": config.as_dict(self.cfg), "buffers": list(buffers)}, names
            )
        self._saved_at = time.monotonic()

    def _check_finite(self) -> None:
        self.state.skipped = self._skipped_before + self.guard.skipped()[0]
        if not self.guard.weights_are_finite():
            raise UserError(f"the training diverged: its weights are not finite any more; {self._last_good()}")

    def _last_good(self) -> str:
        self.folder.wait()
        latest = self.folder.latest
        kept = f"the last good checkpoint is {latest}" if latest.is_file() else "no checkpoint was written before"
        return f"{kept}; a lower learning rate or clipped gradients may help"

    def _stop(self, position: Sequence[Mapping[str, Any]], buffers: Sequence[Any]) -> NoReturn:
        self._save_within_epoch(position, buffers)
        self.folder.wait()
        name = self._request.signal.name if self._request.signal else "a signal to another process"
        raise Interrupted(f"stopped by {name} and saved in {self.folder.latest}: the same command goes on from there")


class _Average:
    """The mean of the finite losses since a moment, kept on the device, and the images per second since then."""

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(2, device=device)  # of the finite losses, and how many they are
        self._images, self._started = 0, time.perf_counter()

    def add_loss(self, loss: Tensor, images: int) -> None:
        finite = torch.isfinite(loss)
        self.add(torch.stack([torch.where(finite, loss, 0.0), finite]))
        self._images += images

    def add(self, sums: Tensor) -> None:
        self.sums = self.sums + sums

    def mean(self) -> float:
        """Return the mean; waits for the device."""
        total, count = self.sums.tolist()
        return total / count if count else math.nan

    def images_per_second(self) -> float:
        return self._images / (time.perf_counter() - self._started)


class _Eta:
    """The time that the rest takes, if it goes on as since the beginning."""

    def __init__(self, first: int, total: int) -> None:
        self._first, self._total, self._started = first, total, time.perf_counter()

    def __call__(self, done: int) -> timedelta:
        seconds = (time.perf_counter() - self._started) / (done - self._first)
        return timedelta(seconds=round(seconds * (self._total - done)))
