"""To INT8: a trained checkpoint in, a quantized network and its files out (scripts/quantize.py)."""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from yacs.config import CfgNode

import repopt
from repopt import checkpoint, export, quantization
from repopt.errors import UserError, shown
from train import config, pretrained, run_record
from train.build import check_batch_norms
from train.calibration import Form, Trained, new_folder, publish, write_json
from train.checkpoint import RunFolder
from train.command import Program
from train.compare import compare
from train.distributed import run_on_main
from train.file_names import ARTIFACTS, COLUMNS, SIGNAL_TO_NOISE
from train.keys import KEYS
from train.logging import logger
from train.resume import check_same_run, find_scales, read_own
from train.run import fit, prepare, run
from train.tasks.base import Task

QUANTIZED, FP32_SAFETENSORS, FP32_ONNX, INT8_ONNX = "quantized.pth", "fp32.safetensors", "fp32.onnx", "int8.onnx"
INT8_END_TO_END = "int8_detections.onnx"

# What a method has no use for.
UNUSED = {
    "ptq": ("QUANT.DISTILL",),
    "qat": ("QUANT.CALIBRATOR", "QUANT.EQUALIZE", "QUANT.BIAS_CORRECTION"),
    "compare": ("QUANT.DISTILL", "QUANT.CALIBRATOR", "QUANT.EQUALIZE", "QUANT.BIAS_CORRECTION", "QUANT.FLOAT_LAYERS"),
}

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
        raise UserError(
            "how to quantize? --method ptq (after training), qat (by training on) or compare (all ways after training)"
        )
    if not cfg.MODEL.RESUME:
        raise UserError("a trained network is needed: --resume FILE")
    quantization.find_preset(cfg.QUANT.PRESET)
    if cfg.QUANT.CALIBRATOR is not None:
        quantization.check_calibrator(cfg.QUANT.CALIBRATOR)
    for name in UNUSED[cfg.QUANT.METHOD]:
        if (value := config.lookup(cfg, name)) != KEYS[name].default:
            raise UserError(f"{name} {value} is not of --method {cfg.QUANT.METHOD}: leave it out")
    settings = settings.with_defaults({"TAG": f"{cfg.QUANT.METHOD}-{cfg.QUANT.PRESET}"})
    if cfg.QUANT.METHOD != "qat":  # nothing is trained, and on GPUs histograms have no such algorithm
        job = compare if cfg.QUANT.METHOD == "compare" else quantize_network
        return run(settings.with_values({"DETERMINISTIC": False}), argv, program, job)
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
    trained = Trained(task, source)
    model, images = trained.model, trained.images
    if trains:
        check_batch_norms(task, model)
        if (size := task.training_size()) != images.shape[2:]:
            raise UserError(
                f"--method qat trains and evaluates at one size, and the images are {size[0]} x {size[1]} in training, "
                f"{images.shape[2]} x {images.shape[3]} in evaluation"
            )
    forms = {"fp32": trained.in_float()._replace(file=FP32_ONNX)}
    deployed = repopt.deploy(model)
    task, observed, prepared = trained.prepare(task)
    cfg = task.cfg
    whole = task.with_predictor(model, prepared)
    if trains:
        own = own_checkpoint(cfg, folder)
        scales = find_scales(task, model, own or source.content)
        del source  # its optimizer's state is as large as the network
        with distillation(task, prepared, task.predictor(deployed)) as added_loss:
            trainer = prepare(task, whole, scales, folder, own, added_loss)
            del own
            if not fit(trainer):
                return False
            del trainer
    int8 = quantization.convert(prepared)
    forms["INT8"] = trained.in_int8("INT8, torch", observed, int8)
    ratios = quantization.signal_to_noise(observed, int8, images.to(world.device))
    written = run_on_main(lambda: write_artifacts(artifacts, task, whole, deployed, int8, images, ratios))
    threads = max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    forms |= evaluate_files(trained, task, written, threads)
    run_on_main(lambda: publish(written, artifacts, COLUMNS[cfg.TASK], forms))
    integers = run_on_main(lambda: export.operations(artifacts / INT8_ONNX)["QLinearConv"])
    logger.info(f"onnxruntime runs {integers} convolutions on integers; the files are in {artifacts}")
    return True


def evaluate_files(trained: Trained, task: Task, written: Path, threads: int) -> dict[str, Form]:
    """Return what evaluations of the INT8 files find, by name."""
    in_model: dict[str, Callable[[nn.Module], nn.Module]] = {
        INT8_ONNX: functools.partial(task.with_predictor, trained.model),
        INT8_END_TO_END: task.with_end_to_end,
    }
    forms = {}
    for file in filter(lambda file: (written / file).is_file(), in_model):
        for runtime, network in in_runtimes(written / file, threads):
            name = f"INT8, {runtime}{', end to end' if file == INT8_END_TO_END else ''}"
            forms[name] = Form(trained.evaluate(name, in_model[file](network)), file)
    return forms


def in_runtimes(path: Path, threads: int) -> Iterator[tuple[str, nn.Module]]:
    """Yield an INT8 file in onnxruntime, and in OpenVINO where that is installed and can run it, by their names."""
    yield "onnxruntime", export.OnnxNetwork(path, threads)
    try:
        from repopt.openvino import OpenVinoNetwork  # an extra

        network = OpenVinoNetwork(path, threads)
    except UserError as error:
        logger.info(f"not evaluated in OpenVINO: {error}")
    else:
        yield "OpenVINO", network


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
    ratios: Mapping[str, float],
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
    new = new_folder(path)
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
