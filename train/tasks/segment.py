"""Semantic segmentation: a class for every pixel."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from yacs.config import CfgNode

import data
from data import segmentation as images_and_labels
from repopt import segmentation
from repopt.errors import UserError
from repopt.models import Arch
from train.distributed import World
from train.evaluation import segmentation as evaluation
from train.evaluation.base import Evaluate
from train.tasks.base import Task, fill_in, loading, of_backbone, source_of


class Segment(Task):
    """UPerNet on the backbone."""

    body = segmentation.BODY
    multiple = segmentation.MULTIPLE

    def settle(self, cfg: CfgNode, given: set[str]) -> None:  # noqa: D102
        crop, window, stride = cfg.SEGMENT.CROP, cfg.SEGMENT.WINDOW, cfg.SEGMENT.STRIDE
        if any(side % segmentation.MULTIPLE for side in crop):
            raise UserError(f"SEGMENT.CROP is of multiples of {segmentation.MULTIPLE}, not {crop}")
        if stride is not None and (window is None or any(s > w for s, w in zip(stride, window, strict=True))):
            raise UserError(f"SEGMENT.STRIDE is at most SEGMENT.WINDOW, or pixels are left out: {stride}, {window}")
        if cfg.DETERMINISTIC and torch.cuda.is_available():
            raise UserError(
                "DETERMINISTIC is not to be had on GPUs: UPerNet's pooling and resizing have no such algorithm"
            )
        fill_in(cfg, given, "MODEL.NUM_CLASSES", len(_class_names(cfg)))

    def network(self, arch: Arch, cfg: CfgNode) -> nn.Module:  # noqa: D102
        return segmentation.create_segmenter(
            arch.model,
            mode=arch.mode,
            num_classes=cfg.MODEL.NUM_CLASSES,
            channels=cfg.MODEL.CHANNELS,
            **of_backbone(cfg),
        )

    def train_loader(self, cfg: CfgNode, world: World) -> data.Loader:  # noqa: D102
        if cfg.DATA.BATCH_SIZE * (world.size if cfg.TRAIN.SYNC_BN else 1) == 1:
            raise UserError(
                "a batch norm of UPerNet sees a value per image: train on batches of 2 at least, or with TRAIN.SYNC_BN "
                "in several processes"
            )
        return images_and_labels.train_loader(
            source_of(cfg),
            crop=cfg.SEGMENT.CROP,
            scales=cfg.SEGMENT.SCALES,
            batch_size=cfg.DATA.BATCH_SIZE,
            seed=cfg.SEED,
            **loading(cfg, world),
        )

    def eval_loader(self, cfg: CfgNode, world: World, **chosen: Any) -> data.Loader:  # noqa: D102
        return images_and_labels.eval_loader(
            source_of(cfg), batch_size=cfg.DATA.TEST_BATCH_SIZE, **chosen, **loading(cfg, world)
        )

    def example(self, cfg: CfgNode, device: torch.device) -> tuple[Tensor, Tensor]:  # noqa: D102
        images = torch.zeros(2, 3, *cfg.SEGMENT.CROP, device=device)
        return images, torch.zeros(2, *cfg.SEGMENT.CROP, dtype=torch.int64, device=device)

    def criterion(self, cfg: CfgNode) -> Callable[[Any, Any], Tensor]:  # noqa: D102
        return nn.CrossEntropyLoss(ignore_index=segmentation.IGNORED)

    def image_size(self, cfg: CfgNode) -> tuple[int, int]:  # noqa: D102
        height, width = cfg.SEGMENT.WINDOW or cfg.SEGMENT.CROP
        return height + -height % self.multiple, width + -width % self.multiple

    def seen(self, cfg: CfgNode, images: Tensor) -> Tensor:  # noqa: D102
        height, width = cfg.SEGMENT.WINDOW or images.shape[2:]
        return segmentation.padded(images[:, :, :height, :width])

    def evaluate(self, cfg: CfgNode) -> Evaluate:  # noqa: D102
        class_names = _class_names(cfg)
        evaluation.measures(class_names)  # what is not installed is missed before a training
        return functools.partial(
            evaluation.evaluate,
            class_names=class_names,
            window=cfg.SEGMENT.WINDOW,
            stride=cfg.SEGMENT.STRIDE,
        )


def _class_names(cfg: CfgNode) -> tuple[str, ...]:
    return images_and_labels.describe(source_of(cfg)).class_names


TASK = Segment()
