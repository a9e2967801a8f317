"""Detectors, built from torchvision's parts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import nn
from torchvision.models.detection.faster_rcnn import TwoMLPHead
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.poolers import LevelMapper

from repopt.detection.backbone import LEVELS, PyramidBackbone
from repopt.detection.cascade import STAGES, CascadeHeads, Stage
from repopt.detection.fcos import Fcos
from repopt.detection.parts import Anchors, BoxPredictor, ClassAgnosticPredictor, MaskPredictor, RPNHead
from repopt.errors import unknown

FASTER, MASK, CASCADE, FCOS = HEADS = ("faster", "mask", "cascade", "fcos")
WITH_MASKS = (MASK, CASCADE)
BODY = "backbone.body"  # where the backbone stands in a detector
ASPECT_RATIOS = (0.5, 1.0, 2.0)


class Detector(GeneralizedRCNN):
    """A detector that is called as torchvision's are.

    In training ``model(images, targets)`` is a dict of losses, in eval mode ``model(images)`` a list of a dict per
    image: "boxes" (D, 4), "labels" (D,), "scores" (D,), and "masks" (D, 1, H, W). Images are (3, H, W) floats in
    [0, 1]; targets have "boxes" (K, 4), "labels" (K,) from 1 on, and "masks" (K, H, W). Boxes are x1, y1, x2, y2.

    Attributes:
        masks: whether it finds masks.
    """

    masks: bool


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
) -> Detector | Fcos:
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
    transform = GeneralizedRCNNTransform(tuple(sizes), max_size, mean, std, size_divisible=reductions[-1])
    detector = Detector(pyramid, _rpn(channels, reductions, anchor_scale), roi_heads, transform)
    detector.masks = head in WITH_MASKS
    return detector


def _rpn(channels: int, reductions: Sequence[int], anchor_scale: int) -> RegionProposalNetwork:
    """Return the region proposal network of torchvision's Faster R-CNN."""
    sides = [anchor_scale * reduction for reduction in (*reductions, 2 * reductions[-1])]
    anchors = Anchors([(side,) for side in sides], [ASPECT_RATIOS] * len(sides))
    return RegionProposalNetwork(
        anchors,
        RPNHead(channels, len(ASPECT_RATIOS)),
        fg_iou_thresh=0.7,
        bg_iou_thresh=0.3,
        batch_size_per_image=256,
        positive_fraction=0.5,
        pre_nms_top_n={"training": 2000, "testing": 1000},
        post_nms_top_n={"training": 2000, "testing": 1000},
        nms_thresh=0.7,
    )


def _pool(size: int, reductions: Sequence[int]) -> MultiScaleRoIAlign:
    """Return what pools features of boxes, (R, C, size, size), from the pyramid's level that suits a box's size."""
    pool = MultiScaleRoIAlign(LEVELS, output_size=size, sampling_ratio=2)
    # By itself it would take them from the first batch it meets, and wrongly where images are small.
    pool.scales = [1 / reduction for reduction in reductions]
    pool.map_levels = LevelMapper(*(int(math.log2(reductions[end])) for end in (0, -1)))
    return pool
