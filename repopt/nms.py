"""Non-maximum suppression of a batch, as one operation that torch.export keeps and ONNX has, too."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.ops import batched_nms


@torch.library.custom_op("repopt::suppressed", mutates_args=())
def suppressed(boxes: Tensor, scores: Tensor, iou: float, threshold: float) -> Tensor:
    """Return the scores (N, K, A) of boxes (N, A, 4) by class, 0 where a box is none of its class.

    That is where the score is not above a threshold, or a box of the same class with a better one overlaps it more than
    `iou`.
    """
    kept = torch.zeros_like(scores)
    for own, of_image, found in zip(boxes, scores, kept, strict=True):
        labels, places = (of_image > threshold).nonzero(as_tuple=True)
        # It tells classes apart by moving their boxes, which are not to be left or above of 0 for that.
        best = batched_nms(own[places] - own.min(), of_image[labels, places], labels, iou)
        found[labels[best], places[best]] = of_image[labels[best], places[best]]
    return kept


@suppressed.register_fake
def _(boxes: Tensor, scores: Tensor, iou: float, threshold: float) -> Tensor:
    return torch.empty_like(scores)
