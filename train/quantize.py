"""To INT8: a trained checkpoint in, a quantized network and its files out (scripts/quantize.py)."""

from __future__ import annotations

import functools
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm
from yacs.config import CfgNode

import data
import repopt
from repopt import checkpoint, export, quantization
from repopt.errors import UserError, shown
from train import config, pretrained, run_record
from train.build import check_batch_norms
from train.checkpoint import RunFolder
from train.command import Program
from train.distributed import run_on_main
from train.evaluation.base import Result
from train.file_names import ARTIFACTS, COLUMNS, RESULTS, SIGNAL_TO_NOISE, Column
from train.keys import AUTO, FLOAT_LAYERS_DB, KEYS
from train.logging import as_json, logger
from train.placement import to_device
from train.precision import Precision
from train.resume import check_same_run, find_scales, match_images, read_own
from train.run import fit, prepare, run
from train.tasks.base import Task
from train.trained import float_layers_of

QUANTIZED, FP32_SAFETENSORS, FP32_ONNX, INT8_ONNX = "quantized.pth", "fp32.safetensors", "fp32.onnx", "int8.onnx"
INT8_END_TO_END = "int8_detections.onnx"

MEASURED = 32  # images at a time where the outputs of all layers are held

# What a method has no use for.
UNUSED = {"ptq": ("QUANT.DISTILL",), "qat": ("QUANT.CALIBRATOR", "QUANT.EQUALIZE", "QUANT.BIAS_CORRECTION")}

# What training for INT8 goes without, and what these keys may be, the first of which they are then: autocast rounds
# otherwise, and the exported graph is changed between training and evaluation.
QAT_TAKES = {
    "TRAIN.EMA_ALPHA": (0.0,),
    "TRAIN.FREEZE": ([],),
    "MODEL.FREEZE_BN": (False,),
    "TRAIN.HEAD_LR": (None,),
    "TRAIN.LAYER_DECAY": (1.0,),
    "TRAIN.USE_CHECKPOINT": (False,),
    "TRAIN.SYNC_BN": (False,),
    "TRAIN.COMPILE": ("off", "auto"),
    "AMP_OPT_LEVEL": ("O0", ""),
}


def start(settings: config.Settings, argv: Sequence[str], program: Program) -> CfgNode | None:
    """Do what the command line `argv` of scripts/quantize.py, read as `settings`, says; see `train.run.start`."""
    cfg = settings.cfg
    if not cfg.QUANT.METHOD:
        raise UserError("how to quantize? --method ptq (after training) or --method qat (by training on)")
    if not cfg.MODEL.RESUME:
        raise UserError("a trained network is needed: --resume FILE")
    quantization.find_preset(cfg.QUANT.PRESET)
    if cfg.QUANT.CALIBRATOR is not None:
        quantization.check_calibrator(cfg.QUANT.CALIBRATOR)
    for name in UNUSED[cfg.QUANT.METHOD]:
        if (value := config.lookup(cfg, name)) != KEYS[name].default:
            raise UserError(f"{name} {value} is not of --method {cfg.QUANT.METHOD}: leave it out")
    settings = settings.with_defaults({"TAG": f"{cfg.QUANT.METHOD}-{cfg.QUANT.PRESET}"})
    if cfg.QUANT.METHOD == "ptq":  # nothing is trained, and on GPUs histograms have no such algorithm
        return run(settings.with_values({"DETERMINISTIC": False}), argv, program, quantize_network)
    for name, allowed in QAT_TAKES.items():
        if (value := config.lookup(cfg, name)) not in allowed:
            raise UserError(f"--method qat takes {name} {allowed[0]} only, not {value}")
    settings = settings.with_values({name: allowed[0] for name, allowed in QAT_TAKES.items()})
    return run(settings, argv, program, quantize_network)


def quantize_network(task: Task, folder: RunFolder) -> bool:
    """Quantize, evaluate before and after, and write the files; return whether it came to its end."""
    cfg, world, trains = task.cfg, task.world, task.cfg.QUANT.METHOD == "qat"
    artifacts = folder.path / ARTIFACTS
    run_on_main(lambda: export.refuse_existing(artifacts))
    if not trains:  # a training writes it when it is sure to go on
        run_record.write(task, folder)
    logger.info(f"{cfg.QUANT.PRESET}: {quantization.find_preset(cfg.QUANT.PRESET).meaning}")
    if cfg.QUANT.CALIBRATOR is not None:
        logger.info(f"ranges of activations: {cfg.QUANT.CALIBRATOR}")
    source = pretrained.read(task, cfg.MODEL.RESUME)
    logger.info(f"{checkpoint.WEIGHTS[source.weights]} of {source.path}")
    match_images(task, source.content, source.path)
    model = to_device(source.network(cfg.MODEL.NUM_CLASSES), world)
    if trains:
        check_batch_norms(task, model)
    loader = task.eval_loader()
    images = run_on_main(lambda: task.network_input(next(iter(loader))[0])[:16].cpu())
    if trains and (size := task.training_size()) != images.shape[2:]:
        raise UserError(
            f"--method qat trains and evaluates at one size, and the images are {size[0]} x {size[1]} in training, "
            f"{images.shape[2]} x {images.shape[3]} in evaluation"
        )
    batches = FixedSizeBatches(task, loader, images.shape[2:])
    result = evaluate(batches, "fp32", task.with_predictor(model, task.predictor(model)))
    forms = {"fp32": Form(result, FP32_ONNX)}
    deployed, predictor = repopt.deploy(model), task.predictor(model)
    example = images[:1].to(world.device)
    calibration = FixedSizeBatches(task, task.calibration_loader(), images.shape[2:])
    if cfg.QUANT.EQUALIZE:
        predictor = quantization.equalize(predictor, example)
    task = with_float_layers(task, predictor, example, calibration)
    cfg = task.cfg
    own = own_checkpoint(cfg, folder) if trains else None
    scales = find_scales(task, model, own or source.content) if trains else None
    del source  # its optimizer's state is as large as the network
    prepared = observed = calibrated(task, cfg.QUANT.METHOD, predictor, example, calibration, float_layers_of(cfg))
    if cfg.QUANT.BIAS_CORRECTION:
        prepared = quantization.correct_biases(observed, ImagesOf(calibration, "bias correction", MEASURED))
    whole = task.with_predictor(model, prepared)
    if trains:
        with distillation(task, prepared, task.predictor(deployed)) as added_loss:
            trainer = prepare(task, whole, scales, folder, own, added_loss)
            del own
            if not fit(trainer):
                return False
            del trainer
    int8 = quantization.convert(prepared)
    result = evaluate(batches, "INT8, torch", task.with_predictor(model, int8))
    seen = ImagesOf(calibration, "noise", MEASURED)
    forms["INT8"] = Form(result, signal_to_noise=quantization.outputs_signal_to_noise(observed, int8, seen))
    ratios = quantization.signal_to_noise(observed, int8, images.to(world.device))
    written = run_on_main(lambda: write_artifacts(artifacts, task, whole, deployed, int8, images, ratios))
    threads = max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    places: dict[str, Callable[[nn.Module], nn.Module]] = {
        "": functools.partial(task.with_predictor, model),
        ", end to end": task.with_end_to_end,
    }
    for (kind, in_network), file in zip(places.items(), (INT8_ONNX, INT8_END_TO_END), strict=True):
        if (written / file).is_file():
            name, network = f"INT8, onnxruntime{kind}", in_network(export.OnnxNetwork(written / file, threads))
            forms[name] = Form(evaluate(batches, name, network), file)
    run_on_main(lambda: publish_results(written, artifacts, COLUMNS[cfg.TASK], forms))
    return True


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


def evaluate(batches: FixedSizeBatches, name: str, model: nn.Module) -> Result:
    """Return what an evaluation finds, logged."""
    task, batches.progress = batches.task, name
    result = task.evaluate(model, batches, Precision(task.world.device))
    assert result is not None, "nothing stops it"
    logger.info(f"{name}: {result}")
    return result


class ImagesOf:
    """What the network sees of batches, in parts of so many images, or in whole batches."""

    def __init__(self, batches: FixedSizeBatches, progress: str, part: int | None = None) -> None:
        self._batches, self._progress, self._part = batches, progress, part

    def __iter__(self) -> Iterator[Tensor]:
        self._batches.progress = self._progress
        for images, _ in self._batches:
            seen = self._batches.task.network_input(images)
            yield from seen.split(self._part or len(seen))


def calibrated(
    task: Task, method: str, model: nn.Module, example: Tensor, batches: FixedSizeBatches, float_layers: Sequence[str]
) -> quantization.PreparedModel:
    """Return a prepared network that has seen the images that choose its ranges."""
    quant = task.cfg.QUANT
    prepared = quantization.prepare(model, example, method, quant.PRESET, quant.CALIBRATOR, float_layers)
    quantization.calibrate(prepared, ImagesOf(batches, "calibration"))
    return prepared


def with_float_layers(task: Task, model: nn.Module, example: Tensor, batches: FixedSizeBatches) -> Task:
    """Return the task with names as its QUANT.FLOAT_LAYERS, of the layers that are the most sensitive after training.

    Raises:
        UserError: more are asked for than there are.
    """
    wanted = task.cfg.QUANT.FLOAT_LAYERS
    if wanted != AUTO and not wanted.isdecimal():
        return task

    def quantized(float_layers: Sequence[str]) -> quantization.PreparedModel:
        return calibrated(task, "ptq", model, example, batches, float_layers)

    images = ImagesOf(batches, "sensitivity", MEASURED)
    if wanted == AUTO:
        names = quantization.choose_float_layers(quantized, images, FLOAT_LAYERS_DB)
    else:
        every = quantization.most_sensitive(quantized([]), images)
        if int(wanted) > len(every):
            raise UserError(f"QUANT.FLOAT_LAYERS is {wanted}, and the network has {len(every)} layers")
        names = every[: int(wanted)]
    names = run_on_main(lambda: names)  # gradients on GPUs may differ in their last bits
    logger.info(f"QUANT.FLOAT_LAYERS {wanted}: {', '.join(names) or 'none'}")
    settings = config.Settings(task.cfg, frozenset()).with_values({"QUANT.FLOAT_LAYERS": ",".join(names)})
    return type(task)(settings.cfg, task.world)


@contextmanager
def distillation(task: Task, student: nn.Module, teacher: nn.Module) -> Iterator[Callable[[], Tensor] | None]:
    """Give the loss of what a predictor has last given in training, against what a teacher gives for the same images.

    It is QUANT.DISTILL times `Task.divergence`; None where that is 0.
    """
    weight, losses = task.cfg.QUANT.DISTILL, list[Tensor]()
    if not weight:
        yield None
        return

    def compare(_: nn.Module, images: tuple[Tensor], outputs: Any) -> None:
        if student.training:
            with torch.no_grad():
                expected = teacher(*images)
            losses[:] = [weight * task.divergence(outputs, expected)]

    handle = student.register_forward_hook(compare)
    yield losses.pop
    handle.remove()


def own_checkpoint(cfg: CfgNode, folder: RunFolder) -> dict[str, Any] | None:
    """Return what an earlier start of this training left, or None.

    Raises:
        UserError: it was another training, or began with another network.
    """
    content = read_own(cfg, folder)
    if content is None:
        return None
    check_same_run(cfg, content)
    if (began_with := config.lookup(content.get("config"), "MODEL.RESUME")) != cfg.MODEL.RESUME:
        raise UserError(
            f"cannot resume: the training in {str(folder.path)!r} began with {shown(began_with)}, not with "
            f"{cfg.MODEL.RESUME!r}; give this one another --tag"
        )
    return content


def write_artifacts(
    path: Path,
    task: Task,
    whole: nn.Module,
    deployed: nn.Module,
    int8: quantization.Int8,
    images: Tensor,
    ratios: dict[str, float],
) -> Path:
    """Write the files of both networks to a folder next to `path`, check them, and return that folder.

    Args:
        path: where they are published.
        task: of the network.
        whole: the network whose predictor is prepared.
        deployed: the network in float.
        int8: the quantized predictor.
        images: what a predictor takes, (N, C, H, W).
        ratios: of signal to noise, by layer.
    """
    new = path.with_name(f"{path.name}.writing")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    try:
        content = {
            "model": whole.state_dict(),
            "config": config.as_dict(task.cfg),
            "image_size": list(images.shape[2:]),
        }
        in_out, size = task.in_out(), (images.shape[2], images.shape[3])
        metadata = in_out._replace(images=task.exported_images(in_out.images)).as_metadata()
        checkpoint.write(content | task.notes(), new / QUANTIZED)
        write_json(ratios, new / SIGNAL_TO_NOISE)
        export.write_safetensors(deployed.cpu(), new / FP32_SAFETENSORS, metadata)
        differences = {
            name: export.write_onnx(network, images, new / name, metadata)
            for name, network in ((FP32_ONNX, task.predictor(deployed)), (INT8_ONNX, int8.cpu()))
        }
        if (end_to_end := task.end_to_end(deployed, int8, size)) is not None:
            file = INT8_END_TO_END
            differences[file] = export.write_end_to_end(end_to_end, images, new / file, metadata, new / INT8_ONNX)
        for name, difference in differences.items():
            logger.info(f"{name}: onnxruntime's outputs differ from torch's by {difference:.1e} (relative)")
    except UserError:
        shutil.rmtree(new)
        raise
    return new


class Form(NamedTuple):
    """A form of the network: what an evaluation found, its file, and how far its noise is below its outputs, in dB."""

    result: Result
    file: str | None = None
    signal_to_noise: float | None = None


def publish_results(written: Path, path: Path, columns: Sequence[Column], forms: Mapping[str, Form]) -> None:
    """Compare the forms of a network, and let the files have their place."""
    known = forms["fp32"].result.numbers()
    columns = [column for column in columns if column.name in known]
    heads = ["network", *(column.head for column in columns), "signal to noise (dB)", "file (MB)"]
    rows, content = [heads, ["---"] * len(heads)], {}
    for name, (result, file, decibels) in forms.items():
        content[name] = numbers = result.numbers()
        rows.append([name, *(f"{numbers[column.name]:.{column.decimals}f}" for column in columns)])
        rows[-1].append("–" if decibels is None else f"{decibels:.1f}")
        rows[-1].append("–" if file is None else f"{(written / file).stat().st_size / 1e6:.2f}")
        if decibels is not None:
            numbers["signal_to_noise"] = decibels
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    (written / "results.md").write_text(table + "\n")
    write_json(content, written / RESULTS)
    written.replace(path)
    integers = export.operations(path / INT8_ONNX)["QLinearConv"]
    logger.info(f"{table}\nonnxruntime runs {integers} convolutions on integers; the files are in {path}")


def write_json(content: dict[str, Any], path: Path) -> None:
    """Write numbers for programs to read; what is not finite as null."""
    path.write_text(json.dumps(as_json(content), indent=1, allow_nan=False) + "\n")
