"""How many images a second a network takes at inference."""

from __future__ import annotations

import time

import torch
from torch import nn

from train.precision import Precision


@torch.inference_mode()
def measure_throughput(
    model: nn.Module,
    *,
    batch_size: int,
    image_size: int,
    channels: int = 3,
    precision: Precision,
    memory_format: torch.memory_format = torch.contiguous_format,
    seconds: float = 5.0,
) -> float:
    """Images per second in eval mode on one batch of random images, over at least `seconds` after a warm-up."""
    model.eval()
    images = torch.randn(batch_size, channels, image_size, image_size, device=precision.device)
    images = images.contiguous(memory_format=memory_format)

    def run(batches: int) -> float:
        started = time.perf_counter()
        for _ in range(batches):
            with precision.autocast():
                model(images)
        if precision.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    run(3)
    batches = max(10, int(seconds / run(3) * 3))
    return batches * batch_size / run(batches)
