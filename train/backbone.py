"""A classifier's checkpoint as the beginning of a network that has its layers as backbone."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from yacs.config import CfgNode

import repopt
from repopt import checkpoint
from repopt.errors import UserError, shown
from repopt.models import Arch
from train import config, tasks, trained
from train.logging import logger


def load(arch: Arch, cfg: CfgNode, model: nn.Module) -> None:
    """Give a network's backbone the weights of the classifier at MODEL.BACKBONE, and log what is left out.

    Raises:
        UserError: it is not the checkpoint of a classifier of the same model, mode and strides.
    """
    path, name = cfg.MODEL.BACKBONE, cfg.MODEL.ARCH
    source = trained.read(path, fallback=name)
    if (task := source.setting("TASK")) not in (None, config.CLASSIFY):
        raise UserError(
            f"{path!r} is a checkpoint of TASK {shown(task)}: a backbone begins with a classifier's weights"
        )
    if (source.arch.model, source.arch.mode) != (arch.model, arch.mode):
        raise UserError(f"{path!r} is a checkpoint of {shown(source.name)}, whose layers are not those of {name}")
    if (strides := source.settings("MODEL.STRIDES").MODEL.STRIDES) != cfg.MODEL.STRIDES:
        raise UserError(
            f"{path!r} was trained with MODEL.STRIDES {strides}, and the backbone's are {cfg.MODEL.STRIDES}"
        )
    weights = source.network().state_dict()
    body = model.get_submodule(tasks.of(cfg).body)
    if unnamed := [key for key in body.state_dict() if key not in weights]:
        raise UserError(
            f"the weights of {path!r} have no places in the backbone: timm's features of {name} go by other names than "
            f"its classifier's, such as {unnamed[0]!r}"
        )
    taken = {key: weights.pop(key) for key in body.state_dict()}
    repopt.load_weights(body, taken)
    logger.info(
        f"backbone: {len(taken)} tensors of {path}; left out, since they are of the classifier: {', '.join(weights)}"
    )


def keeps_scales(path: str) -> bool:
    """Whether a classifier's checkpoint keeps the scales of its RepOptimizer."""
    return bool(path) and "scales" in checkpoint.read(path)


def placed(scales: Mapping[str, Tensor], cfg: CfgNode) -> Mapping[str, Tensor]:
    """Scales by the names of the task's network, also where they are those of a classifier."""
    body = tasks.of(cfg).body
    if not body or any(name.startswith(f"{body}.") for name in scales):
        return scales
    return {f"{body}.{name}": values for name, values in scales.items()}
