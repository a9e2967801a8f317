"""Detection of objects, and their masks: images with boxes, and the table of data sets.

    info = detection.describe(Source("scenes"))
    loader = detection.train_loader(Source("scenes"), masks=True, batch_size=2, device=device)

A batch is two lists: images float32 [3, H, W] in 0..1, of their own sizes and not normalised; and for each a dict of

    image_id  int64 []
    boxes     float32 [N, 4], left, top, right and bottom in pixels  \\
    labels    int64 [N], 1..K                                         training only
    masks     uint8 [N, H, W], where they are asked for              /
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from data import coco, digits, scenes
from data.decode import to_pixels
from data.decoded import DecodedLoader, Sample, Samples, mending, refuse, replace
from data.folder import Files, data_folder
from data.loader import Loader
from data.on_device import Normalize
from data.registry import IMAGENET_MEAN, IMAGENET_STD, look_up
from data.samplers import EvalSampler, TrainSampler
from data.types import Loading, Source
from repopt.errors import UserError

logger = logging.getLogger("repopt")

if TYPE_CHECKING:
    from pycocotools.coco import COCO

Target = dict[str, Tensor]


@dataclass(frozen=True)
class Row:
    """A data set in COCO's layout.

    Attributes:
        root: `Source.root` -> the folder with `train2017`, `val2017` and `annotations`.
        mean: per channel, of values in 0..1.
        std: likewise.
        flip: whether half the training images are mirrored.
    """

    root: Callable[[str], Path]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    flip: bool


DATASETS: dict[str, Row] = {
    "coco": Row(data_folder, IMAGENET_MEAN, IMAGENET_STD, flip=True),
    "scenes": Row(  # a mirrored digit is another thing
        lambda root: scenes.find(root) / "coco", digits.MEAN, digits.STD, flip=False
    ),
}


@dataclass(frozen=True)
class Info:
    """What is known of a data set before any image is decoded.

    Attributes:
        class_names: of the labels 1..K.
        category_ids: likewise, what the annotation files call them.
        annotations: the annotation file of the split "val".
    """

    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]
    annotations: Path


def describe(source: Source) -> Info:
    """What the annotations of the split "val" say.

    Raises:
        UserError: an unknown data set; a folder that is not in its layout; annotations that are not sound.
    """
    split = coco.read(look_up(source, DATASETS).root(source.root), "val")
    return Info(split.class_names, split.category_ids, split.file)


def statistics(source: Source) -> dict[str, tuple[float, float, float]]:
    """The "mean" and "std" by which images are normalised, per channel, of values in 0..1; no file is looked for.

    Raises:
        UserError: an unknown data set.
    """
    row = look_up(source, DATASETS)
    return {"mean": row.mean, "std": row.std}


def ground_truth(source: Source, *, masks: bool = False) -> COCO:
    """The annotations of the split "val" for pycocotools' evaluation; `masks`: of masks too.

    Raises:
        UserError: as `describe`; pycocotools is absent; with `masks`, an annotation has none that is sound.
    """
    tools = coco.tools()
    split = coco.read(look_up(source, DATASETS).root(source.root), "val")
    if masks:
        coco.check_masks(split, range(len(split.images)))
    found = tools.coco.COCO()
    found.dataset = split.content
    with contextlib.redirect_stdout(io.StringIO()):
        found.createIndex()
    return found


def train_loader(
    source: Source,
    *,
    masks: bool,
    batch_size: int,
    seed: int = 0,
    **loading: Any,
) -> Loader:
    """Training batches of one rank, all of `batch_size` images, in an order that (seed, epoch) gives.

    Crowds are left out, and images that have no boxes then. Where the set is one that may be mirrored, half the images
    are.

    Args:
        source: where the images come from; `on_bad_image` also says what to do with boxes that are empty or outside
            their image: leave them out, or refuse the annotation file.
        masks: whether targets have masks.
        batch_size: images per step on this rank.
        seed: of the order and of every variation.
        loading: see `Loading`.

    Raises:
        UserError: as `describe`, of either split; splits with different categories; an empty box, or with `masks` an
            annotation without one that is sound; fewer images than one step takes; and while iterating, an image whose
            size is not the one that the annotation file gives.
    """
    how = Loading(**loading)
    row, info = look_up(source, DATASETS), describe(source)
    split = coco.read(row.root(source.root), "train")
    if (split.category_ids, split.class_names) != (info.category_ids, info.class_names):
        raise UserError(f"{split.file} and {info.annotations} have different categories")
    samples = Annotated(split, _usable(split, source.on_bad_image), masks=masks, flip=row.flip, seed=seed)
    return _Loader(
        samples,
        TrainSampler(len(samples), batch_size, how.rank, how.world_size, seed),
        _Unit(how.device, how.memory_format),
        mend=mending(source.on_bad_image, replace),
        join=_join,
        how=how,
    )


def eval_loader(
    source: Source,
    *,
    batch_size: int,
    split: str = "val",
    most: int | None = None,
    seed: int = 0,
    **loading: Any,
) -> Loader:
    """All images of a split, whose targets are their ids; over all ranks every image comes exactly once.

    Args:
        source: where the images come from.
        batch_size: most images per step on this rank.
        split: whose images.
        most: how many of them; None = all.
        seed: which ones, where not all.
        loading: see `Loading`.

    Raises:
        UserError: as `describe`; and while iterating, an image that cannot be read, or whose size is not the one that
            the annotation file gives.
    """
    how = Loading(**loading)
    found = coco.read(look_up(source, DATASETS).root(source.root), split)
    samples = Images(found, np.arange(len(found.names)), seed=0)  # nothing is random
    return _Loader(
        samples,
        EvalSampler(len(samples), batch_size, how.rank, how.world_size, most, seed),
        _Unit(how.device, how.memory_format),
        mend=refuse,
        join=_join,
        how=how,
    )


def _usable(split: coco.Split, on_bad_image: str) -> np.ndarray:
    """Which annotations to train on, int64, sorted by image."""
    usable = ~split.crowd
    empty = usable & split.empty()
    if empty.any():
        message = (
            f"{split.file}: {empty.sum()} boxes are empty or outside their images, the first of annotation "
            f"{split.annotation_ids[empty][0]}"
        )
        if on_bad_image == "raise":
            raise UserError(message)
        logger.warning("%s; they are left out", message)
    chosen = np.flatnonzero(usable & ~empty)
    return chosen[np.argsort(split.images[chosen], kind="stable")]


class Images(Samples):
    """Images with their ids.

    Args:
        split: a sound annotation file.
        which: of its images, int64.
        seed: of every variation.
    """

    def __init__(self, split: coco.Split, which: np.ndarray, seed: int) -> None:
        super().__init__(seed)
        self._file = str(split.file)
        self._files = Files(split.folder, [str(split.folder / split.names[k]) for k in which.tolist()])
        self._sizes, self._ids = split.sizes[which], torch.from_numpy(split.image_ids[which])
        self.contents = self._ids

    def __len__(self) -> int:
        return len(self._files)

    def name(self, index: int) -> str:  # noqa: D102
        return self._files.name(index)

    def sample(self, index: int) -> tuple[Tensor, Target]:  # noqa: D102
        pixels = to_pixels(self._files.read(index))
        width, height = self._sizes[index].tolist()
        if pixels.shape[:2] != (height, width):
            raise UserError(
                f"image {self.name(index)!r} has {pixels.shape[1]} x {pixels.shape[0]} pixels, "
                f"{self._file} says {width} x {height}"
            )
        return pixels, {"image_id": self._ids[index].clone()}


class Annotated(Images):
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

    def sample(self, index: int) -> tuple[Tensor, Target]:  # noqa: D102
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


class _Unit:
    """uint8 images [3, H, W] -> float32 in 0..1 of a given memory format."""

    def __init__(self, device: torch.device, memory_format: torch.memory_format) -> None:
        self._normalize = Normalize((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), device, memory_format)

    def __call__(self, images: list[Tensor]) -> list[Tensor]:
        """The images of a batch."""
        return [self._normalize(image[None])[0] for image in images]


class _Loader(DecodedLoader):
    def _on_device(self, images: list[Tensor], targets: list[Target]) -> tuple[list[Tensor], list[Target]]:
        return (
            [self._send(image).permute(2, 0, 1) for image in images],
            [{key: self._send(value) for key, value in target.items()} for target in targets],
        )


def _join(samples: list[Sample]) -> tuple[list[Tensor], list[Target], Tensor]:
    images, targets, indices = zip(*samples, strict=True)
    return list(images), list(targets), torch.tensor(indices)
