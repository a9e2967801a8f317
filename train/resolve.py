"""What a configuration means for one data set and architecture: filled in, checked, frozen."""

from __future__ import annotations

from pathlib import Path

from yacs.config import CfgNode

from repopt import checkpoint
from repopt.errors import UserError, shown
from repopt.models import Arch, parse_arch
from train import config, tasks
from train.keys import AUTO, CLASSIFY, DETECT, KEYS, OF_IMAGES
from train.resume import needs_scales


def resolve(settings: config.Settings) -> CfgNode:
    """Return a new, frozen configuration with what follows from the data set and other keys.

    Raises:
        UserError: keys contradict each other or the data set.
    """
    settings = _as_trained(settings)
    cfg, given = settings
    arch = parse_arch(cfg.MODEL.ARCH)
    if cfg.EVAL_MODE and not cfg.MODEL.RESUME:
        raise UserError("--eval needs the weights to evaluate: --resume FILE")
    if cfg.TRAIN.SCALES_PATH and not needs_scales(arch):
        raise UserError(f"{cfg.MODEL.ARCH} takes no searched scales: leave --scales-path out, or train a -target")
    for key, takes_it in (
        ("TRAIN.CONSTANTS", needs_scales(arch)),
        ("TRAIN.CHANGE_INITIALIZATION", arch.repopt),
        ("TRAIN.CHANGE_GRADIENTS", arch.repopt),
    ):
        if not takes_it and config.lookup(cfg, key) != KEYS[key].default:
            raise UserError(f"{key} is of a RepOptimizer, and {cfg.MODEL.ARCH} is trained without: leave it out")
    if "MODEL.PRIOR" in given and not arch.takes_prior:
        raise UserError(f"MODEL.PRIOR is of another library's network (timm/NAME-target), not of {cfg.MODEL.ARCH}")
    if cfg.TRAIN.SEARCH_EPOCHS:
        _check_search(cfg, arch)
    if cfg.MODEL.BACKBONE and cfg.MODEL.RESUME:
        raise UserError("--backbone is where a training begins, and so is --resume (or what is evaluated): give one")
    for key in sorted(given):
        if cfg.TASK not in (takes := KEYS[key].tasks):
            raise UserError(f"{key} is for TASK {' and '.join(takes)}, and this one is {cfg.TASK}: leave it out")
        other = KEYS[key].excludes
        if other in given and None not in (config.lookup(cfg, key), config.lookup(cfg, other)):
            raise UserError(f"{key} and {other} are given side by side, and say the same otherwise: give one")
    if cfg.TRAIN.START_EPOCH >= cfg.TRAIN.EPOCHS:
        raise UserError(
            f"TRAIN.START_EPOCH {cfg.TRAIN.START_EPOCH} leaves none of {cfg.TRAIN.EPOCHS} TRAIN.EPOCHS to train"
        )
    values = {
        "DATA.TEST_BATCH_SIZE": cfg.DATA.TEST_BATCH_SIZE or cfg.DATA.BATCH_SIZE,
        "TRAIN.ACCUMULATION_STEPS": max(1, cfg.TRAIN.ACCUMULATION_STEPS),
        "OUTPUT": str(Path(cfg.OUTPUT or "output", cfg.MODEL.ARCH, cfg.TAG)),
    }
    return settings.with_values(values | tasks.task_class(cfg.TASK).finalize(cfg, given)).cfg


def _as_trained(settings: config.Settings) -> config.Settings:
    """Return the settings in which images of an evaluation or quantization are those that the checkpoint is used to.

    Raises:
        UserError: the checkpoint is of another task, or a detector that is to be quantized.
    """
    cfg, given = settings
    if not cfg.MODEL.RESUME or not (cfg.EVAL_MODE or cfg.QUANT.METHOD):
        return settings
    own = checkpoint.read(cfg.MODEL.RESUME).get("config")
    was = config.lookup(own, "TASK")
    if was is None:  # quantized as a classifier, and evaluated as what its weights fit
        was = CLASSIFY if cfg.QUANT.METHOD else cfg.TASK
    if cfg.QUANT.METHOD and DETECT in (was, cfg.TASK):
        raise UserError("a detector (TASK detect) cannot be quantized: what it computes depends on what it has found")
    if was != cfg.TASK:
        raise UserError(f"{cfg.MODEL.RESUME!r} is a checkpoint of TASK {shown(was)}, and TASK is {cfg.TASK} here")
    taken = (key for key in OF_IMAGES if key != "DATA.TEST_SIZE" or "DATA.IMG_SIZE" not in given)
    return settings.with_defaults({key: value for key in taken if (value := config.lookup(own, key)) is not None})


def _check_search(cfg: CfgNode, arch: Arch) -> None:
    """Raise a UserError where scales cannot be searched in the training itself."""
    if not arch.repopt:
        raise UserError(f"TRAIN.SEARCH_EPOCHS is of a -target that a RepOptimizer trains, not of {cfg.MODEL.ARCH}")
    if cfg.TRAIN.SCALES_PATH:
        raise UserError("the scales come from --scales-path or from TRAIN.SEARCH_EPOCHS, not from both")
    if cfg.TRAIN.SEARCH_EPOCHS != AUTO and cfg.TRAIN.SEARCH_EPOCHS > cfg.TRAIN.EPOCHS:
        raise UserError(f"TRAIN.SEARCH_EPOCHS {cfg.TRAIN.SEARCH_EPOCHS} is more than TRAIN.EPOCHS {cfg.TRAIN.EPOCHS}")
    if cfg.QUANT.METHOD:
        raise UserError("TRAIN.SEARCH_EPOCHS is of a training from the beginning, not of one for INT8: leave it out")
    for key in ("TRAIN.CONSTANTS", "TRAIN.CHANGE_INITIALIZATION", "TRAIN.CHANGE_GRADIENTS"):
        if config.lookup(cfg, key) != KEYS[key].default:
            raise UserError(f"{key} is of constants that are known from the beginning: leave it or SEARCH_EPOCHS out")
