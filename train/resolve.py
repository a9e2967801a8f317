"""What a configuration means for one data set and architecture: filled in, checked, frozen."""

from __future__ import annotations

from pathlib import Path

from yacs.config import CfgNode

from repopt import checkpoint
from repopt.errors import UserError
from repopt.models import Arch, parse_arch
from train import config, tasks
from train.keys import AUTO, KEYS, OF_IMAGES
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
        raise UserError(
            "MODEL.PRIOR is of another library's network without branches of its own (timm/resnet18-target), not of "
            f"{cfg.MODEL.ARCH}"
        )
    for key in ("MODEL.STRIDES", "MODEL.INITIAL_SCALES"):
        if arch.of_library and config.lookup(cfg, key) != KEYS[key].default:
            raise UserError(f"{key} is of our networks, and {cfg.MODEL.ARCH} is of another library: leave it out")
    if cfg.TRAIN.SEARCH_EPOCHS:
        _check_search(cfg, arch)
    if cfg.MODEL.BACKBONE and cfg.MODEL.RESUME:
        raise UserError("--backbone is where a training begins, and so is --resume (or what is evaluated): give one")
    if cfg.TRAIN.WARMUP_STEPS is not None and "TRAIN.WARMUP_EPOCHS" in given:
        raise UserError(
            f"the warm-up has TRAIN.WARMUP_STEPS {cfg.TRAIN.WARMUP_STEPS}, which goes before TRAIN.WARMUP_EPOCHS: "
            "set it to None"
        )
    for key in sorted(given):
        if cfg.TASK not in (takes := KEYS[key].tasks):
            raise UserError(f"{key} is for TASK {' and '.join(takes)}, and this one is {cfg.TASK}: leave it out")
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
    """Return the settings in which images of an evaluation or quantization are those that the checkpoint is used to."""
    cfg, given = settings
    if not cfg.MODEL.RESUME or not (cfg.EVAL_MODE or cfg.QUANT.METHOD):
        return settings
    own = checkpoint.read(cfg.MODEL.RESUME).get("config")
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
