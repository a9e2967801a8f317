"""To INT8: a trained checkpoint in, a quantized network and its files out (scripts/quantize.py)."""

from __future__ import annotations

import functools
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from tqdm import tqdm
from yacs.config import CfgNode

import data
import repopt
from repopt import checkpoint, export, quantize
from repopt.errors import UserError, shown
from repopt.models import Arch, parse_arch
from train import config, tasks, trained
from train.distributed import World, decided_by_first, world
from train.evaluation.base import Evaluate, Result
from train.files import ARTIFACTS, COLUMNS, RESULTS, SIGNAL_TO_NOISE, Column
from train.logging import as_json, logger
from train.placement import to_device
from train.precision import Precision
from train.resolve import resolve
from train.resume import check_same_run, find_scales
from train.run import begin, fit, keep_settings
from train.run_folder import RunFolder

QUANTIZED, FP32_SAFETENSORS, FP32_ONNX, INT8_ONNX = "quantized.pth", "fp32.safetensors", "fp32.onnx", "int8.onnx"

# What training for INT8 goes without, and what these keys may be: autocast rounds otherwise, and the exported graph is
# changed between training and evaluation.
QAT_TAKES = {
    "TASK": (config.CLASSIFY,),
    "TRAIN.EMA_ALPHA": (0.0,),
    "TRAIN.USE_CHECKPOINT": (False,),
    "TRAIN.SYNC_BN": (False,),
    "TRAIN.COMPILE": ("off", "auto"),
    "AMP_OPT_LEVEL": ("O0", ""),
}


def start(settings: config.Settings, argv: Sequence[str]) -> bool:
    """Do what the command line `argv`, read as `settings`, says; whether it came to its end.

    It does not where a signal stopped the training, which is saved then.

    Raises:
        UserError: a mistake of the user's.
        OSError: of the machine: no permission, no space, a path that is none.
    """
    cfg, given = settings
    if not cfg.QUANT.METHOD:
        raise UserError("how to quantize? --method ptq (after training) or --method qat (by training on)")
    if not cfg.MODEL.RESUME:
        raise UserError("a trained network is needed: --resume FILE")
    quantize.find_preset(cfg.QUANT.PRESET)
    if cfg.TASK == config.DETECT:
        raise UserError("TASK detect cannot be quantized: what a detector computes depends on what it has found")
    if "TAG" not in given:
        cfg.TAG = f"{cfg.QUANT.METHOD}-{cfg.QUANT.PRESET}"
    arch = parse_arch(cfg.MODEL.ARCH)
    if cfg.QUANT.METHOD == "qat":
        settle_for_qat(cfg)
    else:
        cfg.DETERMINISTIC = False  # nothing is trained, and on GPUs histograms have no such algorithm
    with world() as here:
        return run(arch, resolve(arch, settings), here, argv)


def settle_for_qat(cfg: CfgNode) -> None:
    """Refuse what quantization-aware training does not take, and decide what was left open."""
    for name, allowed in QAT_TAKES.items():
        if (value := config.lookup(cfg, name)) not in allowed:
            raise UserError(f"--method qat takes {name} {allowed[0]} only, not {value}")
    cfg.TRAIN.COMPILE, cfg.AMP_OPT_LEVEL = "off", "O0"


def run(arch: Arch, cfg: CfgNode, world: World, argv: Sequence[str]) -> bool:
    """Quantize, evaluate before and after, and write the files; whether it came to its end."""
    qat, task = cfg.QUANT.METHOD == "qat", tasks.of(cfg)
    if qat and cfg.DATA.IMG_SIZE != cfg.DATA.TEST_SIZE:
        raise UserError(
            f"--method qat trains and evaluates at one size: DATA.IMG_SIZE is {cfg.DATA.IMG_SIZE}, DATA.TEST_SIZE "
            f"{cfg.DATA.TEST_SIZE}"
        )
    artifacts = Path(cfg.OUTPUT, ARTIFACTS)
    decided_by_first(lambda: export.refuse_existing(artifacts))
    folder = begin("quantize.py", cfg, world, argv)
    if not qat:  # a training keeps them when it is sure to go on
        keep_settings(cfg, world, folder)
    logger.info(f"{cfg.QUANT.PRESET}: {quantize.find_preset(cfg.QUANT.PRESET).meaning}")
    source = trained.read(cfg.MODEL.RESUME, cfg.MODEL.ARCH)
    if (was := source.setting("TASK") or config.CLASSIFY) != cfg.TASK:
        raise UserError(f"{cfg.MODEL.RESUME!r} is a checkpoint of TASK {shown(was)}, and this recipe's is {cfg.TASK}")
    model = to_device(source.network(cfg.MODEL.NUM_CLASSES), world)
    loader = task.eval_loader(cfg, world)
    images = decided_by_first(lambda: task.seen(cfg, next(iter(loader))[0])[:16].cpu())
    batches = OfOneSize(loader, task, cfg, images.shape[2:])
    evaluated = functools.partial(evaluate, task.evaluate(cfg), batches, world)
    results = {"fp32": evaluated("fp32", model)}
    float_network = repopt.deploy(model)
    own = own_checkpoint(arch, cfg, folder) if qat else None
    scales = find_scales(arch, cfg, model, own or source.content) if qat else None
    del source  # its optimizer's state is as large as the network
    observed = quantize.prepare(model, images[:1].to(world.device), cfg.QUANT.METHOD, cfg.QUANT.PRESET)
    calibrate(observed, OfOneSize(task.calibration_loader(cfg, world), task, cfg, images.shape[2:]), world)
    if qat and not fit(arch, cfg, world, observed, scales, folder, own):
        return False
    int8 = quantize.convert(observed)
    results["INT8"] = evaluated("INT8, torch", int8)
    written = decided_by_first(lambda: write_artifacts(artifacts, cfg, observed, float_network, int8, images))
    threads = max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    in_onnxruntime = export.OnnxNetwork(written / INT8_ONNX, threads)
    results["INT8, onnxruntime"] = evaluated("INT8, onnxruntime", in_onnxruntime)
    decided_by_first(lambda: finish(written, artifacts, COLUMNS[cfg.TASK], results))
    return True


class OfOneSize:
    """The batches of a loader; UserError at one of another size than the network is quantized for."""

    def __init__(self, loader: data.Loader, task: tasks.Task, cfg: CfgNode, size: Sequence[int]) -> None:
        self._loader, self._task, self._cfg, self._size = loader, task, cfg, tuple(size)

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for images, targets in self._loader:
            size = tuple(self.seen(images).shape[2:])
            if size != self._size:
                raise UserError(
                    f"the network is quantized for images of {self._size[0]} x {self._size[1]}, and there are others, "
                    f"which it would see as {size[0]} x {size[1]}"
                )
            yield images, targets

    def seen(self, images: Tensor) -> Tensor:
        """What the network sees at once of a batch."""
        return self._task.seen(self._cfg, images)


def evaluate(by: Evaluate, batches: OfOneSize, world: World, name: str, model: nn.Module) -> Result:
    """What an evaluation finds, logged."""
    result = by(model, shown_while(name, batches, world), Precision(world.device))
    assert result is not None, "nothing stops it"
    logger.info(f"{name}: {result}")
    return result


def calibrate(observed: quantize.Observed, batches: OfOneSize, world: World) -> None:
    """Let the network see the images that choose its ranges."""
    shown = shown_while("calibration", batches, world)
    quantize.calibrate(observed, (batches.seen(images) for images, _ in shown))


def shown_while(doing: str, batches: OfOneSize, world: World) -> Iterable[tuple[Tensor, Tensor]]:
    """Batches, with their progress on the first process's terminal."""
    return tqdm(batches, desc=doing, unit="batch", leave=False, disable=None if world.is_main else True)


def own_checkpoint(arch: Arch, cfg: CfgNode, folder: RunFolder) -> Mapping[str, Any] | None:
    """What an earlier start of this training left.

    Raises:
        UserError: it was another training, or began with another network.
    """
    path = decided_by_first(folder.resumable) if cfg.TRAIN.AUTO_RESUME else None
    if path is None:
        return None
    content = checkpoint.read(path)
    check_same_run(arch, cfg, content)
    if (began_with := config.lookup(content.get("config"), "MODEL.RESUME")) != cfg.MODEL.RESUME:
        raise UserError(
            f"cannot resume: the training in {str(folder.path)!r} began with {shown(began_with)}, not with "
            f"{cfg.MODEL.RESUME!r}; give this one another --tag"
        )
    return content


def write_artifacts(
    path: Path,
    cfg: CfgNode,
    observed: quantize.Observed,
    float_network: nn.Module,
    int8: quantize.Int8,
    images: Tensor,
) -> Path:
    """Write the files of both networks to a folder beside `path`, and check them; that folder."""
    beside = path.with_name(f"{path.name}.writing")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    try:
        content = {"model": observed.state_dict(), "config": config.as_dict(cfg), "image_size": list(images.shape[2:])}
        checkpoint.write(content, beside / QUANTIZED)
        write_json(quantize.signal_to_noise(observed.cpu(), int8.cpu(), images), beside / SIGNAL_TO_NOISE)
        export.write_safetensors(float_network.cpu(), beside / FP32_SAFETENSORS)
        for network, name in ((float_network, FP32_ONNX), (int8, INT8_ONNX)):
            difference = export.write_onnx(network, images, beside / name)
            logger.info(f"{name}: onnxruntime's outputs differ from torch's by {difference:.1e} (relative)")
    except UserError:
        shutil.rmtree(beside)
        raise
    return beside


def finish(written: Path, path: Path, columns: Sequence[Column], results: Mapping[str, Result]) -> None:
    """Compare the networks, and let the files have their place."""
    lines = [
        f"| network | {' | '.join(column.head for column in columns)} | file (MB) |",
        "|" + "---|" * (len(columns) + 2),
    ]
    files = {"fp32": FP32_ONNX, "INT8, onnxruntime": INT8_ONNX}
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
