"""What an evaluation is, whatever the task."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

from torch import nn

from train.precision import Precision


class Result(Protocol):
    """What an evaluation finds, whatever the task; its text is one line for a log."""

    @property
    def score(self) -> float:
        """Return the score by which networks are compared, in percent: more is better."""
        ...

    def numbers(self) -> dict[str, Any]:
        """Return all that was found, by name."""
        ...


class Evaluate(Protocol):
    """Evaluates a network, together with the other processes, on what this process's loader gives."""

    def __call__(
        self, model: nn.Module, loader: Iterable[Any], precision: Precision, *, stops: Callable[[], object] = ...
    ) -> Result | None:
        """Evaluate.

        Args:
            model: not wrapped in DDP; left in eval mode.
            loader: (inputs, targets) on the device; processes may have different numbers of batches.
            precision: of the forward pass.
            stops: asked before every batch whether to give up.

        Returns:
            None where a process has given up.
        """
        ...
