"""Which layers of a network learn, and how fast: frozen modules, and factors of the learning rate."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence

from torch import nn

from repopt.errors import UserError, unknown
from repopt.layers import Baseline, RepConv2d
from train.pretrained import of_classes
from train.tasks import Task


def freeze(model: nn.Module, patterns: Sequence[str]) -> list[nn.Module]:
    """Take the parameters of modules out of the training, and return the modules, whose batch norms are to rest.

    Args:
        model: of the training, changed in place.
        patterns: paths of modules, with * and ? as in file names.

    Raises:
        UserError: a pattern without a module.
    """
    modules = dict(model.named_modules())
    found = {path for pattern in patterns for path in _matching(modules, pattern)}
    for path in found:
        modules[path].requires_grad_(requires_grad=False)
    if not any(param.requires_grad for param in model.parameters()):
        raise UserError(f"TRAIN.FREEZE {', '.join(patterns)} leaves nothing to train")
    return [modules[path] for path in found]


def _matching(modules: dict[str, nn.Module], pattern: str) -> list[str]:
    paths = fnmatch.filter(modules, pattern)
    if not paths:
        raise unknown("module of TRAIN.FREEZE", pattern, filter(None, modules))
    return paths


def learning_rate_factors(task: Task, model: nn.Module) -> dict[str, float] | None:
    """Return factors of the learning rate by parameter name, or None where all learn alike.

    Every layer of the backbone has TRAIN.LAYER_DECAY times the rate of the next one. So the tensors of a declared block
    have one factor, as the branches that it stands for do, and the equivalence holds.
    """
    cfg = task.cfg.TRAIN
    if cfg.HEAD_LR is None and cfg.LAYER_DECAY == 1:
        return None
    head = set() if task.backbone_path else of_classes(task, model)
    prefix = f"{task.backbone_path}." if task.backbone_path else ""
    of_backbone = [
        [f"{prefix}{name}" for name in names if f"{prefix}{name}" not in head]
        for names in parameters_by_layer(model.get_submodule(task.backbone_path))
    ]
    of_backbone = [names for names in of_backbone if names]
    factors = {name: cfg.LAYER_DECAY**depth for depth, names in enumerate(reversed(of_backbone)) for name in names}
    of_head = 1.0 if cfg.HEAD_LR is None else cfg.HEAD_LR / cfg.BASE_LR
    return {name: of_head for name, _ in model.named_parameters()} | factors


def parameters_by_layer(model: nn.Module) -> list[list[str]]:
    """Return the names of a network's parameters by layer, in the order in which its modules were added.

    A declared block is a layer, as its baseline is, and so is every other module with a weight of two or more
    dimensions; what has none (a batch norm) belongs to the layer before it.
    """
    blocks = [path for path, module in model.named_modules() if isinstance(module, RepConv2d | Baseline)]
    found: list[list[str]] = [[]]
    block: str | None = None
    for path, module in model.named_modules():
        own = {f"{path}.{name}" if path else name: p for name, p in module.named_parameters(recurse=False)}
        if block is None or not path.startswith(f"{block}."):
            block = path if path in blocks else None
            if block is not None or any(param.dim() > 1 for param in own.values()):
                found.append([])
        found[-1] += own
    return [names for names in found if names]
