"""Parts of torchvision's detectors: images of one size, and at least float32 wherever coordinates are computed.

torchvision computes anchors and boxes in the type of features and of heads' outputs. Under autocast that would be
bfloat16, whose numbers around 1000 are 4 to 8 apart: pixels, there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection import rpn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNPredictor
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from typing_extensions import override

from repopt.errors import UserError


def wide(x: Tensor) -> Tensor:
    """Return the values in float32, or in their own type where that is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def all_wide(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return all of them as `wide` does."""
    return {name: wide(x) for name, x in values.items()}


class Transform(GeneralizedRCNNTransform):
    """torchvision's transform, which resizes, normalises and pads images, and brings boxes back.

    Args:
        sizes: lengths of an image's shorter side, one drawn for every training image; the last in evaluation.
        max_size: largest length of the longer side.
        mean, std: of the channels.
        multiple: of which the padded sides are.

    Attributes:
        size: height and width to which all batches are padded; None = what the largest image of a batch takes.

    Raises:
        UserError: (where it is called) an image that is larger than `size`.
    """

    def __init__(
        self, sizes: Sequence[int], max_size: int, mean: Sequence[float], std: Sequence[float], multiple: int
    ) -> None:
        super().__init__(tuple(sizes), max_size, list(mean), list(std), size_divisible=multiple)
        self.size: tuple[int, int] | None = None

    @override
    def batch_images(self, images: list[Tensor], size_divisible: int = 32) -> Tensor:
        batch = super().batch_images(images, size_divisible)
        height, width = self.size or batch.shape[-2:]
        missing = height - batch.shape[-2], width - batch.shape[-1]
        if min(missing) < 0:
            raise UserError(f"images of {batch.shape[-2]} x {batch.shape[-1]} are larger than {height} x {width}")
        return F.pad(batch, (0, missing[1], 0, missing[0]))


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


class KnownRegions(nn.Module):
    """In the place of an `RPNHead` whose predictions are known: they are its input, logits before deltas, by level.

    Args:
        anchors: at a place.
    """

    def __init__(self, anchors: int) -> None:
        super().__init__()
        self._anchors = anchors

    @override
    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        return [level[:, : self._anchors] for level in x], [level[:, self._anchors :] for level in x]


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
