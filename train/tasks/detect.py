"""Detection of objects, and their masks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Set
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override
from yacs.config import CfgNode

import data
from repopt import detection
from repopt.errors import UserError
from repopt.images import Preprocessing
from train import config
from train.evaluation import detection as evaluation
from train.evaluation.base import Evaluate
from train.tasks.base import Task, agreed, source_of

# Keys of which FCOS is not made, and the arguments that they are.
OF_TWO_STAGES = {"DETECT.HIDDEN": "hidden", "DETECT.ROIS": "rois", "DETECT.ANCHOR_SCALE": "anchor_scale"}


class Detect(Task):
    """Faster, Mask or Cascade Mask R-CNN, or FCOS, on the backbone."""

    backbone_path = detection.BODY
    multiple = 32

    @override
    @classmethod
    def finalize(cls, cfg: CfgNode, given: Set[str]) -> dict[str, Any]:
        if cfg.TRAIN.COMPILE not in ("auto", "off"):
            raise UserError(f"a detector's images differ in size, so TRAIN.COMPILE is off, not {cfg.TRAIN.COMPILE}")
        values = {"TRAIN.COMPILE": "off"}
        if cfg.DETECT.HEAD == detection.FCOS:
            if idle := sorted(given & {*OF_TWO_STAGES, "DETECT.NECK"}):
                raise UserError(f"{idle[0]} is nothing to DETECT.HEAD {detection.FCOS}: leave it out")
            values["DETECT.NECK"] = "declared"
        return values | agreed(cfg, given, "MODEL.NUM_CLASSES", len(_images(cfg).class_names))

    @override
    def arguments(self) -> dict[str, Any]:
        cfg, spec = self.cfg, _images(self.cfg).spec
        own = {} if cfg.DETECT.HEAD == detection.FCOS else OF_TWO_STAGES
        return {name: config.lookup(cfg, key) for key, name in own.items()} | {
            "num_classes": cfg.MODEL.NUM_CLASSES,
            "head": cfg.DETECT.HEAD,
            "neck": cfg.DETECT.NECK,
            "channels": cfg.MODEL.CHANNELS,
            "sizes": cfg.DETECT.SIZES,
            "max_size": cfg.DETECT.MAX_SIZE,
            "freeze_batch_norm": cfg.MODEL.FREEZE_BN,
            "mean": spec.mean,
            "std": spec.std,
        }

    @override
    def images(self, *, training: bool, subset: bool = False) -> data.ImageSet:
        return _images(self.cfg)

    @override
    def example(self) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
        target = {
            "boxes": torch.tensor([[8.0, 8.0, 56.0, 56.0]], device=self.world.device),
            "labels": torch.ones(1, dtype=torch.int64, device=self.world.device),
            "masks": torch.ones(1, 64, 64, dtype=torch.uint8, device=self.world.device),
        }
        return [torch.zeros(3, 64, 64, device=self.world.device)] * 2, [target] * 2

    @cached_property
    @override
    def criterion(self) -> Callable[[Any, Any], Tensor]:
        return _sum_of_losses

    @override
    def forward(self, model: nn.Module, images: Any, targets: Any) -> Any:
        return model(images, targets)

    @override
    def training_size(self) -> tuple[int, int]:
        return self.image_size()

    @override
    def image_size(self) -> tuple[int, int]:
        side = -(-self.cfg.DETECT.MAX_SIZE // self.multiple) * self.multiple
        return side, side

    @override
    def predictor(self, model: nn.Module) -> nn.Module:
        return _detector(model).predictor

    @override
    def with_predictor(self, model: nn.Module, predictor: nn.Module) -> nn.Module:
        return detection.DetectorOn(_detector(model), predictor, self._transform)

    @override
    def end_to_end(self, model: nn.Module, predictor: nn.Module, size: tuple[int, int]) -> detection.EndToEnd | None:
        return detection.EndToEnd(model, predictor, size) if isinstance(model, detection.Fcos) else None

    @override
    def with_end_to_end(self, network: nn.Module) -> nn.Module:
        return detection.EndToEndDetector(network, self._transform)

    @cached_property
    def _transform(self) -> detection.Transform:
        """What makes batches of `image_size` in evaluation."""
        cfg, spec = self.cfg, _images(self.cfg).spec
        found = detection.Transform(cfg.DETECT.SIZES, cfg.DETECT.MAX_SIZE, spec.mean, spec.std, self.multiple)
        found.size = self.image_size()
        return found.eval()

    @override
    def network_input(self, images: list[Tensor]) -> Tensor:
        return self._transform(images)[0].tensors

    @override
    def exported_images(self, images: Preprocessing) -> Preprocessing:
        spec = _images(self.cfg).spec
        sizes = {"short_side": self.cfg.DETECT.SIZES[-1], "long_side": self.cfg.DETECT.MAX_SIZE}
        return replace(images, mean=spec.mean, std=spec.std, **sizes)

    @override
    def divergence(self, outputs: Any, expected: Any) -> Tensor:
        """Return the mean over the outputs of their squared differences, relative to their squares."""
        pairs = [(outputs[name], expected[name]) for name in expected]
        return torch.stack([(a - b).square().mean() / b.square().mean() for a, b in pairs]).mean()

    @cached_property
    @override
    def evaluate(self) -> Evaluate:
        images = _images(self.cfg)
        return functools.partial(
            evaluation.evaluate, ground_truth=images.ground_truth, category_ids=images.category_ids
        )


def _detector(model: nn.Module) -> detection.Detector:
    assert isinstance(model, detection.Detector)
    return model


def _images(cfg: CfgNode) -> data.Detection:
    return _read_once(source_of(cfg), masks=cfg.DETECT.HEAD in detection.WITH_MASKS)


def _sum_of_losses(losses: dict[str, Tensor], targets: Any) -> Tensor:
    return torch.stack(list(losses.values())).sum()


_read_once = functools.lru_cache(maxsize=1)(data.Detection)  # it keeps the annotations that it has read

TASK = Detect
