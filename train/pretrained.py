"""Weights of another training as the beginning of this one: of the same network, or of a classifier as its backbone."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch
from torch import Tensor, nn

import repopt
from repopt import checkpoint
from repopt.errors import UserError, shown
from repopt.layers import MODES
from repopt.load import error_context
from repopt.models import baselines, without_values
from train import config, trained
from train.keys import CLASSIFY, DETECT
from train.logging import listed, logger
from train.placement import to_device
from train.tasks.base import Task


def read(task: Task, path: str) -> trained.LoadedCheckpoint:
    """Return a checkpoint of the task's network, or of a multi-branch one, merged, that it is the plain form of.

    Raises:
        UserError: it is no checkpoint, or one of another task, architecture or function.
    """
    cfg = task.cfg
    source = _identified(task, trained.read(path, fallback=cfg.MODEL.ARCH, weights=cfg.MODEL.WEIGHTS))
    _check(task, source)
    return source if source.arch.mode == task.arch.mode else _merged(task, source)


def _identified(task: Task, source: trained.LoadedCheckpoint) -> trained.LoadedCheckpoint:
    """Return weights alone as those of the baseline of a target network, where they have its names."""
    if source.setting("MODEL.ARCH") is None and task.arch.mode == "target":
        names = checkpoint.state_dict_of(source.content, source.weights).keys()
        for name, arch in baselines(task.arch.model).items():
            network = functools.partial(repopt.create_model, arch.model, mode=arch.mode, num_classes=1)
            if without_values(network).state_dict().keys() <= names:
                return source._replace(name=name, arch=arch)
    return source


def _merged(task: Task, source: trained.LoadedCheckpoint) -> trained.LoadedCheckpoint:
    """Return the checkpoint of a baseline as that of a target network, with its scales (`repopt.merge_branches`)."""
    if task.cfg.TASK == DETECT:
        raise UserError(f"{source.path!r} has branches, which are merged for a classifier or a segmentation network")
    plain = repopt.merge_branches(to_device(source.network(), task.world), task.first_training_images())
    logger.info(
        f"{source.path}: the branches of {source.name} are merged, training images give the batch norms their "
        "statistics, and the scales are constants"
    )
    known = {key: source.content[key] for key in ("config", "classes") if key in source.content}
    content = {**known, source.weights: plain.model.state_dict(), "scales": plain.scales}
    return source._replace(name=task.cfg.MODEL.ARCH, arch=task.arch, content=content)


def load(task: Task, model: nn.Module, source: trained.LoadedCheckpoint) -> None:
    """Give a network the weights of a file, as far as they are of its architecture, and log what is new.

    New are the tensors that depend on the number of classes, unless the classes are the same, and those of another
    shape. In a network with a classifier's backbone, all else is new.

    Raises:
        UserError: names are missing or unknown, or no kernel fits.
    """
    path = source.path
    logger.info(f"begins with {checkpoint.WEIGHTS[source.weights]} of {path}")
    weights = checkpoint.state_dict_of(source.content, source.weights)
    if (source.setting("TASK") or CLASSIFY) == task.cfg.TASK:
        head = of_classes(task, model)
        if task.classes and list(task.classes) == source.content.get("classes"):
            head = set()
        new = _fit(model, {name: value for name, value in weights.items() if name not in head}, path, head)
        if new:
            logger.info(f"new: {listed(new)}")
        return
    body = model.get_submodule(task.backbone_path)
    own = body.state_dict()
    if unnamed := [name for name in own if name not in weights]:
        raise UserError(
            f"the weights of {path!r} have no places in the backbone, which has {unnamed[0]!r} and others: "
            f"timm's features of some networks go by other names than their classifiers'"
        )
    new = _fit(body, {name: weights.pop(name) for name in own}, path, set())
    left = listed([*weights])
    logger.info(
        f"backbone: {len(own) - len(new)} tensors of {path}; left out, since they are of the classifier: {left}"
    )


def of_classes(task: Task, model: nn.Module) -> set[str]:
    """Return the names of the tensors whose shapes depend on the number of classes."""
    more = {"MODEL.NUM_CLASSES": task.cfg.MODEL.NUM_CLASSES + 1}
    other = type(task)(config.Settings(task.cfg, frozenset()).with_values(more).cfg, task.world)
    shapes = {name: value.shape for name, value in without_values(other.network).state_dict().items()}
    return {name for name, value in model.state_dict().items() if value.shape != shapes[name]}


def check_scales(model: nn.Module, scales: repopt.BoundScales, path: str) -> None:
    """Raise a UserError where a network with constant scales has, from a file, others than its training is to have."""
    own = repopt.extract_scales(model)
    if any(not torch.equal(own[name], values.to(own[name])) for name, values in scales.scales.items()):
        raise UserError(f"the scales of {path!r} are not those of --scales-path: leave one of the two out")


def add_prefix(task: Task, scales: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return scales by the names of the task's network, also where they are those of a classifier."""
    prefix = f"{task.backbone_path}." if task.backbone_path else ""
    if any(name.startswith(prefix) for name in scales):
        return scales
    return {f"{prefix}{name}": values for name, values in scales.items()}


def _check(task: Task, source: trained.LoadedCheckpoint) -> None:
    """Raise a UserError where a file is of another task, architecture or function."""
    path, name, strides = source.path, task.cfg.MODEL.ARCH, task.cfg.MODEL.STRIDES
    if (was := source.setting("TASK")) not in (None, CLASSIFY, task.cfg.TASK):
        raise UserError(
            f"{path!r} is a checkpoint of TASK {shown(was)}: this training begins with one of {task.cfg.TASK}, or its "
            "backbone with a classifier's"
        )
    if source.quantized:
        raise UserError(f"{path!r} holds a quantized network: give the checkpoint that it was made of")
    merges = task.arch.mode == "target" and source.arch.mode not in MODES  # a baseline's branches
    if source.arch.model != task.arch.model or not (merges or source.arch.mode == task.arch.mode):
        raise UserError(f"{path!r} is a checkpoint of {shown(source.name)}, whose layers are not those of {name}")
    channels = source.settings("MODEL.IN_CHANS").MODEL.IN_CHANS
    if source.arch.mode != task.arch.mode and channels != task.cfg.MODEL.IN_CHANS:
        raise UserError(
            f"{path!r} has branches for images of {channels} channels, and they have {task.cfg.MODEL.IN_CHANS} now"
        )
    if (then := source.settings("MODEL.STRIDES").MODEL.STRIDES) != strides:
        raise UserError(f"{path!r} was trained with MODEL.STRIDES {then}, and they are {strides} now")


def _fit(model: nn.Module, weights: Mapping[str, Tensor], path: str, head: set[str]) -> list[str]:
    """Load weights into a network but for those of other shapes; return the names of what stays as it was.

    Raises:
        UserError: names other than the head's are missing or unknown, or no kernel is of the network's shape.
    """
    own = model.state_dict()
    weights = {name: _of_grey(value, own[name]) if name in own else value for name, value in weights.items()}
    other = [name for name, value in weights.items() if name in own and own[name].shape != value.shape]
    kept = [name for name in own if name in head and name not in weights]
    taken = {name: value for name, value in weights.items() if name not in other}
    if not any(value.dim() > 1 and name in own for name, value in taken.items()):
        raise UserError(f"no kernel of {path!r} has the name and shape of one of {type(model).__name__}'s")
    with error_context(path):
        repopt.load_weights(model, {name: own[name] for name in (*other, *kept)} | taken)
    if other:
        logger.warning(f"of another shape in {path}, and so new: {listed(other)}")
    return other + kept


def _of_grey(kernel: Tensor, own: Tensor) -> Tensor:
    """Return a kernel for colours as one for grey, which is three equal colours, where the network has such a one."""
    for_grey = kernel.dim() == own.dim() == 4 and kernel.shape[1] == 3 and own.shape[1] == 1
    return kernel.sum(1, keepdim=True) if for_grey and kernel.shape[0] == own.shape[0] else kernel
