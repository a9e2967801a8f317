"""A trained network on its way to INT8: the images that it sees for that, and what became of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn
from tqdm import tqdm

import data
from repopt import checkpoint, quantization
from repopt.errors import UserError
from train import config
from train.distributed import run_on_main
from train.evaluation.base import Result
from train.file_names import RESULTS, Column
from train.keys import AUTO, FLOAT_LAYERS_DB
from train.logging import as_json, logger
from train.placement import to_device
from train.precision import Precision
from train.resume import check_network, match_images
from train.tasks.base import Task
from train.trained import LoadedCheckpoint, float_layers_of

MEASURED = 32  # images at a time where the outputs of all layers are held


class Form(NamedTuple):
    """A form of a network: what an evaluation found, its file, and how far its noise is below its outputs, in dB."""

    result: Result
    file: str | None = None
    signal_to_noise: float | None = None


class FixedSizeBatches:
    """The batches of a loader, of the one size that the network is quantized for.

    Iterating shows its progress on the first process's terminal, and raises a UserError at a batch of another size.
    """

    def __init__(self, task: Task, loader: data.Loader, size: Sequence[int]) -> None:
        self.task, self.progress = task, ""
        self._loader, self._size = loader, tuple(size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        shown = None if self.task.world.is_main else True
        for images, targets in tqdm(self._loader, desc=self.progress, unit="batch", leave=False, disable=shown):
            size = tuple(self.task.network_input(images).shape[2:])
            if size != self._size:
                raise UserError(
                    f"the network is quantized for images of {self._size[0]} x {self._size[1]}, and there are others, "
                    f"which it would see as {size[0]} x {size[1]}"
                )
            yield images, targets


class ImagesOf:
    """What the network sees of batches, in parts of so many images, or in whole batches."""

    def __init__(self, batches: FixedSizeBatches, progress: str, part: int | None = None) -> None:
        self._batches, self._progress, self._part = batches, progress, part

    def __iter__(self) -> Iterator[Tensor]:
        self._batches.progress = self._progress
        for images, _ in self._batches:
            seen = self._batches.task.network_input(images)
            yield from seen.split(self._part or len(seen))


class Trained:
    """A trained network, and the images that it is evaluated and calibrated on.

    Args:
        task: of the network.
        source: its checkpoint.

    Attributes:
        model: the network.
        images: the first of what its predictor sees in evaluation, (N, C, H, W), on the CPU.
    """

    def __init__(self, task: Task, source: LoadedCheckpoint) -> None:
        logger.info(f"{checkpoint.WEIGHTS[source.weights]} of {source.path}")
        check_network(task.cfg, source.content, source.path)
        match_images(task, source.content, source.path)
        self._task = task
        self.model = to_device(source.network(task.cfg.MODEL.NUM_CLASSES), task.world)
        loader = task.eval_loader()
        self.images = run_on_main(lambda: task.network_input(next(iter(loader))[0])[:16].cpu())
        size = self.images.shape[2:]
        self._evaluated = FixedSizeBatches(task, loader, size)
        self._calibrated = FixedSizeBatches(task, task.calibration_loader(), size)

    def evaluate(self, name: str, model: nn.Module) -> Result:
        """Return what an evaluation finds, logged."""
        self._evaluated.progress = name
        result = self._task.evaluate(model, self._evaluated, Precision(self._task.world.device))
        assert result is not None, "nothing stops it"
        logger.info(f"{name}: {result}")
        return result

    def in_float(self) -> Form:
        """Return the network as it was trained, evaluated."""
        model = self._task.with_predictor(self.model, self._task.predictor(self.model))
        return Form(self.evaluate("fp32", model))

    def in_int8(self, name: str, observed: quantization.PreparedModel, int8: quantization.Int8) -> Form:
        """Return the network with a quantized predictor, evaluated."""
        result = self.evaluate(name, self._task.with_predictor(self.model, int8))
        noisy = ImagesOf(self._calibrated, "noise", MEASURED)
        return Form(result, None, quantization.outputs_signal_to_noise(observed, int8, noisy))

    def prepare(self, task: Task) -> tuple[Task, quantization.PreparedModel, quantization.PreparedModel]:
        """Return the network's predictor as the task's QUANT says, its ranges known.

        Returns:
            The task, with names as its QUANT.FLOAT_LAYERS; the predictor in float; and with its biases corrected, where
            that is asked for, else the same.

        Raises:
            UserError: more layers are to stay in float than there are.
        """
        quant, predictor = task.cfg.QUANT, task.predictor(self.model)
        if quant.EQUALIZE:
            predictor = quantization.equalize(predictor, self._example)
        task = self._with_float_layers(task, predictor)
        observed = prepared = self._observed(task, quant.METHOD, predictor, float_layers_of(task.cfg))
        if quant.BIAS_CORRECTION:
            prepared = quantization.correct_biases(observed, ImagesOf(self._calibrated, "bias correction", MEASURED))
        return task, observed, prepared

    @property
    def _example(self) -> Tensor:
        return self.images[:1].to(self._task.world.device)

    def _observed(
        self, task: Task, method: str, predictor: nn.Module, float_layers: Sequence[str]
    ) -> quantization.PreparedModel:
        """Return a prepared network that has seen the images that choose its ranges."""
        preset, calibrator = task.cfg.QUANT.PRESET, task.cfg.QUANT.CALIBRATOR
        prepared = quantization.prepare(predictor, self._example, method, preset, calibrator, float_layers)
        quantization.calibrate(prepared, ImagesOf(self._calibrated, "calibration"))
        return prepared

    def _with_float_layers(self, task: Task, predictor: nn.Module) -> Task:
        """Return the task with names as its QUANT.FLOAT_LAYERS, of the layers most sensitive after training."""
        wanted = task.cfg.QUANT.FLOAT_LAYERS
        if wanted != AUTO and not wanted.isdecimal():
            return task

        def quantized(float_layers: Sequence[str]) -> quantization.PreparedModel:
            return self._observed(task, "ptq", predictor, float_layers)

        images = ImagesOf(self._calibrated, "sensitivity", MEASURED)
        if wanted == AUTO:
            names = quantization.choose_float_layers(quantized, images, FLOAT_LAYERS_DB)
        else:
            every = quantization.most_sensitive(quantized([]), images)
            if int(wanted) > len(every):
                raise UserError(f"QUANT.FLOAT_LAYERS is {wanted}, and the network has {len(every)} layers")
            names = every[: int(wanted)]
        names = run_on_main(lambda: names)  # gradients on GPUs may differ in their last bits
        logger.info(f"QUANT.FLOAT_LAYERS {wanted}: {', '.join(names) or 'none'}")
        return with_settings(task, {"QUANT.FLOAT_LAYERS": ",".join(names)})


def with_settings(task: Task, values: Mapping[str, Any]) -> Task:
    """Return a task with other values of keys."""
    return type(task)(config.Settings(task.cfg, frozenset()).with_values(values).cfg, task.world)


def new_folder(path: Path) -> Path:
    """Return an empty folder next to `path`, whose place it may take when it is complete."""
    new = path.with_name(f"{path.name}.writing")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    return new


def publish(written: Path, path: Path, columns: Sequence[Column], forms: Mapping[str, Form]) -> None:
    """Compare forms of a network, the first of which is the float one, and let the files have their place."""
    known = next(iter(forms.values())).result.numbers()
    columns = [column for column in columns if column.name in known]
    heads = ["network", *(column.head for column in columns), "signal to noise (dB)", "file (MB)"]
    rows, content = [heads, ["---"] * len(heads)], {}
    for name, (result, file, decibels) in forms.items():
        numbers = result.numbers()
        noise = "–" if decibels is None else f"{decibels:.1f}"
        size = "–" if file is None else f"{(written / file).stat().st_size / 1e6:.2f}"
        rows.append([name, *(f"{numbers[column.name]:.{column.decimals}f}" for column in columns), noise, size])
        content[name] = numbers if decibels is None else numbers | {"signal_to_noise": decibels}
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    (written / "results.md").write_text(table + "\n")
    write_json(content, written / RESULTS)
    written.replace(path)
    logger.info(table)


def write_json(content: Mapping[str, Any], path: Path) -> None:
    """Write numbers for programs to read; what is not finite as null."""
    path.write_text(json.dumps(as_json(dict(content)), indent=1, allow_nan=False) + "\n")
