"""Classification of images."""

from __future__ import annotations

from collections.abc import Callable, Set
from dataclasses import fields, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override
from yacs.config import CfgNode

import data
from repopt.errors import UserError
from repopt.models import zoo
from train import config
from train.evaluation.base import Evaluate
from train.evaluation.classification import evaluate
from train.tasks.base import Task, agreed, source_of


class Classify(Task):
    """One class per image."""

    @override
    @classmethod
    def finalize(cls, cfg: CfgNode, given: Set[str]) -> dict[str, Any]:
        values: dict[str, Any] = {}
        if not cfg.THROUGHPUT_MODE:
            info = data.describe(_source(cfg), splits=("val",) if cfg.EVAL_MODE else ("train", "val"))
            if "DATA.CLASSES" in given and info.classes != tuple(cfg.DATA.CLASSES or info.classes):
                raise UserError(f"DATA.CLASSES cannot be set: the data set {cfg.DATA.DATASET!r} has classes of its own")
            for key, value in (
                ("MODEL.NUM_CLASSES", info.num_classes),
                ("DATA.IMG_SIZE", info.image_size),
                ("DATA.TEST_SIZE", info.image_size),
            ):
                if value is None or (info.at_least and key in given and config.lookup(cfg, key) > value):
                    continue
                values |= agreed(cfg, given, key, value)
        test_size = values.get("DATA.TEST_SIZE", cfg.DATA.TEST_SIZE)
        return values | {"DATA.TEST_SIZE": test_size or values.get("DATA.IMG_SIZE", cfg.DATA.IMG_SIZE)}

    @override
    def arguments(self) -> dict[str, Any]:
        return {"num_classes": self.cfg.MODEL.NUM_CLASSES}

    @override
    def check(self, model: nn.Module) -> None:
        if self.arch.of_library:  # ours take images of every size
            trains = not (self.cfg.EVAL_MODE or self.cfg.THROUGHPUT_MODE)
            for size in {self.cfg.DATA.TEST_SIZE, *((self.cfg.DATA.IMG_SIZE,) if trains else ())}:
                zoo.check_image_size(self.arch.model, model, self.cfg.MODEL.IN_CHANS, size)

    @override
    def images(self, *, training: bool, subset: bool = False) -> data.ImageSet:
        source = _source(self.cfg)
        return data.Classification(
            replace(source, cache_mode="no") if subset else source,
            image_size=self.cfg.DATA.IMG_SIZE if training else self.image_size()[0],
            num_classes=self.cfg.MODEL.NUM_CLASSES,
            interpolation=self.cfg.DATA.INTERPOLATION,
            augmentation=_augmentation(self.cfg),
            label_smoothing=self.cfg.MODEL.LABEL_SMOOTHING,
            crop=self.cfg.TEST.CROP,
            decode=self.cfg.DATA.DECODE,
        )

    @override
    def example(self) -> tuple[Tensor, Tensor]:
        images = torch.zeros(2, self.cfg.MODEL.IN_CHANS, *[self.cfg.DATA.IMG_SIZE] * 2, device=self.world.device)
        return images, torch.zeros(2, dtype=torch.int64, device=self.world.device)

    @cached_property
    @override
    def criterion(self) -> Callable[[Any, Any], Tensor]:
        # What is mixed has smoothed targets already.
        smoothing = 0.0 if _augmentation(self.cfg).mixes else self.cfg.MODEL.LABEL_SMOOTHING
        return nn.CrossEntropyLoss(label_smoothing=smoothing)

    @override
    def training_size(self) -> tuple[int, int]:
        return self.cfg.DATA.IMG_SIZE, self.cfg.DATA.IMG_SIZE

    @override
    def image_size(self) -> tuple[int, int]:
        return (self.cfg.DATA.TEST_SIZE or self.cfg.DATA.IMG_SIZE,) * 2

    @cached_property
    @override
    def evaluate(self) -> Evaluate:
        return evaluate


def _source(cfg: CfgNode) -> data.Source:
    return source_of(
        cfg,
        zip_mode=cfg.DATA.ZIP_MODE,
        cache_mode=cfg.DATA.CACHE_MODE,
        val_fraction=cfg.DATA.VAL_FRACTION,
        columns=(cfg.DATA.IMAGE_COLUMN, cfg.DATA.LABEL_COLUMN),
        shuffle=cfg.DATA.SHUFFLE,
    )


def _augmentation(cfg: CfgNode) -> data.Augmentation:
    return data.Augmentation(**{field.name: cfg.AUG[field.name.upper()] for field in fields(data.Augmentation)})


TASK = Classify
