"""A whole training: epoch after epoch, evaluated, logged and saved on the way, and able to stop after any step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from datetime import timedelta
from typing import Any, NoReturn, Protocol

from torch import Tensor, nn
from tqdm import tqdm

from data import seeding
from repopt.errors import UserError
from repopt.reparam import extract_scales
from repopt.scales import save_scales
from train.distributed import Vote, World, gather
from train.epoch import Forward, Progress, count_steps, images_alone, train_one_epoch
from train.evaluation.base import Evaluate, Result
from train.evaluation.classification import evaluate
from train.interruption import Interrupted, stop_requests
from train.logging import Metrics, logger
from train.parallel import average_statistics
from train.run_folder import RunFolder
from train.safeguard import Safeguard
from train.state import TrainingState

GO_ON, SAVE, STOP = range(3)  # what a process votes for after a step


class Loader(Protocol):
    """Batches (images, targets) on the device; which ones may depend on the epoch.

    Attributes:
        images_per_batch: of all processes.
        images_seen: by all processes, of the chosen epoch before this iteration.
        unreadable: names of images that could not be read by this process so far, and why.
    """

    images_per_batch: int
    images_seen: int
    unreadable: Mapping[str, str]

    def __len__(self) -> int:
        """Batches of the chosen epoch that are left."""
        ...

    def __iter__(self) -> Iterator[tuple[Any, Any]]: ...

    def set_epoch(self, epoch: int, seen: Sequence[Mapping[str, Any]] = ()) -> None:
        """Choose the epoch that is iterated next, and what of it is done."""

    def position_after(self, batches: int) -> Sequence[Mapping[str, Any]]:
        """What of the chosen epoch is done after so many batches, as `set_epoch` takes it; plain data."""
        ...


@dataclass
class Training:
    """A training from where `state` stands to the last epoch; `run` does it.

    One that is stopped and restored ends with the same weights as one that never was, bit for bit where the device's
    operations are deterministic: everything random follows from the seed and the place in the training.

    Attributes:
        state: updated in place.
        model: ``state.model``, or what wraps it for training (DDP).
        train_loader, val_loader: of this process.
        criterion: mean loss of a batch, of what `forward` gives and the targets.
        forward: calls the model in training.
        evaluate: the model, on the batches of `val_loader`.
        measure: the name of the score that it finds.
        epochs: in all, those already done included.
        folder: where the first process writes checkpoints, metrics, and (searching) the scales.
        config: goes into every checkpoint.
        world: this process among all.
        seed: of dropout and whatever else the model draws, which differs by batch and process.
        searching: whether the model's scales are being searched.
        clip: clips the gradients and returns their norm.
        accumulation_steps: batches per optimizer step.
        ema_update_period: optimizer steps between updates of the moving average.
        eval_period, save_period: in epochs; the last one is always evaluated and saved.
        save_latest_period: in epochs, between those after which the place in the training is saved even if nothing
            else is.
        save_every_minutes, save_every_steps: between checkpoints within epochs; 0 = none.
        most_skipped: steps left out in a row, because loss or gradients are not finite, at which the training ends.
        print_period: in batches.
    """

    state: TrainingState
    model: nn.Module
    train_loader: Loader
    val_loader: Loader
    criterion: Callable[[Any, Any], Tensor]
    _: KW_ONLY
    forward: Forward = images_alone
    evaluate: Evaluate = evaluate
    measure: str = "top-1"
    epochs: int
    folder: RunFolder
    config: Mapping[str, Any]
    world: World
    seed: int = 0
    searching: bool = False
    clip: Callable[[], Tensor] | None = None
    accumulation_steps: int = 1
    ema_update_period: int = 1
    eval_period: int = 1
    save_period: int = 20
    save_latest_period: int = 1
    save_every_minutes: float = 0.0
    save_every_steps: int = 0
    most_skipped: int = 20
    print_period: int = 10

    def __post_init__(self) -> None:
        self.train_loader.set_epoch(self.state.epoch)
        self._batches = len(self.train_loader)  # of a whole epoch
        self._steps_per_epoch = count_steps(self._batches, self.accumulation_steps)
        self._safeguard = Safeguard(self.state.model, self.state.optimizer, self.state.precision.device)
        self._skipped_before = self.state.skipped
        self._vote = Vote()
        self._saved_at = time.monotonic()

    def run(self) -> None:
        """Train.

        Raises:
            UserError: the training has diverged, or a file cannot be written; what was saved before stays.
            Interrupted: a process was asked to stop by a signal; everything is saved.
        """
        state = self.state
        if state.seen:
            self.train_loader.set_epoch(state.epoch, state.seen)
            logger.info(f"epoch {state.epoch + 1} goes on behind {self.train_loader.images_seen} images")
        if first_step := self._first_step():
            state.schedule.step_update(first_step - 1)  # if no step is left, its learning rate is what is kept
        already = state.epoch * self._batches + self._batches_done()
        self._bar = tqdm(
            total=self.epochs * self._batches,
            initial=already,
            unit="batch",
            disable=None if self.world.is_main else True,  # None: shown only on a terminal
        )
        self._eta = _Eta(already, self.epochs * self._batches)
        folder = self.folder.path if self.world.is_main else None
        with (
            stop_requests() as self._request,
            Metrics(folder, first_step, state.epoch) as self._metrics,
            self._bar,
        ):
            while state.epoch < self.epochs:
                self._epoch()
        logger.info(f"best {self.measure} {state.max_accuracy:.3f} %, checkpoints in {self.folder.path}")

    def _batches_done(self) -> int:
        """Batches of the chosen epoch that are not left, counted in batches of this number of processes."""
        return self._batches - len(self.train_loader)

    def _first_step(self) -> int:
        """Optimizer steps before those of this iteration, as they are counted now."""
        per_step = self.train_loader.images_per_batch * self.accumulation_steps
        return self.state.epoch * self._steps_per_epoch + count_steps(self.train_loader.images_seen, per_step)

    def _epoch(self) -> None:
        """Train what is left of an epoch, evaluate, and save."""
        state, started, first_step = self.state, time.perf_counter(), self._first_step()
        train_one_epoch(
            self.model,
            self.train_loader,
            self.criterion,
            state.optimizer,
            forward=self.forward,
            batches=self._batches,
            first_batch=self._batches_done(),
            first_step=first_step,
            precision=state.precision,
            safeguard=self._safeguard,
            accumulation_steps=self.accumulation_steps,
            clip=self.clip,
            before_batch=self._seed_batch,
            before_step=state.schedule.step_update,
            after_step=self._after_step,
            after_batch=self._bar.update,
            report=self._report,
            report_every=self.print_period,
        )
        numbers: dict[str, Any] = {"epoch": state.epoch + 1, "train_seconds": time.perf_counter() - started}
        if unreadable := sum(gather(len(self.train_loader.unreadable))):
            logger.warning(f"{unreadable} training images could not be read so far, and others took their places")
            numbers["unreadable_images"] = unreadable
        names = self._evaluate(numbers)
        state.epoch, state.seen = state.epoch + 1, ()
        last = state.epoch == self.epochs
        if state.epoch % self.save_period == 0 or last:
            names.append(f"ckpt_epoch_{state.epoch - 1}.pth")
        if self.searching:
            scales = extract_scales(state.model)
            numbers["scales"] = {name: values.mean().item() for name, values in scales.items()}
            if self.world.is_main:
                save_scales(scales, self.folder.path / "scales.pth")
        self._metrics.write(state.epoch * self._steps_per_epoch, **numbers)
        if names or state.epoch % self.save_latest_period == 0:
            self._save(names)
        if not last:
            self.train_loader.set_epoch(state.epoch)

    def _seed_batch(self, done: int) -> None:
        loader, world = self.train_loader, self.world
        images = loader.images_seen + done * loader.images_per_batch
        images += world.rank * (loader.images_per_batch // world.size)
        seeding.reseed(self.seed, self.state.epoch, seeding.MODEL, images, device=world.device)

    def _after_step(self, step: int, done: int) -> None:
        """Update the moving average; save where it is time to, or where a process was asked to stop."""
        if self.state.ema is not None and step % self.ema_update_period == 0:
            self.state.ema.update(self.state.model)
        decision = self._vote.say(STOP if self._request else SAVE if self._is_time() else GO_ON)
        if decision or (self.save_every_steps and step % self.save_every_steps == 0):
            self._save_within_epoch(done, self._buffers())
        if decision == STOP:
            self._interrupt()

    def _is_time(self) -> bool:
        """Whether the first process asks for a checkpoint; only once for each."""
        now = time.monotonic()
        if not self.world.is_main or not 0 < self.save_every_minutes <= (now - self._saved_at) / 60:
            return False
        self._saved_at = now
        return True

    def _buffers(self) -> list[Any]:
        """Batch-norm statistics of all processes, where they differ."""
        return gather(self.state.buffers()) if self.world.size > 1 else []

    def _save_within_epoch(self, done: int, buffers: list[Any]) -> None:
        self.state.seen = self.train_loader.position_after(done)
        self._save(buffers=buffers)

    def _save(self, names: Sequence[str] = (), buffers: Sequence[Any] = ()) -> None:
        state = self.state
        state.skipped = self._skipped_before + self._safeguard.skipped()[0]
        if not self._safeguard.weights_are_finite():
            raise UserError(f"the training diverged: its weights are not finite any more; {self._last_good()}")
        if self.world.is_main:
            self.folder.save(state.content(self.config, buffers), names)
        self._saved_at = time.monotonic()

    def _last_good(self) -> str:
        latest = self.folder.latest
        kept = f"the last good checkpoint is {latest}" if latest.is_file() else "no checkpoint was written before"
        return f"{kept}; a lower learning rate or clipped gradients may help"

    def _interrupt(self) -> NoReturn:
        name = self._request.signal.name if self._request.signal else "a signal to another process"
        raise Interrupted(f"stopped by {name} and saved in {self.folder.latest}: the same command goes on from there")

    def _evaluate(self, numbers: dict[str, Any]) -> list[str]:
        """Evaluate the model and its moving average where it is time to; the names of checkpoints that are the best."""
        state, epoch = self.state, self.state.epoch + 1
        buffers = self._buffers()  # before they are averaged
        done = len(self.train_loader)
        if self._vote.settle(STOP if self._request else GO_ON) == STOP:
            self._save_within_epoch(done, buffers)
            self._interrupt()
        if self.world.size > 1:
            for averaged in state.models().values():
                average_statistics(averaged)
        if epoch % self.eval_period and epoch != self.epochs:
            return []
        results: dict[str, Result] = {}
        for key, model in state.models().items():
            result = self.evaluate(model, self.val_loader, state.precision, stops=lambda: self._request)
            if result is None:
                self._save_within_epoch(done, buffers)
                self._interrupt()
            logger.info(f"epoch {epoch} {key}: {result}")
            results[key] = result
            numbers[key] = result.numbers()
        return _new_bests(state, results)

    def _report(self, progress: Progress) -> None:
        epoch, skipped = self.state.epoch, self._skipped_before + progress.skipped
        if progress.skipped_in_a_row >= self.most_skipped:
            raise UserError(
                f"the training diverged in epoch {epoch + 1}: loss or gradients were not finite in "
                f"{progress.skipped_in_a_row} steps in a row, up to step {progress.step}; {self._last_good()}"
            )
        speed = progress.images_per_second * self.world.size
        notes = "" if progress.grad_norm is None else f" grad norm {progress.grad_norm:.3f}"
        notes += f" skipped {skipped}" if skipped else ""
        logger.info(
            f"epoch {epoch + 1}/{self.epochs} batch {progress.batch}/{progress.batches} loss {progress.loss:.4f} "
            f"lr {progress.learning_rate:.5f}{notes} {speed:.0f} images/s "
            f"ETA {self._eta(epoch * self._batches + progress.batch)}"
        )
        numbers = {"loss": progress.loss, "learning_rate": progress.learning_rate, "images_per_second": speed}
        self._metrics.write(progress.step, train=numbers | {"skipped_steps": skipped})


class _Eta:
    """How long the rest takes, if it goes on as since the beginning."""

    def __init__(self, first: int, total: int) -> None:
        self._first, self._total, self._started = first, total, time.perf_counter()

    def __call__(self, done: int) -> timedelta:
        seconds = (time.perf_counter() - self._started) / (done - self._first)
        return timedelta(seconds=round(seconds * (self._total - done)))


def _new_bests(state: TrainingState, results: Mapping[str, Result]) -> list[str]:
    """Checkpoints to write because a score is the best so far; the state remembers it."""
    names = []
    if results["val"].score > state.max_accuracy:
        state.max_accuracy = results["val"].score
        names.append("best_ckpt.pth")
    if "ema" in results and results["ema"].score > state.max_ema_accuracy:
        state.max_ema_accuracy = results["ema"].score
        names.append("best_ema_ckpt.pth")
    return names
