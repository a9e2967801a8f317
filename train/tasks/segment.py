"""Semantic segmentation: a class for every pixel."""

from __future__ import annotations

import functools
from collections.abc import Callable, Set
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override
from yacs.config import CfgNode

import data
from repopt import segmentation
from repopt.errors import UserError
from train.evaluation import segmentation as evaluation
from train.evaluation.base import Evaluate
from train.tasks.base import Task, agreed, source_of


class Segment(Task):
    """UPerNet on the backbone."""

    backbone_path = segmentation.BODY
    multiple = segmentation.MULTIPLE

    @override
    @classmethod
    def finalize(cls, cfg: CfgNode, given: Set[str]) -> dict[str, Any]:
        crop, window, stride = cfg.SEGMENT.CROP, cfg.SEGMENT.WINDOW, cfg.SEGMENT.STRIDE
        if any(side % segmentation.MULTIPLE for side in crop):
            raise UserError(f"SEGMENT.CROP is of multiples of {segmentation.MULTIPLE}, not {crop}")
        if stride is not None and (window is None or any(s > w for s, w in zip(stride, window, strict=True))):
            raise UserError(f"SEGMENT.STRIDE is at most SEGMENT.WINDOW, or pixels are left out: {stride}, {window}")
        if cfg.DETERMINISTIC and torch.cuda.is_available():
            raise UserError(
                "DETERMINISTIC is not to be had on GPUs: UPerNet's pooling and resizing have no such algorithm"
            )
        return agreed(cfg, given, "MODEL.NUM_CLASSES", len(_images(cfg).class_names))

    @override
    def arguments(self) -> dict[str, Any]:
        return {"num_classes": self.cfg.MODEL.NUM_CLASSES, "channels": self.cfg.MODEL.CHANNELS}

    @override
    def images(self, *, training: bool, subset: bool = False) -> data.ImageSet:
        return _images(self.cfg)

    @override
    def example(self) -> tuple[Tensor, Tensor]:
        images = torch.zeros(2, 3, *self.cfg.SEGMENT.CROP, device=self.world.device)
        return images, torch.zeros(2, *self.cfg.SEGMENT.CROP, dtype=torch.int64, device=self.world.device)

    @cached_property
    @override
    def criterion(self) -> Callable[[Any, Any], Tensor]:
        return nn.CrossEntropyLoss(ignore_index=segmentation.IGNORED)

    @override
    def training_size(self) -> tuple[int, int]:
        height, width = self.cfg.SEGMENT.CROP
        return height, width

    @override
    def image_size(self) -> tuple[int, int]:
        height, width = self.cfg.SEGMENT.WINDOW or self.cfg.SEGMENT.CROP
        return height + -height % self.multiple, width + -width % self.multiple

    @override
    def network_input(self, images: Tensor) -> Tensor:
        height, width = self.cfg.SEGMENT.WINDOW or images.shape[2:]
        return segmentation.padded(images[:, :, :height, :width])

    @cached_property
    @override
    def evaluate(self) -> Evaluate:
        class_names = _images(self.cfg).class_names
        evaluation.build_metrics(class_names)  # what is not installed is missed before a training
        return functools.partial(
            evaluation.evaluate,
            class_names=class_names,
            window=self.cfg.SEGMENT.WINDOW,
            stride=self.cfg.SEGMENT.STRIDE,
        )


def _images(cfg: CfgNode) -> data.Segmentation:
    return data.Segmentation(source_of(cfg), cfg.SEGMENT.CROP, cfg.SEGMENT.SCALES)


TASK = Segment
