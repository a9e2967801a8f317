"""The accuracy of a classifier."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train.distributed import sum_over_processes
from train.precision import Precision


class Evaluation(NamedTuple):
    """Accuracies in percent over every image of all processes, each counted once, and the mean cross-entropy.

    An image that could not be read counts as a wrong answer, and has no loss.
    """

    top1: float
    top5: float
    loss: float
    images: int
    unreadable: int = 0

    @property
    def score(self) -> float:
        """Return top-1."""
        return self.top1

    def numbers(self) -> dict[str, float]:
        """Return all fields by name."""
        return self._asdict()

    def __str__(self) -> str:
        unreadable = f", {self.unreadable} of them unreadable and counted as wrong" if self.unreadable else ""
        return (
            f"top-1 {self.top1:.3f} % top-5 {self.top5:.3f} % loss {self.loss:.4f} on {self.images} images{unreadable}"
        )


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    precision: Precision,
    *,
    stops: Callable[[], object] = lambda: False,
) -> Evaluation | None:
    """Return a classifier's accuracy (see `Evaluate`); the class of an image that could not be read is negative."""
    model.eval()
    sums = torch.zeros(6, dtype=torch.float64, device=precision.device)
    for images, targets in loader:
        if stops():
            sums[5] = 1
            break
        with precision.autocast():
            logits = model(images)
        logits = logits.float()
        ranked = logits.topk(min(5, logits.shape[1])).indices == targets[:, None]
        losses = F.cross_entropy(logits, targets, reduction="none").double()
        count = losses.new_full((), len(images))
        sums[:5] += torch.stack([ranked[:, 0].sum(), ranked.sum(), losses.sum(), count, (targets < 0).sum()])
    top1, top5, loss, images_seen, unreadable, given_up = sum_over_processes(sums).tolist()
    if given_up:
        return None
    readable = images_seen - unreadable
    return Evaluation(
        100 * top1 / images_seen,
        100 * top5 / images_seen,
        loss / readable if readable else math.nan,
        int(images_seen),
        int(unreadable),
    )
