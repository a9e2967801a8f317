"""What a configuration means for one data set and architecture: filled in, checked, frozen."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from timm.models import get_pretrained_cfg
from yacs.config import CfgNode

from repopt import checkpoint
from repopt.errors import UserError, shown
from repopt.models import Arch, parse_arch
from train import config, tasks
from train.distributed import World
from train.file_names import CONFIG
from train.keys import AUTO, CLASSIFY, DETECT, KEYS, OF_IMAGES, OF_NETWORK
from train.resume import goes_on, needs_scales


def as_trained(settings: config.Settings) -> config.Settings:
    """Return the settings in which what nobody says is as in the checkpoint that is used.

    Of one that is evaluated, or quantized, that is its network and data set, too; and of one that is resumed, the order
    of its classes.

    Raises:
        UserError: there is no such file, it is no checkpoint, or there are two; or it is of another task.
    """
    cfg, given = settings
    keys: tuple[str, ...]
    if cfg.MODEL.PRETRAINED and cfg.MODEL.RESUME:
        raise UserError("--pretrained is where a training begins, and so is --resume (or what is evaluated): give one")
    if cfg.MODEL.PRETRAINED:
        keys, own = ("MODEL.ARCH", "MODEL.STRIDES", "MODEL.IN_CHANS", *OF_IMAGES), _config_of_beginning(cfg)
    elif cfg.MODEL.RESUME:
        content = checkpoint.read(cfg.MODEL.RESUME)
        own, is_used = content.get("config"), cfg.EVAL_MODE or bool(cfg.QUANT.METHOD)
        keys = (*OF_NETWORK, "DATA.VAL_FRACTION", *OF_IMAGES) if is_used else ()
        if is_used:
            _check_task(cfg, own)
        if isinstance(classes := content.get("classes"), list) and classes and (is_used or goes_on(content)):
            settings = settings.with_defaults({"DATA.CLASSES": classes})
    else:
        return settings
    taken = {key: value for key in keys if (value := config.lookup(own, key)) is not None}
    taken = {key: value for key, value in taken.items() if cfg.TASK in KEYS[key].tasks and key not in given}
    if "DATA.IMG_SIZE" in given:
        taken.pop("DATA.TEST_SIZE", None)
    channels = taken.get("MODEL.IN_CHANS", cfg.MODEL.IN_CHANS)
    for key in taken.keys() & {"DATA.MEAN", "DATA.STD"}:
        if len(taken[key]) != channels:  # of grey, the mean of the colours; of colours, grey thrice
            taken[key] = (sum(taken[key]) / len(taken[key]),) * channels
    return settings.with_values(taken)


def _check_task(cfg: CfgNode, own: object) -> None:
    """Raise a UserError where a checkpoint with this configuration is of another task, or a detector's, for INT8."""
    was = config.lookup(own, "TASK")
    if was is None:  # quantized as a classifier, and evaluated as what its weights fit
        was = CLASSIFY if cfg.QUANT.METHOD else cfg.TASK
    if cfg.QUANT.METHOD and DETECT in (was, cfg.TASK):
        raise UserError("a detector (TASK detect) cannot be quantized yet")
    if was != cfg.TASK:
        raise UserError(f"{cfg.MODEL.RESUME!r} is a checkpoint of TASK {shown(was)}, and TASK is {cfg.TASK} here")


def _config_of_beginning(cfg: CfgNode) -> object:
    """Return the configuration in MODEL.PRETRAINED; where it is gone, of the run that began with it and goes on.

    Of weights of timm's it is what timm says of its published ones.
    """
    before = Path(_output(cfg), CONFIG)
    if cfg.TRAIN.AUTO_RESUME and before.is_file() and not Path(cfg.MODEL.PRETRAINED).is_file():
        try:
            return json.loads(before.read_text())
        except ValueError:
            pass  # that there is no such file is what a user can mend
    content = checkpoint.read(cfg.MODEL.PRETRAINED)
    if "config" in content or not cfg.MODEL.ARCH.startswith("timm/"):
        return content.get("config")
    published = get_pretrained_cfg(parse_arch(cfg.MODEL.ARCH).model.removeprefix("timm/"))
    if published is None:
        return None
    found = {"MEAN": published.mean, "STD": published.std}
    known = KEYS["DATA.INTERPOLATION"].choices or ()
    return {"DATA": found | ({"INTERPOLATION": published.interpolation} if published.interpolation in known else {})}


def _output(cfg: CfgNode) -> str:
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
        "OUTPUT": _output(cfg),
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
