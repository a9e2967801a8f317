"""The average precision of a detector, as COCO measures it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from train.distributed import gather, run_on_main
from train.precision import Precision

if TYPE_CHECKING:
    from pycocotools.coco import COCO

# Of what is measured of boxes and of masks, in the order of `coco.average_precisions`.
TITLES = {"map": "mAP", "ap50": "AP50", "ap75": "AP75", "small": "small", "medium": "medium", "large": "large"}


class Detection(NamedTuple):
    """Average precisions in percent; those of masks are None for a detector without them, NaN is of no objects.

    Attributes:
        box_map, mask_map: means over the IoUs from 0.5 to 0.95 with which a detection is one of an object.
        box_ap50, box_ap75, mask_ap50, mask_ap75: at one IoU.
        box_small, box_medium, box_large, mask_small, mask_medium, mask_large: `map` of objects up to 32 x 32 pixels, up
            to 96 x 96, and larger ones.
        images: evaluated.
    """

    box_map: float
    box_ap50: float
    box_ap75: float
    box_small: float
    box_medium: float
    box_large: float
    images: int
    mask_map: float | None = None
    mask_ap50: float | None = None
    mask_ap75: float | None = None
    mask_small: float | None = None
    mask_medium: float | None = None
    mask_large: float | None = None

    @property
    def score(self) -> float:
        """Return the mAP of boxes."""
        return self.box_map

    def numbers(self) -> dict[str, float]:
        """Return all fields by name, without those of masks where there are none."""
        return {name: value for name, value in self._asdict().items() if value is not None}

    def __str__(self) -> str:
        numbers, parts = self.numbers(), []
        for what in ("box", "mask"):
            if f"{what}_map" in numbers:
                parts += [what, *(f"{title} {numbers[f'{what}_{name}']:.2f}" for name, title in TITLES.items())]
        return f"{' '.join(parts)} on {self.images} images"


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    loader: Iterable[tuple[list[Tensor], list[dict[str, Any]]]],
    precision: Precision,
    *,
    ground_truth: COCO,
    category_ids: Sequence[int],
    stops: Callable[[], object] = lambda: False,
) -> Detection | None:
    """Return the average precision of a detector on all images of a ground truth (see `Evaluate`).

    Args:
        model: a `repopt.detection.Detector`, or what has its attributes; see `Evaluate`.
        loader: images, (3, H, W) each, and for each a dict with its "image_id".
        precision, stops: see `Evaluate`.
        ground_truth: of all processes' images.
        category_ids: of the ground truth, by label, from 1 on.
    """
    from train.evaluation import coco  # an extra

    model.eval()
    found: dict[int, list[coco.Result]] = {}
    given_up = False
    for images, targets in loader:
        if given_up := bool(stops()):
            break
        with precision.autocast():
            every = model(images)
        for detections, target in zip(every, targets, strict=True):
            image_id = int(target["image_id"])
            found[image_id] = coco.results_of(detections, image_id, category_ids)
    of_processes = gather(None if given_up else found)

    def measured() -> Detection | None:
        if None in of_processes:
            return None
        by_image = {image_id: results for of_process in of_processes for image_id, results in of_process.items()}
        results = [result for of_image in by_image.values() for result in of_image]
        numbers = {
            f"{what}_{name}": value
            for what in (("box", "mask") if model.masks else ("box",))
            for name, value in zip(TITLES, coco.average_precisions(ground_truth, results, what), strict=True)
        }
        return Detection(**numbers, images=len(ground_truth.getImgIds()))

    return run_on_main(measured)
