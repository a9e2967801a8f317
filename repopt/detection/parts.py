"""Parts of torchvision's detectors that give at least float32 wherever coordinates are computed.

torchvision computes anchors and boxes in the type of features and of heads' outputs. Under autocast that would be
bfloat16, whose numbers around 1000 are 4 to 8 apart: pixels, there.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchvision.models.detection import rpn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNPredictor
from typing_extensions import override


def wide(x: Tensor) -> Tensor:
    """Return the values in float32, or in their own type where that is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Anchors(AnchorGenerator):
    """torchvision's `AnchorGenerator`, whose anchors have the type of the images."""

    @override
    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        # Besides the type, the sizes of the features are all that is asked for.
        return super().forward(image_list, [image_list.tensors.new_empty(0, *f.shape[-2:]) for f in feature_maps])


class RPNHead(rpn.RPNHead):
    """torchvision's `RPNHead`, whose logits and deltas are at least float32."""

    @override
    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        logits, deltas = super().forward(x)
        return list(map(wide, logits)), list(map(wide, deltas))


class BoxPredictor(FastRCNNPredictor):
    """torchvision's `FastRCNNPredictor`, (R, in_channels) -> logits (R, classes) and box deltas (R, 4 classes)."""

    @override
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits, deltas = super().forward(x)
        return wide(logits), wide(deltas)


class ClassAgnosticPredictor(BoxPredictor):
    """A `BoxPredictor` whose box deltas of all classes are equal."""

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__(in_channels, num_classes)
        self.bbox_pred = nn.Linear(in_channels, 4)

    @override
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits, deltas = super().forward(x)
        return logits, deltas.repeat(1, logits.shape[1])


class MaskPredictor(MaskRCNNPredictor):
    """torchvision's `MaskRCNNPredictor`, (R, in_channels, h, w) -> logits (R, classes, 2 h, 2 w)."""

    @override
    def forward(self, x: Tensor) -> Tensor:
        return wide(super().forward(x))
