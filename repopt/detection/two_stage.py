"""Faster, Mask and Cascade Mask R-CNN: regions where objects may be, and heads that look at each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork
from typing_extensions import override

from repopt.detection.backbone import PyramidBackbone
from repopt.detection.base import Detector, Outputs, Targets
from repopt.detection.parts import Anchors, KnownRegions, RPNHead, Transform

ASPECT_RATIOS = (0.5, 1.0, 2.0)
REGIONS = "regions_"  # before the name of a level


class RegionPredictor(nn.Module):
    """Pyramid and region proposals, images (N, 3, H, W) -> the maps by level, and what is predicted at their places:
    (N, 5 A, h, w), logits of A anchors and 4 deltas for each.

    Args:
        backbone: the pyramid.
        rpn: "head", an `RPNHead`.
    """

    def __init__(self, backbone: nn.Module, rpn: nn.ModuleDict) -> None:
        super().__init__()
        self.backbone, self.rpn = backbone, rpn

    @override
    def forward(self, x: Tensor) -> Outputs:
        maps = self.backbone(x)
        predictions = zip(maps, *self.rpn["head"](list(maps.values())), strict=True)
        return dict(maps) | {f"{REGIONS}{level}": torch.cat(of_level, 1) for level, *of_level in predictions}


class TwoStage(Detector):
    """A detector of two stages: its predictor proposes regions, and heads classify and refine them.

    Args:
        backbone: the pyramid.
        roi_heads: torchvision's, or `CascadeHeads`.
        transform: of images.
        anchor_scale: side of a level's anchors, in its pixels.
        masks: whether the heads find masks.
    """

    def __init__(
        self, backbone: PyramidBackbone, roi_heads: nn.Module, transform: Transform, anchor_scale: int, *, masks: bool
    ) -> None:
        super().__init__()
        self.backbone, self.roi_heads, self.transform, self.masks = backbone, roi_heads, transform, masks
        self.rpn = nn.ModuleDict({"head": RPNHead(backbone.out_channels, len(ASPECT_RATIOS))})
        self.regions = _regions(backbone.reductions, anchor_scale)

    @property
    @override
    def predictor(self) -> nn.Module:
        found = RegionPredictor(self.backbone, self.rpn)
        found.training = self.training
        return found

    @override
    def losses(self, raw: Outputs, batch: ImageList, targets: Targets) -> Outputs:
        maps, regions = _parted(raw)
        proposals, of_regions = self.regions(batch, regions, targets)
        _, of_heads = self.roi_heads(maps, proposals, batch.image_sizes, targets)
        return of_heads | of_regions

    @override
    def detections(self, raw: Outputs, batch: ImageList, sizes: list[tuple[int, int]]) -> Targets:
        maps, regions = _parted(raw)
        proposals, _ = self.regions(batch, regions)
        found, _ = self.roi_heads(maps, proposals, batch.image_sizes)
        return self.transform.postprocess(found, batch.image_sizes, sizes)


def _parted(raw: Outputs) -> tuple[Outputs, Outputs]:
    """Return maps, and predictions of regions, by level."""
    regions = {name.removeprefix(REGIONS): values for name, values in raw.items() if name.startswith(REGIONS)}
    return {level: raw[level] for level in regions}, regions


def _regions(reductions: Sequence[int], anchor_scale: int) -> RegionProposalNetwork:
    """Return what makes regions of predictions: the region proposal network of torchvision's Faster R-CNN."""
    sides = [anchor_scale * reduction for reduction in (*reductions, 2 * reductions[-1])]
    return RegionProposalNetwork(
        Anchors([(side,) for side in sides], [ASPECT_RATIOS] * len(sides)),
        KnownRegions(len(ASPECT_RATIOS)),
        fg_iou_thresh=0.7,
        bg_iou_thresh=0.3,
        batch_size_per_image=256,
        positive_fraction=0.5,
        pre_nms_top_n={"training": 2000, "testing": 1000},
        post_nms_top_n={"training": 2000, "testing": 1000},
        nms_thresh=0.7,
    )
