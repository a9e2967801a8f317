"""Pictures with what a network has found in them drawn over."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import torch
from torch import Tensor
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

MIN_SCORE = 0.5  # of a box that is shown
MIN_SIDE = 320  # pixels of the longer side of an image, so that labels can be read
FONT = str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"))
PALETTE = [tuple(color) for color in matplotlib.colormaps["tab20"](range(20), bytes=True)[:, :3].tolist()]  # by class
BOXES: dict[str, Any] = {"width": 2, "font": FONT, "font_size": 20, "label_colors": "white", "fill_labels": True}


def colored(picture: Tensor, label: Tensor, classes: int) -> Tensor:
    """Return a picture, uint8 (3, H, W), with a colour over every pixel of a class; label (H, W)."""
    masks = torch.stack([label == index for index in range(classes)])
    return draw_segmentation_masks(picture, masks, alpha=0.7, colors=_colors_of(range(classes)))


def outlined(picture: Tensor, found: dict[str, Tensor], class_names: Sequence[str], min_score: float) -> Tensor:
    """Return a picture, uint8 (3, H, W), with the objects that a detector has found there, those that are sure."""
    sure = found["scores"] >= min_score
    classes = (found["labels"][sure] - 1).tolist()
    if "masks" in found and sure.any():
        masks = found["masks"][sure, 0].cpu() > 0.5
        picture = draw_segmentation_masks(picture, masks, alpha=0.6, colors=_colors_of(classes))
    return boxed(picture, found["boxes"][sure].cpu(), classes, class_names)


def boxed(picture: Tensor, boxes: Tensor, classes: Sequence[int], class_names: Sequence[str]) -> Tensor:
    """Return a picture, enlarged where it is small, with boxes (N, 4) and the names of their classes."""
    times = -(-MIN_SIDE // max(picture.shape[1:]))
    picture = picture.repeat_interleave(times, 1).repeat_interleave(times, 2)
    if not len(boxes):
        return picture
    names = [class_names[index] for index in classes]
    return draw_bounding_boxes(picture, times * boxes, names, _colors_of(classes), **BOXES)


def _colors_of(classes: Iterable[int]) -> list[tuple[int, ...]]:
    """Return the colour of every class."""
    return [PALETTE[index % len(PALETTE)] for index in classes]
