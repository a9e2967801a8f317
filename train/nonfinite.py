"""Steps whose loss or gradients are not finite are skipped, without ever waiting for the device to know.

The decision is made on the device. A loss that is not finite makes all gradients of its process NaN, the mean of
gradients over processes brings that to all of them, and so they decide alike without another message. The optimizer is
told as torch's GradScaler tells it, by a tensor `found_inf`. The buffers (statistics of batch norms), which the forward
pass has changed already, are put back.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from repopt.optim.update import step_unless


class NonFiniteGuard:
    """Does the steps of an optimizer, and skips those that would spoil the weights.

    An optimizer that does not know `found_inf` (torch's without ``fused=True``) is asked to step or not by the host,
    which on a GPU waits for the answer.

    Args:
        model: whose buffers are put back.
        optimizer: of its parameters.
        device: of both.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
        self._optimizer = optimizer
        self._counts = torch.zeros(2, dtype=torch.int64, device=device)  # in all, and in a row
        of_dtype: dict[torch.dtype, list[Tensor]] = {}
        for buffer in model.buffers():
            of_dtype.setdefault(buffer.dtype, []).append(buffer)
        self._buffers = [_BufferSnapshot(buffers) for buffers in of_dtype.values()]

    def snapshot_buffers(self) -> None:
        """Begin from what the buffers are now: they are changed between epochs, where processes average them."""
        for buffers in self._buffers:
            buffers.commit_or_restore(torch.zeros_like(self._counts[0], dtype=torch.bool))

    @staticmethod
    def nan_if_not_finite(loss: Tensor) -> Tensor:
        """Return the same loss, whose gradients are NaN unless it is finite."""
        return loss * torch.where(torch.isfinite(loss.detach()), 1.0, math.nan)

    @torch.no_grad()
    def step(self, norm: Tensor | None) -> None:
        """Step the optimizer if the gradients are finite; `norm` is theirs, where it is known."""
        if norm is None:
            gradients = [param.grad for param in self._parameters() if param.grad is not None]
            norm = nn.utils.get_total_norm(gradients, math.inf)
        bad = ~torch.isfinite(norm)
        step_unless(self._optimizer, bad.float())
        for buffers in self._buffers:
            buffers.commit_or_restore(bad)
        self._counts += bad
        self._counts[1] *= bad

    @torch.no_grad()
    def weights_are_finite(self) -> bool:
        """Return whether the steps done have led to weights that are numbers; waits for the device."""
        return bool(torch.isfinite(nn.utils.get_total_norm(self._parameters(), math.inf)))

    def _parameters(self) -> list[Tensor]:
        return [param for group in self._optimizer.param_groups for param in group["params"]]

    def skipped(self) -> tuple[int, int]:
        """Return the steps skipped, in all and at last in a row; waits for the device."""
        total, in_a_row = self._counts.tolist()
        return total, in_a_row


class _BufferSnapshot:
    """Buffers of one dtype, and one tensor of what they were after the last good step."""

    def __init__(self, buffers: list[Tensor]) -> None:
        self._buffers = buffers
        self._kept = self._flat()
        parts = self._kept.split([buffer.numel() for buffer in buffers])
        self._parts = [part.view_as(buffer) for part, buffer in zip(parts, buffers, strict=True)]

    def _flat(self) -> Tensor:
        """Return a copy of the buffers, one after the other: not all of them can be viewed flat."""
        return torch.cat([buffer.flatten() for buffer in self._buffers])

    def commit_or_restore(self, bad: Tensor) -> None:
        """Keep what the buffers are, or give them back what they were."""
        torch.where(bad, self._kept, self._flat(), out=self._kept)
        torch._foreach_copy_(self._buffers, self._parts)
