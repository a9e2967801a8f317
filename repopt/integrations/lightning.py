"""Lightning: the clip of its Trainer is that of the multi-branch network."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer

from repopt.errors import UserError
from repopt.integrations.clip import hand_over


class ClipInStep:
    """Has a module's optimizer clip by the trainer's bound: ``class Module(ClipInStep, LightningModule)``.

    Lightning would clip by the norm of the plain gradients, and under 16-mixed refuse to, since a RepOptimizer unscales
    gradients itself. Here the optimizer clips within its step, after that.
    """

    def configure_gradient_clipping(
        self,
        optimizer: Any,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Hand the bound to the optimizer; without one, it keeps its own.

        Raises:
            UserError: the clip is by value, or the optimizer is none that clips.
        """
        if not gradient_clip_val:
            return
        if gradient_clip_algorithm not in (None, "norm"):
            raise UserError(
                f"gradient_clip_algorithm {gradient_clip_algorithm!r} breaks the equivalence: clip by the norm"
            )
        inner = optimizer if isinstance(optimizer, Optimizer) else optimizer.optimizer
        hand_over(gradient_clip_val, inner, "Lightning")
