"""The bound of a framework's clip becomes that of the optimizer."""

from __future__ import annotations

from typing import Any

from repopt.errors import UserError


def hand_over(max_norm: float, optimizer: Any, framework: str) -> None:
    """Have an optimizer clip to a bound within its step.

    Raises:
        UserError: it is none that does.
    """
    if not hasattr(optimizer, "max_norm"):
        raise UserError(f"{type(optimizer).__name__} does not clip within its step: set {framework}'s own clip for it")
    optimizer.max_norm = max_norm
