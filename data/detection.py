"""Detection of objects, and their masks: images with boxes.

    images = data.Detection(Source("scenes"), masks=True)
    loader = data.train_loader(images, batch_size=2, device=device)

A batch is two lists: images float32 [3, H, W] in 0..1, of their own sizes and not normalized; and for each a dict of

    image_id  int64 []
    boxes     float32 [N, 4], left, top, right and bottom in pixels  \\
    labels    int64 [N], 1..K                                         training only
    masks     uint8 [N, H, W], where they are asked for              /
"""

from __future__ import annotations

import contextlib
import functools
import io
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from typing_extensions import override

from data import coco, registry
from data.build import ImageSet
from data.decode import advice_on_size, to_pixels
from data.decoded import ImageDataset, Sample
from data.folder import Files
from data.registry import DetectionSpec
from data.types import LoaderConfig, Source
from repopt.errors import UserError
from repopt.images import Preprocessing

logger = logging.getLogger("repopt")

if TYPE_CHECKING:
    from pycocotools.coco import COCO

MIN_SIDE = 1e-3  # of a box, in pixels; less is empty

Target = dict[str, Tensor]


@dataclass(frozen=True)
class Detection(ImageSet):
    """A data set with boxes, and masks where they are asked for; the annotations of "val" are read once.

    Training leaves out crowds, and images that have no boxes then; half the images are mirrored where the set is one
    that may be. In evaluation the targets are the images' ids. Boxes and masks are of an image as viewers show it,
    turned where EXIF says so (data.decode).

    Attributes:
        source: where the images come from; `on_bad_image` also says what to do with boxes that are empty or outside
            their image: leave them out, or refuse the annotation file.
        masks: whether training targets have masks, and the ground truth is also of masks.

    Raises:
        UserError: (by what reads the annotations) an unknown data set; a folder that is not in its layout; annotations
            that are not sound; splits with different categories; an empty box, or with `masks` an annotation without
            one that is sound; and while iterating, a test image that cannot be read, or an image whose size is not the
            one that the annotation file gives.
    """

    source: Source
    masks: bool = False

    @property
    @override
    def spec(self) -> DetectionSpec:
        return registry.find(self.source, DetectionSpec)

    @functools.cached_property
    def _val(self) -> coco.Split:
        return coco.Split(self.spec.root(self.source.root), "val", self.source.classes)

    @property
    @override
    def class_names(self) -> tuple[str, ...]:
        """The names of the labels 1..K."""
        return self._val.class_names

    @property
    def category_ids(self) -> tuple[int, ...]:
        """What the annotation files call the labels 1..K."""
        return self._val.category_ids

    @property
    def annotations(self) -> Path:
        """The annotation file of the split "val"."""
        return self._val.file

    @functools.cached_property
    def ground_truth(self) -> COCO:
        """The annotations of the split "val" for pycocotools' evaluation.

        Raises:
            UserError: also where pycocotools is absent.
        """
        tools = coco.tools()
        if self.masks:
            self._val.check_masks(range(len(self._val.images)))
        found = tools.coco.COCO()
        found.dataset = self._val.content
        with contextlib.redirect_stdout(io.StringIO()):
            found.createIndex()
        return found

    @override
    def dataset(self, split: str, *, training: bool, seed: int, cfg: LoaderConfig) -> DetectionDataset:
        found = (
            self._val if split == "val" else coco.Split(self.spec.root(self.source.root), split, self.source.classes)
        )
        if not training:
            return DetectionDataset(found, np.arange(len(found.names)), seed)
        if (found.category_ids, found.class_names) != (self.category_ids, self.class_names):
            raise UserError(f"{found.file} and {self.annotations} have different categories")
        usable = _usable(found, self.source.on_bad_image)
        return AnnotatedDataset(found, usable, masks=self.masks, flip=self.spec.flip, seed=seed)

    @property
    @override
    def preprocessing(self) -> Preprocessing:
        return Preprocessing((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))  # the network does the rest

    @staticmethod
    @override
    def collate(samples: list[Sample]) -> tuple[list[Tensor], list[Target], Tensor]:
        images, targets, indices = zip(*samples, strict=True)
        return list(images), list(targets), torch.tensor(indices)


def _usable(split: coco.Split, on_bad_image: str) -> np.ndarray:
    """Return which annotations to train on, int64, sorted by image."""
    empty = ~split.crowd & ((split.boxes[:, 2:] - split.boxes[:, :2]) < MIN_SIDE).any(1)
    if empty.any():
        message = (
            f"{split.file}: {empty.sum()} boxes are empty or outside their images, the first of annotation "
            f"{split.annotation_ids[empty][0]}"
        )
        if on_bad_image == "raise":
            raise UserError(message)
        logger.warning("%s; they are left out", message)
    chosen = np.flatnonzero(~split.crowd & ~empty)
    return chosen[np.argsort(split.images[chosen], kind="stable")]


class DetectionDataset(ImageDataset):
    """Images with their ids.

    Args:
        split: a sound annotation file.
        which: of its images, int64.
        seed: of every variation.
    """

    def __init__(self, split: coco.Split, which: np.ndarray, seed: int) -> None:
        self._file, self._sizes = str(split.file), split.sizes[which]
        self._ids = torch.from_numpy(split.image_ids[which])
        images = Files(split.folder, [str(split.folder / split.names[k]) for k in which.tolist()])
        super().__init__(images, self._ids, seed)

    @override
    def sample(self, index: int) -> tuple[Tensor, Target]:
        encoded = self._images.read(index)
        pixels = to_pixels(encoded)
        width, height = self._sizes[index].tolist()
        if pixels.shape[:2] != (height, width):
            raise UserError(
                f"image {self._images.name(index)!r} has {pixels.shape[1]} x {pixels.shape[0]} pixels, "
                f"{self._file} says {width} x {height}{advice_on_size(encoded)}"
            )
        return pixels, {"image_id": self._ids[index].clone()}


class AnnotatedDataset(DetectionDataset):
    """Images with their boxes, mirrored or not.

    Args:
        split: a sound annotation file.
        chosen: of its annotations, int64, sorted by image; images without one are left out.
        masks: whether to give masks.
        flip: whether to mirror half the images.
        seed: of every variation.
    """

    def __init__(self, split: coco.Split, chosen: np.ndarray, *, masks: bool, flip: bool, seed: int) -> None:
        which, counts = np.unique(split.images[chosen], return_counts=True)
        super().__init__(split, which, seed)
        self._ends = np.cumsum([0, *counts])
        self._boxes, self._labels = torch.from_numpy(split.boxes[chosen]), torch.from_numpy(split.labels[chosen])
        self._masks = coco.Masks(split, chosen) if masks else None
        self._flip = v2.RandomHorizontalFlip(0.5 * flip)
        of_images = torch.from_numpy(counts), self._labels, self._boxes.flatten().view(torch.int64)
        self.contents = torch.cat([self._ids, *of_images])

    @override
    def sample(self, index: int) -> tuple[Tensor, Target]:
        pixels, target = super().sample(index)
        size = height, width = tuple(pixels.shape[:2])
        own = range(self._ends[index], self._ends[index + 1])
        # Copies: a worker would send a view with all that it is a view of.
        boxes = self._boxes[own.start : own.stop].float()
        target["boxes"] = tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=size)
        target["labels"] = self._labels[own.start : own.stop].clone()
        if self._masks is not None:
            masks = np.ascontiguousarray([self._masks.decode(k, height, width) for k in own])
            target["masks"] = tv_tensors.Mask(torch.from_numpy(masks))
        image, target = self._flip(tv_tensors.Image(pixels.permute(2, 0, 1)), target)
        return image.permute(1, 2, 0), {key: value.as_subclass(Tensor) for key, value in target.items()}
