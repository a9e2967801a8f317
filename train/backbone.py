"""A classifier's checkpoint as the beginning of a network that has its layers as backbone."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from yacs.config import CfgNode

import repopt
from repopt.errors import UserError, shown
from train import trained
from train.keys import CLASSIFY
from train.logging import logger
from train.tasks.base import Task


def read(cfg: CfgNode) -> trained.LoadedCheckpoint:
    """Return the classifier at MODEL.BACKBONE.

    Raises:
        UserError: it is no checkpoint, or one of another model.
    """
    return trained.read(cfg.MODEL.BACKBONE, fallback=cfg.MODEL.ARCH, weights=cfg.MODEL.WEIGHTS)


def load(task: Task, model: nn.Module, source: trained.LoadedCheckpoint) -> None:
    """Give a network's backbone the weights of a classifier, and log what is left out.

    Raises:
        UserError: it is not the checkpoint of a classifier of the same model, mode and strides.
    """
    path, name, strides = source.path, task.cfg.MODEL.ARCH, task.cfg.MODEL.STRIDES
    if (trained_for := source.setting("TASK")) not in (None, CLASSIFY):
        raise UserError(
            f"{path!r} is a checkpoint of TASK {shown(trained_for)}: a backbone begins with a classifier's weights"
        )
    if (source.arch.model, source.arch.mode) != (task.arch.model, task.arch.mode):
        raise UserError(f"{path!r} is a checkpoint of {shown(source.name)}, whose layers are not those of {name}")
    if (then := source.settings("MODEL.STRIDES").MODEL.STRIDES) != strides:
        raise UserError(f"{path!r} was trained with MODEL.STRIDES {then}, and the backbone's are {strides}")
    weights = source.network().state_dict()
    body = model.get_submodule(task.backbone_path)
    if unnamed := [key for key in body.state_dict() if key not in weights]:
        raise UserError(
            f"the weights of {path!r} have no places in the backbone: timm's features of {name} go by other names than "
            f"its classifier's, such as {unnamed[0]!r}"
        )
    taken = {key: weights.pop(key) for key in body.state_dict()}
    repopt.load_weights(body, taken)
    logger.info(f"backbone: {trained.WEIGHTS[source.weights]} of {path}")
    logger.info(
        f"backbone: {len(taken)} tensors of {path}; left out, since they are of the classifier: {', '.join(weights)}"
    )


def add_prefix(task: Task, scales: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return scales by the names of the task's network, also where they are those of a classifier."""
    prefix = f"{task.backbone_path}." if task.backbone_path else ""
    if any(name.startswith(prefix) for name in scales):
        return scales
    return {f"{prefix}{name}": values for name, values in scales.items()}
