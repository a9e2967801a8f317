"""Detectors, built from torchvision's parts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import nn
from torchvision.models.detection.faster_rcnn import TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.poolers import LevelMapper

from repopt.detection.backbone import LEVELS, PyramidBackbone
from repopt.detection.base import Detector
from repopt.detection.cascade import STAGES, CascadeHeads, Stage
from repopt.detection.fcos import Fcos
from repopt.detection.parts import BoxPredictor, ClassAgnosticPredictor, MaskPredictor, Transform
from repopt.detection.two_stage import TwoStage
from repopt.errors import unknown

FASTER, MASK, CASCADE, FCOS = HEADS = ("faster", "mask", "cascade", "fcos")
WITH_MASKS = (MASK, CASCADE)
BODY = "backbone.body"  # where the backbone stands in a detector


def create_detector(
    name: str,
    *,
    mode: str,
    num_classes: int,
    head: str = MASK,
    channels: int = 256,
    hidden: int = 1024,
    rois: int = 512,
    sizes: Sequence[int] = (800,),
    max_size: int = 1333,
    anchor_scale: int = 8,
    mean: Sequence[float],
    std: Sequence[float],
    **backbone: Any,
) -> Detector:
    """Create a detector with default initialization.

    Args:
        name, mode: see `PyramidBackbone`.
        num_classes: classes of objects; the background is none.
        head: Faster R-CNN ("faster"), Mask R-CNN ("mask"), Cascade Mask R-CNN ("cascade") or `Fcos` ("fcos").
        channels: channels of the feature pyramid, and of the mask heads or the heads of FCOS.
        hidden: channels of the box heads' layers; nothing to FCOS.
        rois: boxes of an image that a head is trained on, a quarter of them of objects; nothing to FCOS.
        sizes: lengths of an image's shorter side, one drawn for every training image; the last in evaluation.
        max_size: largest length of the longer side.
        anchor_scale: side of a level's anchors, in its pixels; nothing to FCOS.
        mean, std: mean and standard deviation by which the channels of images are normalised.
        backbone: the other arguments of `PyramidBackbone`: ``neck``, ``strides``, ``initial_scales``,
            ``use_checkpoint``, ``freeze_batch_norm``.

    Raises:
        UserError: an unknown head, or see `PyramidBackbone`.
    """
    if head not in HEADS:
        raise unknown("detection head", head, HEADS)
    if head == FCOS:
        images: dict[str, Any] = {"sizes": sizes, "max_size": max_size, "mean": mean, "std": std}
        return Fcos(name, mode=mode, num_classes=num_classes, channels=channels, **images, **backbone)
    pyramid = PyramidBackbone(name, mode=mode, channels=channels, **backbone)
    reductions, classes = pyramid.reductions, num_classes + 1
    box_pool, mask_pool = _pool(7, reductions), _pool(14, reductions)

    def heads(stage: Stage, predictor: type[BoxPredictor]) -> RoIHeads:
        masks: dict[str, nn.Module] = {}
        if head in WITH_MASKS:
            masks = {
                "mask_roi_pool": mask_pool,
                "mask_head": MaskRCNNHeads(channels, (channels,) * 4, dilation=1),
                "mask_predictor": MaskPredictor(channels, channels, classes),
            }
        return RoIHeads(
            box_pool,
            TwoMLPHead(channels * math.prod(box_pool.output_size), hidden),
            predictor(hidden, classes),
            fg_iou_thresh=stage.iou,
            bg_iou_thresh=stage.iou,
            batch_size_per_image=rois,
            positive_fraction=0.25,
            bbox_reg_weights=stage.coder_weights,
            score_thresh=0.05,
            nms_thresh=0.5,
            detections_per_img=100,
            **masks,
        )

    if head == CASCADE:
        stages = [heads(stage, ClassAgnosticPredictor) for stage in STAGES]
        roi_heads: nn.Module = CascadeHeads(stages, [stage.loss_weight for stage in STAGES])
    else:
        roi_heads = heads(STAGES[0], BoxPredictor)
    transform = Transform(sizes, max_size, mean, std, multiple=reductions[-1])
    return TwoStage(pyramid, roi_heads, transform, anchor_scale, masks=head in WITH_MASKS)


def _pool(size: int, reductions: Sequence[int]) -> MultiScaleRoIAlign:
    """Return what pools features of boxes, (R, C, size, size), from the pyramid's level that suits a box's size."""
    pool = MultiScaleRoIAlign(LEVELS, output_size=size, sampling_ratio=2)
    # By itself it would take them from the first batch it meets, and wrongly where images are small.
    pool.scales = [1 / reduction for reduction in reductions]
    pool.map_levels = LevelMapper(*(int(math.log2(reductions[end])) for end in (0, -1)))
    return pool
