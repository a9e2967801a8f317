"""Detections as COCO has them, and its measures of them; the extra downstream."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor
from torchvision.ops import box_convert

from repopt.errors import UserError, one_line

try:
    from pycocotools import mask as rle
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval
except ImportError as error:
    raise UserError(
        f"detection is evaluated by pycocotools (pip install 'repopt[downstream]'): {one_line(error)}"
    ) from None

Result = dict[str, Any]

WHERE = {"box": "bbox", "mask": "segmentation"}  # in a result
KIND = {"box": "bbox", "mask": "segm"}  # of an evaluation


def results_of(detections: Mapping[str, Tensor], image_id: int, category_ids: Sequence[int]) -> list[Result]:
    """Return the detections of an image as COCO writes them.

    Args:
        detections: "boxes" (D, 4), "labels" (D,), "scores" (D,), and of a detector with masks "masks" (D, 1, H, W).
        image_id: of COCO.
        category_ids: of COCO, by label, from 1 on.
    """
    boxes = box_convert(detections["boxes"], "xyxy", "xywh").tolist()
    labels, scores = detections["labels"].tolist(), detections["scores"].tolist()
    results = [
        {"image_id": image_id, "category_id": category_ids[label - 1], "score": score, WHERE["box"]: box}
        for box, label, score in zip(boxes, labels, scores, strict=True)
    ]
    if "masks" in detections:
        masks = (detections["masks"][:, 0] > 0.5).byte().cpu().numpy()
        for result, mask in zip(results, masks, strict=True):
            result[WHERE["mask"]] = rle.encode(np.asfortranarray(mask))
    return results


def average_precisions(ground_truth: COCO, results: Sequence[Result], what: str) -> list[float]:
    """Return mAP, AP50, AP75, and the mAP of small, medium and large objects, in percent; NaN without such objects.

    Args:
        ground_truth: of COCO; all of its images count.
        results: see `results_of`.
        what: "box" or "mask".
    """
    # Copies, as pycocotools writes into them, without boxes where masks are measured: it would take areas from boxes.
    keys = ("image_id", "category_id", "score", WHERE[what])
    copies = [{key: result[key] for key in keys} for result in results]
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(ground_truth, _loaded(ground_truth, copies), KIND[what])
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return [100 * value if value >= 0 else math.nan for value in evaluation.stats[:6].tolist()]


def _loaded(ground_truth: COCO, results: list[Result]) -> COCO:
    if results:
        return ground_truth.loadRes(results)
    nothing = COCO()  # which loadRes does not take
    nothing.dataset = {**ground_truth.dataset, "annotations": []}
    nothing.createIndex()
    return nothing
