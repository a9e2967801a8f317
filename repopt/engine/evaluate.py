"""One evaluation."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from repopt.distributed import sum_over_processes
from repopt.engine.precision import Precision


class Evaluation(NamedTuple):
    """Accuracies in percent and the mean cross-entropy over every image of all processes, each counted once."""

    top1: float
    top5: float
    loss: float
    images: int

    def __str__(self) -> str:
        return f"top-1 {self.top1:.3f} % top-5 {self.top5:.3f} % loss {self.loss:.4f} on {self.images} images"


@torch.inference_mode()
def evaluate(model: nn.Module, loader: Iterable[tuple[Tensor, Tensor]], precision: Precision) -> Evaluation:
    """Evaluate a model on the images that this process's loader gives, together with the other processes.

    Args:
        model: not wrapped in DDP; left in eval mode.
        loader: (images, class indices) on the device; processes may have different numbers of batches.
    """
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64, device=precision.device)
    for images, targets in loader:
        with precision.autocast():
            logits = model(images)
        logits = logits.float()
        ranked = logits.topk(min(5, logits.shape[1])).indices == targets[:, None]
        losses = F.cross_entropy(logits, targets, reduction="none").double()
        sums += torch.stack([ranked[:, 0].sum(), ranked.sum(), losses.sum(), losses.new_full((), len(images))])
    top1, top5, loss, images_seen = sum_over_processes(sums).tolist()
    return Evaluation(100 * top1 / images_seen, 100 * top5 / images_seen, loss / images_seen, int(images_seen))
