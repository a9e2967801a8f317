"""What a training run is made of, and how it goes to a checkpoint and comes back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from repopt.checkpoint import load_weights, state_dict_of
from repopt.engine.precision import Precision
from repopt.errors import UserError
from repopt.reparam import Scales


@dataclass
class TrainingState:
    """Everything that a run needs to go on where it stopped.

    Attributes:
        model: not wrapped in DDP.
        scales: that a RepOptimizer's constants came from; kept, so that resuming needs no other file.
        ema: moving average of the weights, or None.
        epoch: epochs done.
        max_accuracy, max_ema_accuracy: best top-1 so far, in percent.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: Scheduler
    precision: Precision
    scales: Scales | None = None
    ema: ModelEmaV3 | None = None
    epoch: int = 0
    max_accuracy: float = 0.0
    max_ema_accuracy: float = 0.0

    def content(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """A checkpoint with the entries of the published release, and ours."""
        content = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "lr_scheduler": self.schedule.state_dict(),
            "max_accuracy": self.max_accuracy,
            "epoch": self.epoch - 1,  # the last one done, as the published release counts
            "config": dict(config),
            "scaler": self.precision.scaler.state_dict(),
            "max_ema_accuracy": self.max_ema_accuracy,
        }
        if self.scales is not None:
            content["scales"] = dict(self.scales)
        if self.ema is not None:
            content["ema"] = self.ema.module.state_dict()
        return content

    def restore(self, content: Mapping[str, Any]) -> None:
        """Take over a checkpoint: all of a run, or the weights alone where it holds no optimizer.

        The learning rate is a function of the step, so the state of the schedule is not read.

        Raises:
            UserError: it is not one of this model and optimizer.
        """
        load_weights(self.model, state_dict_of(content))
        if "optimizer" not in content:
            return
        try:
            self.optimizer.load_state_dict(content["optimizer"])
        except (ValueError, KeyError) as error:
            raise UserError(f"the checkpoint's optimizer is not that of this run: {error}") from None
        self.epoch = int(content["epoch"]) + 1
        self.max_accuracy = float(content.get("max_accuracy", 0.0))
        self.max_ema_accuracy = float(content.get("max_ema_accuracy", 0.0))
        if content.get("scaler"):
            self.precision.scaler.load_state_dict(content["scaler"])
        if self.ema is not None:
            average: Mapping[str, Tensor] = content.get("ema") or content["model"]
            load_weights(self.ema.module, state_dict_of({"model": average}))
