"""What a run goes on from: its checkpoint, and the scales it needs."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from yacs.config import CfgNode

import repopt
from repopt import BoundScales, checkpoint
from repopt.errors import UserError, shown
from repopt.models import Arch, parse_arch, same_arch
from repopt.scales import kept_scales, scales_of
from train import config
from train.checkpoint import RunFolder
from train.distributed import run_on_main
from train.keys import ARGUMENTS, CLASSIFY, KEYS, OF_IMAGES
from train.logging import logger
from train.pretrained import add_prefix
from train.tasks.base import Task
from train.trained import LoadedCheckpoint


def read_checkpoint(task: Task, folder: RunFolder) -> dict[str, Any] | None:
    """Return the checkpoint that is resumed, or None; every process reads the file once.

    What an earlier start of the same run left goes before --resume.

    Raises:
        UserError: it is of other classes, or --resume names that of a training that has no epoch left.
    """
    cfg = task.cfg
    own = read_own(cfg, folder)
    if own is None:
        content = checkpoint.read(cfg.MODEL.RESUME) if cfg.MODEL.RESUME else None
        if goes_on(content):
            check_classes(task, content, cfg.MODEL.RESUME)
            if isinstance(last := content.get("epoch"), int) and last + 1 >= cfg.TRAIN.EPOCHS:
                raise UserError(
                    f"{cfg.MODEL.RESUME!r} has trained {last + 1} epochs, and TRAIN.EPOCHS is {cfg.TRAIN.EPOCHS}: "
                    "nothing is left to train (more epochs train it on, --eval evaluates it)"
                )
        return content
    if cfg.MODEL.RESUME:
        logger.warning(f"this run goes on from its own checkpoint in {folder.path}, not from {cfg.MODEL.RESUME}")
    check_classes(task, own, str(folder.path))
    return own


def read_own(cfg: CfgNode, folder: RunFolder) -> dict[str, Any] | None:
    """Return what an earlier start of the same run left, or None; every process reads the file once."""
    content: dict[str, Any] | None = None

    def find() -> Path | None:
        nonlocal content
        path, content = (folder.newest() if cfg.TRAIN.AUTO_RESUME else None) or (None, None)
        return path

    path = run_on_main(find)
    if path is None:
        return None
    logger.info(f"resumed: {path}")
    return checkpoint.read(path) if content is None else content


def goes_on(content: Mapping[str, Any] | None) -> TypeGuard[Mapping[str, Any]]:
    """Return whether a checkpoint is a place in a training; else it gives its weights alone."""
    return content is not None and "optimizer" in content


# Keys that differ without a meaning for the training.
OF_A_START = ("MODEL.RESUME", "MODEL.PRETRAINED", "MODEL.WEIGHTS", "DATA.CLASSES", "OUTPUT", "TAG", "EVAL_MODE")


def check_same_run(cfg: CfgNode, content: Mapping[str, Any]) -> None:
    """Refuse to go on from another kind of run; log what else differs."""
    if not isinstance(content.get("config", {}), Mapping):
        raise UserError(f"cannot resume: the checkpoint's config is {shown(content['config'])}")
    arch = parse_arch(cfg.MODEL.ARCH)
    for key in KEYS:
        then, now = (config.lookup(source, key) for source in (content.get("config"), cfg))
        if then in (None, now) or (key == "MODEL.ARCH" and same_arch(str(then), arch)):
            continue
        if KEYS[key].immutable_on_resume:
            raise UserError(
                f"cannot resume: {key} was {shown(then)} in the checkpoint and is {now!r} now "
                "(another --tag begins anew)"
            )
        if key == "MODEL.PRETRAINED" and then and now:
            raise UserError(f"this run began with {shown(then)}, not with {now!r}: another --tag begins with that")
        if key == "TRAIN.SEARCH_EPOCHS" and "scales" in content:
            raise UserError(f"cannot resume: the scales are constants since {key} {then} ended, and it is {now} now")
        if key not in OF_A_START:
            logger.info(f"{key} was {shown(then)} before this start and is {now!r} now")


def check_classes(task: Task, content: Mapping[str, Any], path: str) -> None:
    """Refuse a checkpoint whose classes have other names than those of the data: its answers would be of others.

    One that has no names is taken, and so is data without.
    """
    then, now = content.get("classes"), task.classes
    if not isinstance(then, list) or not then or not now:
        return
    for number, (one, other) in enumerate(itertools.zip_longest(then, now)):
        if one != other:
            raise UserError(
                f"{path!r} was trained on other classes: its class {number} is {shown(one)}, that of DATA.DATA_PATH is "
                f"{shown(other)}"
            )


def check_network(cfg: CfgNode, content: Mapping[str, Any], path: str) -> None:
    """Raise a UserError where a checkpoint is of a network that is made of other arguments than the configuration's."""
    for key in ARGUMENTS:
        then, now = (config.lookup(source, key) for source in (content.get("config"), cfg))
        if then not in (None, now):
            raise UserError(f"{path!r} was trained with {key} {shown(then)}, and it is {now} now")


def match_images(task: Task, content: Mapping[str, Any], path: str) -> None:
    """Log how a classifier's images are made, and how that is to the run that wrote a checkpoint.

    Raises:
        UserError: the checkpoint is of other classes.
    """
    check_classes(task, content, path)
    log_images(task, content)


def log_images(task: Task, content: Mapping[str, Any]) -> None:
    """Log how a classifier's images are made, and how that is to the run that wrote a checkpoint."""
    if task.cfg.TASK != CLASSIFY:
        return
    parts = []
    for key in OF_IMAGES:
        then, now = (config.lookup(source, key) for source in (content.get("config"), task.cfg))
        origin = "" if then is None else " as it was trained" if then == now else f", where it was trained with {then}"
        parts.append(f"{key} {now}{origin}")
    logger.info("; ".join(parts))


def needs_scales(arch: Arch) -> bool:
    """Return whether searched scales make the model or its optimizer."""
    return arch.repopt or arch.mode == "csla"


def find_scales(
    task: Task, model: nn.Module, content: Mapping[str, Any] | None, pretrained: LoadedCheckpoint | None = None
) -> BoundScales | None:
    """Return the scales of a run that needs them, bound to its model.

    They are those kept in the checkpoint that it resumes, or else what TRAIN.CONSTANTS says.
    """
    cfg, path = task.cfg, task.cfg.TRAIN.SCALES_PATH
    if not needs_scales(task.arch):
        return None
    if cfg.TRAIN.SEARCH_EPOCHS and not (content is not None and "scales" in content):
        return None  # they are searched still
    if content is not None and "scales" in content:
        # A network of functions of kernels has none.
        found = checkpoint.state_dict_of({"scales": content["scales"]}, "scales") if content["scales"] else {}
        kept = repopt.bind(model, found)
        if path and Path(path).is_file():
            given = constants(task, model, repopt.load_scales(path))
            if any(not torch.equal(values, given.scales[name]) for name, values in kept.scales.items()):
                raise UserError(
                    f"cannot resume: TRAIN.SCALES_PATH: the scales of {path!r} are not those that this run began with"
                )
        return kept
    if path:
        searched = repopt.load_scales(path)
    elif cfg.TRAIN.CONSTANTS not in ("searched", "channel-mean"):
        searched = None
    elif pretrained is not None and kept_scales(pretrained.content):
        searched = scales_of(pretrained.content, pretrained.path)
    else:
        # A training that began with weights alone has none in its checkpoint, either.
        began_with = cfg.MODEL.PRETRAINED or config.lookup((content or {}).get("config"), "MODEL.PRETRAINED")
        if began_with and task.arch.repopt:
            rule = cfg.TRAIN.OPTIMIZER.NAME
            logger.info(f"{began_with} holds no scales, and there is no --scales-path: a plain {rule} trains")
            return None
        raise UserError(
            f"{cfg.MODEL.ARCH} needs searched scales: give --scales-path a scale file or the checkpoint of a "
            "hyper-search (TRAIN.SEARCH_EPOCHS auto searches in the training itself, TRAIN.CONSTANTS initial does "
            "without)"
        )
    return constants(task, model, searched)


def constants(task: Task, model: nn.Module, searched: Mapping[str, Tensor] | None) -> BoundScales:
    """Return the constant scales that the configuration asks for, made of searched ones where there are any."""
    named = None if searched is None else add_prefix(task, searched)
    return repopt.bind(model, named, source=task.cfg.TRAIN.CONSTANTS)
