"""Detection of objects, and their masks."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from yacs.config import CfgNode

import data
from data import detection as images_and_boxes
from repopt import detection
from repopt.errors import UserError
from repopt.models import Arch
from train.distributed import World
from train.evaluation import detection as evaluation
from train.evaluation.base import Evaluate
from train.tasks.base import Task, fill_in, loading, of_backbone, source_of


class Detect(Task):
    """Faster, Mask or Cascade Mask R-CNN on the backbone."""

    body = detection.BODY

    def settle(self, cfg: CfgNode, given: set[str]) -> None:  # noqa: D102
        if cfg.TRAIN.COMPILE not in ("auto", "off"):
            raise UserError(f"a detector's images differ in size, so TRAIN.COMPILE is off, not {cfg.TRAIN.COMPILE}")
        cfg.TRAIN.COMPILE = "off"
        fill_in(cfg, given, "MODEL.NUM_CLASSES", len(_described(source_of(cfg)).class_names))

    def network(self, arch: Arch, cfg: CfgNode) -> nn.Module:  # noqa: D102
        return detection.create_detector(
            arch.model,
            mode=arch.mode,
            num_classes=cfg.MODEL.NUM_CLASSES,
            head=cfg.DETECT.HEAD,
            neck=cfg.DETECT.NECK,
            channels=cfg.MODEL.CHANNELS,
            hidden=cfg.DETECT.HIDDEN,
            rois=cfg.DETECT.ROIS,
            sizes=cfg.DETECT.SIZES,
            max_size=cfg.DETECT.MAX_SIZE,
            anchor_scale=cfg.DETECT.ANCHOR_SCALE,
            freeze_batch_norm=cfg.MODEL.FREEZE_BN,
            **images_and_boxes.statistics(source_of(cfg)),
            **of_backbone(cfg),
        )

    def train_loader(self, cfg: CfgNode, world: World) -> data.Loader:  # noqa: D102
        return images_and_boxes.train_loader(
            source_of(cfg),
            masks=_with_masks(cfg),
            batch_size=cfg.DATA.BATCH_SIZE,
            seed=cfg.SEED,
            **loading(cfg, world),
        )

    def eval_loader(self, cfg: CfgNode, world: World, **chosen: Any) -> data.Loader:  # noqa: D102
        return images_and_boxes.eval_loader(
            source_of(cfg), batch_size=cfg.DATA.TEST_BATCH_SIZE, **chosen, **loading(cfg, world)
        )

    def example(self, cfg: CfgNode, device: torch.device) -> tuple[list[Tensor], list[dict[str, Tensor]]]:  # noqa: D102
        target = {
            "boxes": torch.tensor([[8.0, 8.0, 56.0, 56.0]], device=device),
            "labels": torch.ones(1, dtype=torch.int64, device=device),
            "masks": torch.ones(1, 64, 64, dtype=torch.uint8, device=device),
        }
        return [torch.zeros(3, 64, 64, device=device)] * 2, [target] * 2

    def criterion(self, cfg: CfgNode) -> Callable[[Any, Any], Tensor]:  # noqa: D102
        return _sum_of_losses

    def forward(self, model: nn.Module, images: Any, targets: Any) -> Any:  # noqa: D102
        return model(images, targets)

    def evaluate(self, cfg: CfgNode) -> Evaluate:  # noqa: D102
        source = source_of(cfg)
        return functools.partial(
            evaluation.evaluate,
            ground_truth=images_and_boxes.ground_truth(source, masks=_with_masks(cfg)),
            category_ids=_described(source).category_ids,
        )


def _with_masks(cfg: CfgNode) -> bool:
    return cfg.DETECT.HEAD in detection.WITH_MASKS


def _sum_of_losses(losses: dict[str, Tensor], targets: Any) -> Tensor:
    return torch.stack(list(losses.values())).sum()


_described = functools.cache(images_and_boxes.describe)

TASK = Detect()
