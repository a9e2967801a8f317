"""To INT8: a trained checkpoint in, a quantized network and its files out (scripts/quantize.py)."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
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
from train.keys import AUTO, CLASSIFY, FLOAT_LAYERS_DB, KEYS
from train.logging import as_json, logger
from train.placement import to_device
from train.precision import Precision
from train.resume import check_same_run, find_scales, match_images, read_own
from train.run import fit, prepare, run
from train.tasks.base import Task
from train.trained import float_layers_of

QUANTIZED, FP32_SAFETENSORS, FP32_ONNX, INT8_ONNX = "quantized.pth", "fp32.safetensors", "fp32.onnx", "int8.onnx"

MEASURED = 32  # images at a time where the outputs of all layers are held

# What a method has no use for.
UNUSED = {"ptq": ("QUANT.DISTILL",), "qat": ("QUANT.CALIBRATOR", "QUANT.EQUALIZE", "QUANT.BIAS_CORRECTION")}

# What training for INT8 goes without, and what these keys may be, the first of which they are then: autocast rounds
# otherwise, and the exported graph is changed between training and evaluation.
QAT_TAKES = {
    "TASK": (CLASSIFY,),
    "TRAIN.EMA_ALPHA": (0.0,),
    "TRAIN.FREEZE": ([],),
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
    return run(settings.with_values({name: allowed[0] for name, allowed in QAT_TAKES.items()}), argv, program, qat)


def qat(task: Task, folder: RunFolder) -> bool:
    """Quantize by training on; return whether the training came to its end."""
    sizes = task.cfg.DATA
    if sizes.IMG_SIZE != sizes.TEST_SIZE:
        raise UserError(
            f"--method qat trains and evaluates at one size: DATA.IMG_SIZE is {sizes.IMG_SIZE}, DATA.TEST_SIZE "
            f"{sizes.TEST_SIZE}"
        )
    return quantize_network(task, folder)


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
    batches = FixedSizeBatches(task, loader, images.shape[2:])
    results = {"fp32": evaluate(batches, "fp32", model)}
    float_network = repopt.deploy(model)
    example = images[:1].to(world.device)
    calibration = FixedSizeBatches(task, task.calibration_loader(), images.shape[2:])
    if cfg.QUANT.EQUALIZE:
        model = quantization.equalize(model, example)
    task = with_float_layers(task, model, example, calibration)
    cfg = task.cfg
    own = own_checkpoint(cfg, folder) if trains else None
    scales = find_scales(task, model, own or source.content) if trains else None
    del source  # its optimizer's state is as large as the network
    prepared = observed = calibrated(task, cfg.QUANT.METHOD, model, example, calibration, float_layers_of(cfg))
    if cfg.QUANT.BIAS_CORRECTION:
        prepared = quantization.correct_biases(observed, ImagesOf(calibration, "bias correction", MEASURED))
    if trains:
        added_loss = distillation(float_network, cfg.QUANT.DISTILL) if cfg.QUANT.DISTILL else None
        trainer = prepare(task, prepared, scales, folder, own, added_loss)
        del own
        if not fit(trainer):
            return False
        del trainer
    int8 = quantization.convert(prepared)
    results["INT8"] = evaluate(batches, "INT8, torch", int8)
    ratios = quantization.signal_to_noise(observed, int8, images.to(world.device))
    written = run_on_main(lambda: write_artifacts(artifacts, task, prepared, float_network, int8, images, ratios))
    threads = max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    for name, network in in_runtimes(written / INT8_ONNX, threads):
        results[name] = evaluate(batches, name, network)
    run_on_main(lambda: publish_results(written, artifacts, COLUMNS[cfg.TASK], results))
    return True


def in_runtimes(path: Path, threads: int) -> Iterator[tuple[str, nn.Module]]:
    """Yield an INT8 file's name and network in onnxruntime, and in OpenVINO where that is installed and can run it."""
    yield "INT8, onnxruntime", export.OnnxNetwork(path, threads)
    try:
        from repopt.openvino import OpenVinoNetwork  # an extra

        network = OpenVinoNetwork(path, threads)
    except UserError as error:
        logger.info(f"not evaluated in OpenVINO: {error}")
    else:
        yield "INT8, OpenVINO", network


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
    logger.info(f"QUANT.FLOAT_LAYERS {wanted}: {', '.join(names) or 'none'}")
    settings = config.Settings(task.cfg, frozenset()).with_values({"QUANT.FLOAT_LAYERS": ",".join(names)})
    return type(task)(settings.cfg, task.world)


def distillation(teacher: nn.Module, weight: float) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the loss of logits, (N, classes), against those of another network for the same images, (N, C, H, W).

    It is `weight` times the Kullback-Leibler divergence between their classes' probabilities, mean over the images.
    """

    def loss(images: Tensor, logits: Tensor) -> Tensor:
        with torch.no_grad():
            expected = teacher(images).log_softmax(1)
        return weight * F.kl_div(logits.log_softmax(1), expected, reduction="batchmean", log_target=True)

    return loss


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
    prepared: quantization.PreparedModel,
    float_network: nn.Module,
    int8: quantization.Int8,
    images: Tensor,
    ratios: dict[str, float],
) -> Path:
    """Write the files of both networks to a folder next to `path`, check them, and return that folder."""
    new = path.with_name(f"{path.name}.writing")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    try:
        content = {
            "model": prepared.state_dict(),
            "config": config.as_dict(task.cfg),
            "image_size": list(images.shape[2:]),
        }
        metadata = task.in_out().as_metadata()
        checkpoint.write(content | task.notes(), new / QUANTIZED)
        write_json(ratios, new / SIGNAL_TO_NOISE)
        export.write_safetensors(float_network.cpu(), new / FP32_SAFETENSORS, metadata)
        for network, name in ((float_network, FP32_ONNX), (int8.cpu(), INT8_ONNX)):
            difference = export.write_onnx(network, images, new / name, metadata)
            logger.info(f"{name}: onnxruntime's outputs differ from torch's by {difference:.1e} (relative)")
    except UserError:
        shutil.rmtree(new)
        raise
    return new


def publish_results(written: Path, path: Path, columns: Sequence[Column], results: Mapping[str, Result]) -> None:
    """Compare the networks, and let the files have their place."""
    lines = [
        f"| network | {' | '.join(column.head for column in columns)} | file (MB) |",
        "|" + "---|" * (len(columns) + 2),
    ]
    files = {"fp32": FP32_ONNX, "INT8, onnxruntime": INT8_ONNX, "INT8, OpenVINO": INT8_ONNX}
    for name, result in results.items():
        size = f"{(written / files[name]).stat().st_size / 1e6:.2f}" if name in files else "–"
        numbers = result.numbers()
        cells = [f"{numbers[column.name]:.{column.decimals}f}" for column in columns]
        lines.append(f"| {name} | {' | '.join(cells)} | {size} |")
    table = "\n".join(lines)
    (written / "results.md").write_text(table + "\n")
    write_json({name: result.numbers() for name, result in results.items()}, written / RESULTS)
    written.replace(path)
    integers = export.operations(path / INT8_ONNX)["QLinearConv"]
    logger.info(f"{table}\nonnxruntime runs {integers} convolutions on integers; the files are in {path}")


def write_json(content: dict[str, Any], path: Path) -> None:
    """Write numbers for programs to read; what is not finite as null."""
    path.write_text(json.dumps(as_json(content), indent=1, allow_nan=False) + "\n")
