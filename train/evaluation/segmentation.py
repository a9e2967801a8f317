"""The mean intersection over union of a segmenter."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from repopt import segmentation
from repopt.errors import UserError
from train.distributed import sum_over_processes
from train.precision import Precision

if TYPE_CHECKING:
    from torchmetrics import MetricCollection


class Segmentation(NamedTuple):
    """Intersection over union in percent, over all pixels of all processes, each counted once.

    Attributes:
        miou: mean over the classes that occur, in the labels or in what was predicted.
        pixel_accuracy: of the pixels that have a label, in percent.
        iou: by class; NaN where it does not occur.
        images: evaluated.
    """

    miou: float
    pixel_accuracy: float
    iou: dict[str, float]
    images: int

    @property
    def score(self) -> float:
        """Return the mIoU."""
        return self.miou

    def numbers(self) -> dict[str, float]:
        """Return all numbers by name, the IoU of each class among them."""
        of_classes = {f"iou {name}": value for name, value in self.iou.items()}
        return {"miou": self.miou, "pixel_accuracy": self.pixel_accuracy, **of_classes, "images": self.images}

    def __str__(self) -> str:
        found = f"mIoU {self.miou:.3f} % pixel accuracy {self.pixel_accuracy:.3f} % on {self.images} images"
        return f"{found}; IoU {' '.join(f'{name} {value:.1f}' for name, value in self.iou.items())}"


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    precision: Precision,
    *,
    class_names: Sequence[str],
    window: tuple[int, int] | None = None,
    stride: tuple[int, int] | None = None,
    stops: Callable[[], object] = lambda: False,
) -> Segmentation | None:
    """Return the mIoU of a segmenter (see `Evaluate`).

    Args:
        model: see `Evaluate`.
        loader: images (N, 3, H, W) of any size, and labels int64 (N, H, W), `IGNORED` where there is none.
        precision, stops: see `Evaluate`.
        class_names: of every class.
        window, stride: see `repopt.segmentation.predict`.
    """
    metrics = build_metrics(class_names).to(precision.device)
    model.eval()
    counts = torch.zeros(2, dtype=torch.int64, device=precision.device)  # images, and processes that have given up
    for images, labels in loader:
        if stops():
            counts[1] = 1
            break
        with precision.autocast():
            logits = segmentation.predict(model, images, window, stride)
        with _any_algorithm():
            metrics.update(logits.argmax(1), labels)
        counts[0] += len(images)
    seen, given_up = sum_over_processes(counts).tolist()
    if given_up:
        return None
    found = metrics.compute()  # over all processes
    iou = 100 * found["iou"].double()
    return Segmentation(
        iou.nanmean().item(),
        100 * found["accuracy"].item(),
        dict(zip(class_names, iou.tolist(), strict=True)),
        seen,
    )


def build_metrics(class_names: Sequence[str]) -> MetricCollection:
    """Build the metrics: intersection over union by class ("iou"), and the pixel accuracy ("accuracy"), in 0..1.

    Raises:
        UserError: torchmetrics is not installed.
    """
    try:
        from torchmetrics import MetricCollection
        from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex
    except ImportError:
        raise UserError(segmentation.NEEDS.format("torchmetrics")) from None
    settings: dict[str, Any] = {
        "num_classes": len(class_names),
        "ignore_index": segmentation.IGNORED,
        "validate_args": False,
    }
    return MetricCollection(
        {
            "iou": MulticlassJaccardIndex(average=None, zero_division=math.nan, **settings),
            "accuracy": MulticlassAccuracy(average="micro", **settings),
        }
    )


@contextmanager
def _any_algorithm() -> Iterator[None]:
    """Allow any algorithm: counting gives the same in any order, and a deterministic one would take gigabytes."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    yield
    torch.use_deterministic_algorithms(before)
