"""A model in several processes, which average their gradients."""

from __future__ import annotations

import warnings

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def data_parallel(
    model: nn.Module, device: torch.device, *, static_graph: bool = False, bucket_view: bool = True
) -> DistributedDataParallel:
    """Return the model in DDP, as a training runs it; every process keeps batch-norm statistics of its own.

    Args:
        model: on `device`, the same in all processes.
        device: of this process.
        static_graph: DDP may rely on every step using the same parameters in the same order. The first backward pass
            must then exchange gradients: under ``no_sync`` DDP fails.
        bucket_view: gradients lie in the buckets in which they travel, instead of being copied there and back.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # broadcast_buffers has a new name, which torch 2.11 lacks
        return DistributedDataParallel(
            model,
            device_ids=[device] if device.type == "cuda" else None,
            broadcast_buffers=False,  # batch-norm statistics are averaged before every evaluation instead
            gradient_as_bucket_view=bucket_view,
            static_graph=static_graph,
        )


@torch.no_grad()
def average_statistics(model: nn.Module) -> None:
    """Let what a model measures be the mean over all processes: statistics of batch norms, ranges of activations.

    They are its floating-point buffers. Those that are equal in all processes, as constants are, stay so bit for bit.
    """
    of_dtype: dict[torch.dtype, list[torch.Tensor]] = {}
    for buffer in model.buffers():
        if buffer.is_floating_point():
            of_dtype.setdefault(buffer.dtype, []).append(buffer)
    for buffers in of_dtype.values():
        own = torch.cat([buffer.flatten() for buffer in buffers])
        of_first = own.clone()
        dist.broadcast(of_first, src=0)
        difference = own - of_first
        dist.all_reduce(difference)
        means = (of_first + difference / dist.get_world_size()).split([buffer.numel() for buffer in buffers])
        for buffer, mean in zip(buffers, means, strict=True):
            buffer.copy_(mean.view_as(buffer))
