"""Cascade R-CNN (arXiv 1712.00726): heads one after the other, each on the boxes of the one before; masks in each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchvision.models.detection.roi_heads import RoIHeads, fastrcnn_loss, maskrcnn_inference, maskrcnn_loss
from torchvision.ops import clip_boxes_to_image, remove_small_boxes

Features = dict[str, Tensor]
Sizes = list[tuple[int, int]]
Targets = list[dict[str, Tensor]]


class Stage(NamedTuple):
    """What distinguishes a head of the cascade.

    Attributes:
        iou: overlap with an object from which on a box counts as one of it.
        coder_weights: factors of the four deltas of a box.
        loss_weight: weight of the head's losses.
    """

    iou: float
    coder_weights: tuple[float, float, float, float]
    loss_weight: float


STAGES = (
    Stage(0.5, (10.0, 10.0, 5.0, 5.0), 1.0),
    Stage(0.6, (20.0, 20.0, 10.0, 10.0), 0.5),
    Stage(0.7, (30.0, 30.0, 15.0, 15.0), 0.25),
)


class CascadeHeads(nn.Module):
    """The heads of Cascade R-CNN, in the place of torchvision's `RoIHeads`.

    In training every stage refines the boxes that it has sampled, for the next one to sample from. At inference class
    logits and probabilities of masks are means over the stages.

    Args:
        stages: each a `RoIHeads` with a `ClassAgnosticPredictor`; all of them with masks, or none.
        loss_weights: weights of the stages' losses.
    """

    def __init__(self, stages: Sequence[RoIHeads], loss_weights: Sequence[float]) -> None:
        super().__init__()
        self.stages, self.loss_weights = nn.ModuleList(stages), tuple(loss_weights)

    def forward(
        self, features: Features, proposals: list[Tensor], image_shapes: Sizes, targets: Targets | None = None
    ) -> tuple[Targets, dict[str, Tensor]]:
        """Return no detections and losses in training, else detections and no losses, as `RoIHeads` does."""
        if self.training:
            return [], self._losses(features, proposals, image_shapes, targets)
        return self._detections(features, proposals, image_shapes), {}

    def _heads(self) -> list[RoIHeads]:
        return [stage for stage in self.stages if isinstance(stage, RoIHeads)]

    def _losses(
        self, features: Features, proposals: list[Tensor], image_shapes: Sizes, targets: Targets | None
    ) -> dict[str, Tensor]:
        losses: dict[str, Tensor] = {}
        for number, (stage, weight) in enumerate(zip(self._heads(), self.loss_weights, strict=True), start=1):
            proposals, matches, labels, deltas_wanted = stage.select_training_samples(proposals, targets)
            assert targets is not None  # else this has raised
            logits, deltas = _predicted(stage, features, proposals, image_shapes)
            found = _box_losses(logits, deltas, labels, deltas_wanted)
            if stage.has_mask():
                found["loss_mask"] = _mask_loss(stage, features, proposals, image_shapes, targets, matches, labels)
            losses |= {f"{name}_{number}": weight * loss for name, loss in found.items()}
            refined = _refined(stage, deltas, proposals, image_shapes)
            # A box without an area is that of no object, and has no deltas to any.
            proposals = [boxes[remove_small_boxes(boxes, min_size=1e-2)] for boxes in refined]
        return losses

    def _detections(self, features: Features, proposals: list[Tensor], image_shapes: Sizes) -> Targets:
        every_logits, refined, stages = [], proposals, self._heads()
        for stage in stages:
            proposals = refined
            logits, deltas = _predicted(stage, features, proposals, image_shapes)
            every_logits.append(logits)
            refined = _refined(stage, deltas, proposals, image_shapes)
        logits = torch.stack(every_logits).mean(0)
        found = stage.postprocess_detections(logits, deltas, proposals, image_shapes)
        detections = [
            {"boxes": boxes, "labels": labels, "scores": scores} for boxes, scores, labels in zip(*found, strict=True)
        ]
        if stage.has_mask():
            boxes, labels = ([d[key] for d in detections] for key in ("boxes", "labels"))
            pooled = stage.mask_roi_pool(features, boxes, image_shapes)
            masks = [maskrcnn_inference(s.mask_predictor(s.mask_head(pooled)), labels) for s in stages]
            for detection, *of_stages in zip(detections, *masks, strict=True):
                detection["masks"] = torch.stack(of_stages).mean(0)
        return detections


def _predicted(stage: RoIHeads, features: Features, boxes: list[Tensor], image_shapes: Sizes) -> tuple[Tensor, Tensor]:
    """Return logits (R, classes) and deltas (R, 4 classes) of the boxes of all images."""
    return stage.box_predictor(stage.box_head(stage.box_roi_pool(features, boxes, image_shapes)))


def _refined(stage: RoIHeads, deltas: Tensor, boxes: list[Tensor], image_shapes: Sizes) -> list[Tensor]:
    """Return boxes moved by a stage's deltas, which all classes share, and clipped to their images; no gradients."""
    moved = stage.box_coder.decode(deltas[:, :4].detach(), boxes).reshape(-1, 4)
    of_images = moved.split([len(b) for b in boxes])
    return [clip_boxes_to_image(b, shape) for b, shape in zip(of_images, image_shapes, strict=True)]


def _box_losses(logits: Tensor, deltas: Tensor, labels: list[Tensor], deltas_wanted: list[Tensor]) -> dict[str, Tensor]:
    if not len(logits):  # the mean of nothing is no number; sums are zero, and all parameters keep a gradient
        return {"loss_classifier": logits.sum(), "loss_box_reg": deltas.sum()}
    classifier, box_reg = fastrcnn_loss(logits, deltas, labels, deltas_wanted)
    return {"loss_classifier": classifier, "loss_box_reg": box_reg}


def _mask_loss(
    stage: RoIHeads,
    features: Features,
    boxes: list[Tensor],
    image_shapes: Sizes,
    targets: Targets,
    matches: list[Tensor],
    labels: list[Tensor],
) -> Tensor:
    """Return the loss of the masks of boxes that are of an object."""
    objects = [torch.where(of_image > 0)[0] for of_image in labels]
    boxes, matches = ([x[chosen] for x, chosen in zip(xs, objects, strict=True)] for xs in (boxes, matches))
    logits = stage.mask_predictor(stage.mask_head(stage.mask_roi_pool(features, boxes, image_shapes)))
    return maskrcnn_loss(logits, boxes, [t["masks"] for t in targets], [t["labels"] for t in targets], matches)
