"""Classification of images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from yacs.config import CfgNode

import data
import repopt
from repopt.models import Arch, zoo
from train.distributed import World
from train.evaluation.base import Evaluate
from train.evaluation.classification import evaluate
from train.tasks.base import Task, fill_in, loading, of_backbone, source_of


class Classify(Task):
    """Of one class per image."""

    def settle(self, cfg: CfgNode, given: set[str]) -> None:  # noqa: D102
        if not cfg.THROUGHPUT_MODE:
            info = data.describe(_source(cfg), splits=("val",) if cfg.EVAL_MODE else ("train", "val"))
            for key, value in (
                ("MODEL.NUM_CLASSES", info.num_classes),
                ("DATA.IMG_SIZE", info.image_size),
                ("DATA.TEST_SIZE", info.image_size),
            ):
                section, name = key.split(".")
                if value is None or (cfg.DATA.ZIP_MODE and key in given and cfg[section][name] > value):
                    continue  # a map file names the classes that occur, and there may be more
                fill_in(cfg, given, key, value)
        cfg.DATA.TEST_SIZE = cfg.DATA.TEST_SIZE or cfg.DATA.IMG_SIZE

    def network(self, arch: Arch, cfg: CfgNode) -> nn.Module:  # noqa: D102
        return repopt.create_model(arch.model, mode=arch.mode, num_classes=cfg.MODEL.NUM_CLASSES, **of_backbone(cfg))

    def check(self, arch: Arch, cfg: CfgNode, model: nn.Module) -> None:  # noqa: D102
        if arch.mode == zoo.MODE:  # ours take images of every size
            trains = not (cfg.EVAL_MODE or cfg.THROUGHPUT_MODE)
            for size in {cfg.DATA.TEST_SIZE, *((cfg.DATA.IMG_SIZE,) if trains else ())}:
                zoo.check_image_size(arch.model, model, size)

    def train_loader(self, cfg: CfgNode, world: World) -> data.Loader:  # noqa: D102
        return data.train_loader(
            _source(cfg),
            _augmentation(cfg),
            image_size=cfg.DATA.IMG_SIZE,
            interpolation=cfg.DATA.INTERPOLATION,
            batch_size=cfg.DATA.BATCH_SIZE,
            num_classes=cfg.MODEL.NUM_CLASSES,
            label_smoothing=cfg.MODEL.LABEL_SMOOTHING,
            seed=cfg.SEED,
            **loading(cfg, world),
        )

    def eval_loader(self, cfg: CfgNode, world: World, **chosen: Any) -> data.Loader:  # noqa: D102
        source = _source(cfg)
        return data.eval_loader(
            replace(source, cache_mode="no") if chosen else source,  # a few are read but once
            image_size=cfg.DATA.TEST_SIZE,
            interpolation=cfg.DATA.INTERPOLATION,
            crop=cfg.TEST.CROP,
            batch_size=cfg.DATA.TEST_BATCH_SIZE,
            num_classes=cfg.MODEL.NUM_CLASSES,
            **chosen,
            **loading(cfg, world),
        )

    def example(self, cfg: CfgNode, device: torch.device) -> tuple[Tensor, Tensor]:  # noqa: D102
        images = torch.zeros(2, 3, cfg.DATA.IMG_SIZE, cfg.DATA.IMG_SIZE, device=device)
        return images, torch.zeros(2, dtype=torch.int64, device=device)

    def criterion(self, cfg: CfgNode) -> Callable[[Any, Any], Tensor]:  # noqa: D102
        # What is mixed has smoothed targets already.
        return nn.CrossEntropyLoss(label_smoothing=0.0 if _augmentation(cfg).mixes else cfg.MODEL.LABEL_SMOOTHING)

    def image_size(self, cfg: CfgNode) -> tuple[int, int]:  # noqa: D102
        return (cfg.DATA.TEST_SIZE or cfg.DATA.IMG_SIZE,) * 2

    def evaluate(self, cfg: CfgNode) -> Evaluate:  # noqa: D102
        return evaluate


def _source(cfg: CfgNode) -> data.Source:
    return source_of(cfg, zip_mode=cfg.DATA.ZIP_MODE, cache_mode=cfg.DATA.CACHE_MODE)


def _augmentation(cfg: CfgNode) -> data.Augmentation:
    return data.Augmentation(**{field.name: cfg.AUG[field.name.upper()] for field in fields(data.Augmentation)})


TASK = Classify()
