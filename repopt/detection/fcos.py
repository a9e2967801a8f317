"""FCOS (arXiv 1904.01355), a detector of one stage and without anchors, of plain convolutions alone.

Assignment, losses and post-processing are torchvision's. The layers are chosen for networks that become integers: every
3x3 convolution is a declared block, with batch norm and ReLU.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torchvision.models.detection import fcos
from torchvision.models.detection.image_list import ImageList
from typing_extensions import override

from repopt.detection.backbone import PathAggregation, block
from repopt.detection.parts import Anchors, wide
from repopt.layers import InitialScales

CONVS = 2  # 3x3 convolutions of a head before each of its two ends, as in YOLOX (arXiv 2107.08430)

Outputs = dict[str, Tensor]
Targets = list[dict[str, Tensor]]


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
    them. So every level has layers of its own, as in YOLOv6 (arXiv 2209.02976).
    """

    @override
    def forward(self, maps: dict[str, Tensor]) -> Outputs:
        every = [head([maps[level]]) for level, head in self.items()]
        return {name: torch.cat([found[name] for found in every], 1) for name in every[0]}

    def compute_loss(
        self, targets: Targets, head_outputs: Outputs, anchors: list[Tensor], matched_idxs: list[Tensor]
    ) -> Outputs:
        """Return torchvision's losses, of all levels."""
        head = next(iter(self.values()))
        assert isinstance(head, LevelHead)
        return head.compute_loss(targets, head_outputs, anchors, matched_idxs)


class Fcos(fcos.FCOS):
    """FCOS, which is called as a `Detector` is: losses of images and targets in training, else boxes, labels, scores.

    What computes with kernels is its `predictor`; what follows has no parameters, and stays in float:

        raw = detector.predictor(batch.tensors)
        found = detector.detections(raw, batch, sizes)

    Args:
        name, mode, num_classes, channels, sizes, max_size, mean, std: see `create_detector`.
        initial_scales, backbone: see `PathAggregation`.

    Attributes:
        masks: whether it finds masks.
        reductions: how much smaller than the image the maps of the pyramid are.

    Raises:
        UserError: see `PathAggregation`.
    """

    masks: ClassVar[bool] = False

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
            min_size=tuple(sizes),  # type: ignore[arg-type]  # of which one is drawn
            max_size=max_size,
            image_mean=mean,  # type: ignore[arg-type]  # a sequence will do
            image_std=std,  # type: ignore[arg-type]
            anchor_generator=Anchors([(reduction,) for reduction in reductions], [(1.0,)] * len(reductions)),
            head=DecoupledHead({level: LevelHead(channels, num_classes, **blocks) for level in pyramid.levels}),
            score_thresh=0.05,
            size_divisible=reductions[-1],
        )
        self.reductions = tuple(reductions)

    @property
    def predictor(self) -> nn.Sequential:
        """Return the network up to the raw predictions: normalised images (N, 3, H, W) -> what the head gives.

        H and W are multiples of the last of `reductions`. It shares its modules with the detector.
        """
        return nn.Sequential(OrderedDict(backbone=self.backbone, head=self.head))

    @override
    def forward(self, images: list[Tensor], targets: Targets | None = None) -> Outputs | Targets:
        sizes = [(image.shape[-2], image.shape[-1]) for image in images]
        batch, targets = self.transform(images, targets)
        raw = self.predictor(batch.tensors)
        if not self.training:
            return self.detections(raw, batch, sizes)
        assert targets is not None, "a training needs targets"
        return self.losses(raw, batch, targets)

    def losses(self, raw: Outputs, batch: ImageList, targets: Targets) -> Outputs:
        """Return torchvision's losses of raw predictions.

        Args:
            raw: what `predictor` gives.
            batch: the images that it was given, and their sizes, as `transform` gives them.
            targets: of the batch's images, as `transform` gives them; labels from 1 on.
        """
        places, anchors = self._anchors(batch)
        # torchvision's FCOS has a logit for label 0, which is no object's; here the first one is of label 1.
        targets = [target | {"labels": target["labels"] - 1} for target in targets]
        return self.compute_loss(targets, _wide(raw), anchors, places)

    def detections(self, raw: Outputs, batch: ImageList, sizes: list[tuple[int, int]]) -> Targets:
        """Return what raw predictions amount to, a dict of "boxes", "labels" and "scores" per image.

        Args:
            raw, batch: see `losses`.
            sizes: height and width of the images before `transform`, of which the boxes are.
        """
        places, anchors = self._anchors(batch)
        levels = {name: list(values.split(places, 1)) for name, values in _wide(raw).items()}
        found = self.postprocess_detections(levels, [list(a.split(places)) for a in anchors], batch.image_sizes)
        found = [detections | {"labels": detections["labels"] + 1} for detections in found]
        return self.transform.postprocess(found, batch.image_sizes, sizes)

    def _anchors(self, batch: ImageList) -> tuple[list[int], list[Tensor]]:
        """Return the number of places of every map, and for every image the squares around all of them, (A, 4)."""
        height, width = batch.tensors.shape[-2:]
        maps = [batch.tensors.new_empty(0, height // r, width // r) for r in self.reductions]
        return [places.shape[1] * places.shape[2] for places in maps], self.anchor_generator(batch, maps)


def _wide(raw: Outputs) -> Outputs:
    return {name: wide(values) for name, values in raw.items()}
