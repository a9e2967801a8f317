"""What a configuration means for one data set and architecture: filled in, checked, frozen."""

from __future__ import annotations

from pathlib import Path

import torch
from yacs.config import CfgNode

from repopt.errors import UserError
from repopt.models import Arch, parse_arch
from train import config, tasks
from train.distributed import World
from train.keys import AUTO, KEYS
from train.resume import needs_scales


def output_folder(cfg: CfgNode) -> str:
    """Return the folder of a run."""
    return str(Path(cfg.OUTPUT or "output", cfg.MODEL.ARCH, cfg.TAG))


def resolve(settings: config.Settings) -> CfgNode:
    """Return a new, frozen configuration with what follows from the data set and other keys.

    Raises:
        UserError: keys contradict each other or the data set.
    """
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
    for key in ("TRAIN.FREEZE", "TRAIN.HEAD_LR", "TRAIN.LAYER_DECAY"):
        if arch.mode == "hs" and config.lookup(cfg, key) != KEYS[key].default:
            raise UserError(f"a search begins with all layers, which learn alike: leave {key} out")
    if cfg.TRAIN.FREEZE and cfg.TRAIN.SEARCH_EPOCHS:
        raise UserError("scales are searched in all layers: TRAIN.SEARCH_EPOCHS goes without TRAIN.FREEZE")
    if cfg.TRAIN.HEAD_LR is not None and not cfg.TRAIN.BASE_LR:
        raise UserError("TRAIN.HEAD_LR is beside a TRAIN.BASE_LR above 0; TRAIN.FREEZE trains the head alone")
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
        "OUTPUT": output_folder(cfg),
    }
    settings = settings.with_values(values | tasks.task_class(cfg.TASK).finalize(cfg, given))
    images = tasks.create(settings.cfg, World(0, 1, torch.device("cpu"))).images(training=False)
    return settings.with_values({"DATA.MEAN": images.spec.mean, "DATA.STD": images.spec.std}).cfg


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
