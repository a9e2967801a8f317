"""A detector in two parts: its predictor, which computes with kernels, and what follows, which finds objects."""

from __future__ import annotations

import copy
from abc import abstractmethod

from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList
from typing_extensions import override

from repopt.detection.parts import Transform
from repopt.layers import ModuleWrapper

Outputs = dict[str, Tensor]
Targets = list[dict[str, Tensor]]


class Detector(nn.Module):
    """A detector that is called as torchvision's are.

    In training ``model(images, targets)`` is a dict of losses, in eval mode ``model(images)`` a list of a dict per
    image: "boxes" (D, 4), "labels" (D,), "scores" (D,), and "masks" (D, 1, H, W) where it finds masks. Images are
    (3, H, W) floats in [0, 1]; targets have "boxes" (K, 4), "labels" (K,) from 1 on, and "masks" (K, H, W). Boxes are
    x1, y1, x2, y2.

        batch, _ = detector.transform(images)
        found = detector.detections(detector.predictor(batch.tensors), batch, sizes)  # what detector(images) gives

    Attributes:
        masks: whether it finds masks.
        transform: resizes and normalises images, and puts them into a batch.
    """

    masks: bool
    transform: Transform

    @property
    @abstractmethod
    def predictor(self) -> nn.Module:
        """Return the network up to the raw predictions: normalised images (N, 3, H, W) -> tensors by name.

        H and W are multiples of what `transform` pads to. It shares its modules with the detector, in which they have
        the same names.
        """

    @abstractmethod
    def losses(self, raw: Outputs, batch: ImageList, targets: Targets) -> Outputs:
        """Return the losses of raw predictions.

        Args:
            raw: what `predictor` gives.
            batch: the images that it was given, and their sizes, as `transform` gives them.
            targets: of the batch's images, as `transform` gives them.
        """

    @abstractmethod
    def detections(self, raw: Outputs, batch: ImageList, sizes: list[tuple[int, int]]) -> Targets:
        """Return what raw predictions amount to, in eval mode, a dict per image.

        Args:
            raw, batch: see `losses`.
            sizes: height and width of the images before `transform`, of which the boxes are.
        """

    def without_predictor(self) -> Detector:
        """Return the detector without what its predictor is made of, to `run` other forms of that: a copy with the very
        parameters of this one.
        """
        own = {id(child): nn.Identity() for child in self.predictor.children()}
        return copy.deepcopy(self, own | {id(value): value for value in (*self.parameters(), *self.buffers())})

    @override
    def forward(self, images: list[Tensor], targets: Targets | None = None) -> Outputs | Targets:
        return self.run(self.predictor, images, targets)

    def run(self, predictor: nn.Module, images: list[Tensor], targets: Targets | None) -> Outputs | Targets:
        """Return what the detector gives of what a predictor, its own or another form of it, gives."""
        sizes = [(image.shape[-2], image.shape[-1]) for image in images]
        batch, targets = self.transform(images, targets)
        raw = predictor(batch.tensors)
        if not self.training:
            return self.detections(raw, batch, sizes)
        assert targets is not None, "a training needs targets"
        return self.losses(raw, batch, targets)


class DetectorOn(ModuleWrapper):
    """A detector whose predictor is another form of its own, such as one for images of a single size.

    Args:
        detector: of ours, whose parameters these are where they are not the predictor's.
        predictor: its own one, or what was made of it: quantized, exported.
        transform: makes the batches that the predictor takes.

    Attributes:
        masks: whether it finds masks.
    """

    def __init__(self, detector: Detector, predictor: nn.Module, transform: Transform) -> None:
        rest = detector.without_predictor()
        rest.transform = copy.deepcopy(transform)
        # By the names in the detector, which are those of its parameters.
        named, form = nn.Module(), predictor.wrapped_module if isinstance(predictor, ModuleWrapper) else predictor
        for module in (rest, form):
            for name, child in module.named_children():
                named.add_module(name, child)
        super().__init__(named)
        self.detector, self.predictor, self.masks = rest, predictor, detector.masks
        self.train(predictor.training)

    @override
    def forward(self, images: list[Tensor], targets: Targets | None = None) -> Outputs | Targets:
        return self.detector.run(self.predictor, images, targets)
