"""FCOS as one function of tensors, for files that other software runs."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import clip_boxes_to_image
from typing_extensions import override

from repopt.detection.base import Outputs, Targets
from repopt.detection.fcos import Fcos
from repopt.detection.parts import Transform, all_wide
from repopt.nms import suppressed

_ROUNDING = 1e-4  # of a score; of a box ten times that, relative to its side
OUTPUTS = BOXES, SCORES, LABELS = ("boxes", "scores", "labels")


class EndToEnd(nn.Module):
    """Normalised images (N, 3, H, W) -> the D best objects of each, the best first.

    "boxes" (N, D, 4) are x1, y1, x2, y2 in pixels of these images, and may reach beyond them; "scores" (N, D) are 0
    where there are no more objects; "labels" (N, D), int64, are from 1 on. All places compete, where torchvision's
    post-processing takes the 1,000 best ones of a level, and boxes are not clipped before they are compared.

    Args:
        detector: of which the boxes are.
        predictor: its own one, or another form of it.
        size: height and width of the images.
    """

    places: Tensor

    def __init__(self, detector: Fcos, predictor: nn.Module, size: tuple[int, int]) -> None:
        super().__init__()
        self.predictor, self._decode = predictor, detector.box_coder.decode
        self._count, self._iou = detector.detections_per_img, detector.nms_thresh
        self._threshold = detector.score_thresh
        self.register_buffer("places", detector.anchors(ImageList(torch.zeros(1, 3, *size), [size]))[0])

    def on(self, predictor: nn.Module) -> EndToEnd:
        """Return the same on another form of the predictor."""
        found = copy.copy(self)
        found._modules = {**self._modules, "predictor": predictor}
        return found

    @override
    def forward(self, x: Tensor) -> Outputs:
        raw = all_wide(self.predictor(x))
        boxes = self._decode(raw["bbox_regression"], self.places)
        scores = (raw["cls_logits"].sigmoid() * raw["bbox_ctrness"].sigmoid()).sqrt().transpose(1, 2)
        kept = suppressed(boxes, scores, self._iou, self._threshold)
        best = kept.flatten(1).topk(min(self._count, kept[0].numel()))
        labels, places = best.indices // scores.shape[2], best.indices % scores.shape[2]
        found = boxes.gather(1, places[..., None].expand(-1, -1, 4))
        return {BOXES: found, SCORES: best.values, LABELS: 1 + labels}


def difference_of_objects(found: Outputs, reference: Outputs) -> float:
    """Return how much of the scores is that of objects of one which the other has not, in the outputs of `EndToEnd`.

    Objects that are equally likely, to rounding, may come in any order, and drop out as the last ones.
    """
    missed, total = [], []
    for one, other in ((found, reference), (reference, found)):
        last = other[SCORES][:, -1:, None]
        scores = one[SCORES][:, :, None]
        near = (scores - other[SCORES][:, None]).abs() < _ROUNDING
        near &= one[LABELS][:, :, None] == other[LABELS][:, None]
        side = (one[BOXES][..., 2:] - one[BOXES][..., :2]).amax(-1)[:, :, None].clamp(min=1)
        near &= (one[BOXES][:, :, None] - other[BOXES][:, None]).abs().amax(-1) < 10 * _ROUNDING * side
        missing = ~near.any(2) & ((scores - last).abs() > _ROUNDING)[:, :, 0]
        missed.append((one[SCORES] * missing).sum())
        total.append(one[SCORES].sum())
    return float(sum(missed) / sum(total)) if sum(total) else 0.0


class EndToEndDetector(nn.Module):
    """A network like `EndToEnd`, such as its file in onnxruntime, called as a detector in eval mode.

    Args:
        network: gives what `EndToEnd` gives.
        transform: makes batches of the size that it takes.

    Attributes:
        masks: whether it finds masks.
    """

    def __init__(self, network: nn.Module, transform: Transform) -> None:
        super().__init__()
        self.network, self.transform, self.masks = network, transform, False
        self.eval()

    @override
    def forward(self, images: list[Tensor]) -> Targets:
        sizes = [(image.shape[-2], image.shape[-1]) for image in images]
        batch, _ = self.transform(images)
        found = self.network(batch.tensors)
        every = []
        for number, size in enumerate(batch.image_sizes):
            there = found[SCORES][number] > 0
            own = {name: found[name][number][there] for name in OUTPUTS}
            every.append(own | {BOXES: clip_boxes_to_image(own[BOXES], size)})
        return self.transform.postprocess(every, batch.image_sizes, sizes)
