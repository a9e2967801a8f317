"""A model under torch.compile, for its training."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn

from repopt.errors import UserError, one_line

COMPILE_MODES = ("default", "reduce-overhead", "max-autotune")


def compiled(model: nn.Module, device: torch.device, mode: str = "default") -> nn.Module:
    """Return the model as torch.compile makes it; it shares everything with `model`, which stays as it is.

    Compiling happens at the first batch, whose shape all batches have to have.

    Args:
        model: on `device`.
        device: a GPU or the CPU.
        mode: of torch.compile; "reduce-overhead" and "max-autotune" launch CUDA graphs, under which gradients cannot
            be accumulated over batches.

    Raises:
        UserError: torch.compile does not work here (it needs a C++ compiler on CPUs, triton on GPUs).
    """
    try:
        torch.compile(torch.neg)(torch.ones(8, device=device))
    except Exception as error:  # whatever a missing or broken compiler makes of it
        raise UserError(f"torch.compile does not work here: {one_line(error)}") from error
    return cast(nn.Module, torch.compile(model, mode=mode, dynamic=False))
