"""FCOS (arXiv 1904.01355), a detector of one stage and without anchors, of plain convolutions alone.

Assignment, losses and post-processing are torchvision's. The layers are chosen for networks that become integers: every
3x3 convolution is a declared block, with batch norm and ReLU.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import fcos
from torchvision.models.detection._utils import BoxLinearCoder
from torchvision.models.detection.image_list import ImageList
from typing_extensions import override

from repopt.detection.backbone import PathAggregation, block
from repopt.detection.base import Detector, Outputs, Targets
from repopt.detection.parts import Anchors, Transform, all_wide
from repopt.layers import InitialScales

CONVS = 2  # 3x3 convolutions of a head before each of its two ends, as in YOLOX (arXiv 2107.08430)


class LevelHead(fcos.FCOSHead):
    """torchvision's head, for one level of the pyramid: its 3x3 convolutions are declared blocks, its last layers 1x1.

    Args:
        channels: of the level's map.
        num_classes: classes of objects; the background is none.
        mode, initial_scales: of the blocks, see `backbone.block`.
    """

    def __init__(self, channels: int, num_classes: int, mode: str, initial_scales: InitialScales) -> None:
        super().__init__(channels, num_anchors=1, num_classes=num_classes, num_convs=0)
        ends = {self.classification_head: ("cls_logits",), self.regression_head: ("bbox_reg", "bbox_ctrness")}
        for head, names in ends.items():
            head.conv = nn.Sequential(*(block(mode, channels, 1 + n, initial_scales) for n in range(CONVS)))
            for name in names:
                drawn = head.get_submodule(name)
                assert isinstance(drawn, nn.Conv2d) and drawn.bias is not None
                end = nn.Conv2d(channels, drawn.out_channels, 1)
                nn.init.normal_(end.weight, std=0.01)
                end.bias = drawn.bias
                setattr(head, name, end)


class DecoupledHead(nn.ModuleDict):
    """A `LevelHead` for every level: maps by name -> "cls_logits" (N, A, K), "bbox_regression" (N, A, 4) and
    "bbox_ctrness" (N, A, 1), where A counts the places of all maps, level by level.

    torchvision's levels share one head, with group norms. A batch norm that they shared would see one level at a time
    in training and a mixture of all in evaluation; and a convolution's range of integers would have to do for all of
    them. So every level has layers of its own, as in YOLOv6 (arXiv 2209.02976). The losses need none of them.
    """

    compute_loss = fcos.FCOSHead.compute_loss

    def __init__(self, levels: Mapping[str, LevelHead] | None = None) -> None:
        super().__init__(levels)
        self.box_coder = BoxLinearCoder(normalize_by_size=True)

    @override
    def forward(self, maps: dict[str, Tensor]) -> Outputs:
        every = [head([maps[level]]) for level, head in self.items()]
        return {name: torch.cat([found[name] for found in every], 1) for name in every[0]}


class Fcos(Detector, fcos.FCOS):
    """FCOS, all of whose parameters are its predictor's: images -> "cls_logits", "bbox_regression", "bbox_ctrness".

    Args:
        name, mode, num_classes, channels, sizes, max_size, mean, std: see `create_detector`.
        initial_scales, backbone: see `PathAggregation`.

    Attributes:
        reductions: how much smaller than the image the maps of the pyramid are.

    Raises:
        UserError: see `PathAggregation`.
    """

    # torchvision's, which has no types.
    backbone: nn.Module
    head: nn.Module
    anchor_generator: Callable[..., list[Tensor]]
    box_coder: BoxLinearCoder
    compute_loss: Callable[..., Outputs]
    postprocess_detections: Callable[..., Targets]
    detections_per_img: int
    nms_thresh: float
    score_thresh: float

    def __init__(
        self,
        name: str,
        *,
        mode: str,
        num_classes: int,
        channels: int,
        sizes: Sequence[int],
        max_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        initial_scales: InitialScales = "depth",
        **backbone: Any,
    ) -> None:
        blocks: dict[str, Any] = {"mode": mode, "initial_scales": initial_scales}
        pyramid = PathAggregation(name, channels=channels, **blocks, **backbone)
        reductions = pyramid.reductions
        super().__init__(
            pyramid,
            num_classes,
            anchor_generator=Anchors([(reduction,) for reduction in reductions], [(1.0,)] * len(reductions)),
            head=DecoupledHead({level: LevelHead(channels, num_classes, **blocks) for level in pyramid.levels}),
            score_thresh=0.05,
        )
        self.transform = Transform(sizes, max_size, mean, std, multiple=reductions[-1])
        self.reductions, self.masks = tuple(reductions), False

    @property
    @override
    def predictor(self) -> nn.Sequential:
        found = nn.Sequential(OrderedDict(backbone=self.backbone, head=self.head))
        found.training = self.training
        return found

    @override
    def without_predictor(self) -> Fcos:
        rest = super().without_predictor()
        assert isinstance(rest, Fcos)
        rest.head = DecoupledHead()
        return rest

    @override
    def losses(self, raw: Outputs, batch: ImageList, targets: Targets) -> Outputs:
        places, anchors = self.places(batch), self.anchors(batch)
        # torchvision's FCOS has a logit for label 0, which is no object's; here the first one is of label 1.
        targets = [target | {"labels": target["labels"] - 1} for target in targets]
        return self.compute_loss(targets, all_wide(raw), anchors, places)

    @override
    def detections(self, raw: Outputs, batch: ImageList, sizes: list[tuple[int, int]]) -> Targets:
        places, anchors = self.places(batch), self.anchors(batch)
        levels = {name: list(values.split(places, 1)) for name, values in all_wide(raw).items()}
        found = self.postprocess_detections(levels, [list(a.split(places)) for a in anchors], batch.image_sizes)
        found = [detections | {"labels": detections["labels"] + 1} for detections in found]
        return self.transform.postprocess(found, batch.image_sizes, sizes)

    def places(self, batch: ImageList) -> list[int]:
        """Return the number of places of every map."""
        return [math.prod(side // reduction for side in batch.tensors.shape[-2:]) for reduction in self.reductions]

    def anchors(self, batch: ImageList) -> list[Tensor]:
        """Return for every image the squares around the places of all maps, (A, 4)."""
        height, width = batch.tensors.shape[-2:]
        return self.anchor_generator(
            batch, [batch.tensors.new_empty(0, height // r, width // r) for r in self.reductions]
        )
