"""In which number format a forward pass runs."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch


@dataclass
class Precision:
    """fp32, or native autocast to bf16 or fp16; fp16 scales its losses so that small gradients survive.

    Attributes:
        device: where the model runs.
        dtype: of autocast; None = fp32.
        scaler: of the loss; it passes everything through unless dtype is fp16.
    """

    device: torch.device
    dtype: torch.dtype | None = None
    scaler: torch.amp.GradScaler = field(init=False)

    def __post_init__(self) -> None:
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype is torch.float16)

    def autocast(self) -> AbstractContextManager[object]:
        """Around every forward pass."""
        return nullcontext() if self.dtype is None else torch.autocast(self.device.type, self.dtype)
