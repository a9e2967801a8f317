"""What a run goes on from: its checkpoint, and the scales it needs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from yacs.config import CfgNode

import repopt
from repopt import checkpoint
from repopt.errors import UserError, shown
from repopt.models import Arch, same_arch
from train import config
from train.backbone import keeps_scales, placed
from train.logging import logger
from train.run_folder import RunFolder


def find_checkpoint(cfg: CfgNode, folder: RunFolder) -> Path | None:
    """What to resume: what an earlier start of the same run left (it goes before --resume), or --resume, or nothing."""
    own = folder.resumable() if cfg.TRAIN.AUTO_RESUME else None
    if own is None:
        return Path(cfg.MODEL.RESUME) if cfg.MODEL.RESUME else None
    if cfg.MODEL.RESUME:
        logger.warning(f"this run goes on from its own {own}, not from {cfg.MODEL.RESUME}")
    return own


def goes_on(content: Mapping[str, Any] | None) -> TypeGuard[Mapping[str, Any]]:
    """Whether a checkpoint is a place in a training; else it gives its weights alone."""
    return content is not None and "optimizer" in content


# Keys that differ without a meaning for the training.
OF_A_START = ("MODEL.RESUME", "MODEL.BACKBONE", "OUTPUT", "TAG", "EVAL_MODE")


def check_same_run(arch: Arch, cfg: CfgNode, content: Mapping[str, Any]) -> None:
    """Refuse to go on from another kind of run; log what else differs."""
    if not isinstance(content.get("config", {}), Mapping):
        raise UserError(f"cannot resume: the checkpoint's config is {shown(content['config'])}")
    for key in config.KEYS:
        then, now = (config.lookup(source, key) for source in (content.get("config"), cfg))
        if then in (None, now) or (key == "MODEL.ARCH" and same_arch(str(then), arch)):
            continue
        if config.KEYS[key].fixed:
            raise UserError(f"cannot resume: {key} was {shown(then)} in the checkpoint and is {now!r} now")
        if key not in OF_A_START:
            logger.info(f"{key} was {shown(then)} before this start and is {now!r} now")


def needs_scales(arch: Arch) -> bool:
    """Whether searched scales make the model or its optimizer."""
    return arch.repopt or arch.mode == "csla"


def find_scales(
    arch: Arch, cfg: CfgNode, model: nn.Module, content: Mapping[str, Any] | None
) -> Mapping[str, Tensor] | None:
    """The scales of a run that needs them: those kept in the checkpoint that it resumes, or TRAIN.CONSTANTS."""
    if not needs_scales(arch):
        return None
    path = cfg.TRAIN.SCALES_PATH
    if content is None or "scales" not in content:
        if cfg.TRAIN.CONSTANTS in ("searched", "channel-mean"):
            path = path or (cfg.MODEL.BACKBONE if keeps_scales(cfg.MODEL.BACKBONE) else None)
            if not path:
                raise UserError(
                    f"{cfg.MODEL.ARCH} needs searched scales: give --scales-path a scale file or the checkpoint of a "
                    f"hyper-search ({arch.model}-target-norepopt trains with the plain optimizer, TRAIN.CONSTANTS "
                    "initial does without a search)"
                )
        return constants(cfg, model, path)
    scales = repopt.fit_scales(model, checkpoint.state_dict_of({"scales": content["scales"]}, "scales"))
    if path and Path(path).is_file():
        given = constants(cfg, model, path)
        if any(not torch.equal(scales[name], given[name]) for name in scales):
            raise UserError(
                f"cannot resume: TRAIN.SCALES_PATH: the scales of {path!r} are not those that this run began with"
            )
    return scales


def constants(cfg: CfgNode, model: nn.Module, path: str | None) -> dict[str, Tensor]:
    """The constant scales that the configuration asks for, made of those at `path` where there are any."""
    searched = placed(repopt.load_scales(path), cfg) if path else None
    return repopt.constant_scales(model, cfg.TRAIN.CONSTANTS, searched)
