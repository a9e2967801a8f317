"""What a checkpoint that a run uses says for it: its network, data set and images, where nobody says otherwise."""

from __future__ import annotations

import json
from pathlib import Path

from timm.models import get_pretrained_cfg
from yacs.config import CfgNode

from repopt import checkpoint
from repopt.errors import UserError, shown
from repopt.models import parse_arch
from train import config
from train.file_names import CONFIG
from train.keys import CLASSIFY, KEYS, OF_IMAGES, OF_NETWORK
from train.resolve import output_folder
from train.resume import goes_on


def as_trained(settings: config.Settings) -> config.Settings:
    """Return the settings in which what nobody says is as in the checkpoint that is used: of one that is

    - begun with (MODEL.PRETRAINED): its architecture, and how images are made;
    - evaluated or quantized: its network, data set and classes, and how images are made;
    - resumed: its classes, in their order.

    Raises:
        UserError: there is no such file, it is no checkpoint, or there are two; or it is of another task.
    """
    cfg, given = settings
    keys: tuple[str, ...]
    if cfg.MODEL.PRETRAINED and cfg.MODEL.RESUME:
        raise UserError("--pretrained is where a training begins, and so is --resume (or what is evaluated): give one")
    if cfg.MODEL.PRETRAINED:
        keys, own = ("MODEL.ARCH", "MODEL.STRIDES", "MODEL.IN_CHANS", *OF_IMAGES), _config_of_pretrained(cfg)
    elif cfg.MODEL.RESUME:
        content = checkpoint.read(cfg.MODEL.RESUME)
        own, is_used = content.get("config"), cfg.EVAL_MODE or bool(cfg.QUANT.METHOD)
        keys = (*OF_NETWORK, "DATA.VAL_FRACTION", *OF_IMAGES) if is_used else ()
        if cfg.QUANT.METHOD:  # which trains all batch norms, or folds them
            keys = tuple(key for key in keys if key != "MODEL.FREEZE_BN")
        if is_used:
            settings = _of_task(settings, own)
            cfg = settings.cfg
        if isinstance(classes := content.get("classes"), list) and classes and (is_used or goes_on(content)):
            settings = settings.with_defaults({"DATA.CLASSES": classes})
    else:
        return settings
    taken = {key: value for key in keys if (value := config.lookup(own, key)) is not None}
    taken = {key: value for key, value in taken.items() if cfg.TASK in KEYS[key].tasks and key not in given}
    if "DATA.IMG_SIZE" in given:
        taken.pop("DATA.TEST_SIZE", None)
    settings = settings.with_values(taken)
    numbers = {key: config.lookup(settings.cfg, key) for key in ("DATA.MEAN", "DATA.STD") if key in taken}
    channels = settings.cfg.MODEL.IN_CHANS  # of grey, the mean of the colours; of colours, grey thrice
    return settings.with_values(
        {key: (sum(n) / len(n),) * channels for key, n in numbers.items() if len(n) != channels}
    )


def _of_task(settings: config.Settings, own: object) -> config.Settings:
    """Return the settings of a checkpoint's task, where nobody says which one is quantized.

    Args:
        settings: of the run.
        own: the checkpoint's configuration.

    Raises:
        UserError: the checkpoint is of another task.
    """
    cfg, was = settings.cfg, config.lookup(own, "TASK")
    if was is None:  # quantized as a classifier, and evaluated as what its weights fit
        was = CLASSIFY if cfg.QUANT.METHOD else cfg.TASK
    if was == cfg.TASK:
        return settings
    if cfg.QUANT.METHOD and "TASK" not in settings.given:
        return settings.with_values({"TASK": was})
    raise UserError(f"{cfg.MODEL.RESUME!r} is a checkpoint of TASK {shown(was)}, and TASK is {cfg.TASK} here")


def _config_of_pretrained(cfg: CfgNode) -> object:
    """Return the configuration in MODEL.PRETRAINED; where it is gone, of the run that began with it and goes on.

    Of weights of timm's it is what timm says of its published ones.
    """
    before = Path(output_folder(cfg), CONFIG)
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
