"""What a training run is made of, and how it goes to a checkpoint and comes back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from repopt.checkpoint import load_weights, state_dict_of
from repopt.errors import UserError, one_line, shown
from repopt.reparam import Scales
from train.precision import Precision


@dataclass
class TrainingState:
    """Everything that a run needs to go on where it stopped.

    No generator of random numbers is among it: each batch seeds them all by its place in the training (`Training`).

    Attributes:
        model: not wrapped in DDP.
        scales: that a RepOptimizer's constants came from; kept, so that resuming needs no other file.
        ema: moving average of the weights, or None.
        epoch: epochs done.
        seen: what of the next epoch is done, as its loader says (``Loader.position_after``); empty at its beginning.
        skipped: steps that were left out because something was not finite.
        max_accuracy, max_ema_accuracy: best score so far (top-1 of a classifier), in percent.
        data: fingerprint of the training images; None where it is not known.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: Scheduler
    precision: Precision
    scales: Scales | None = None
    ema: ModelEmaV3 | None = None
    epoch: int = 0
    seen: Sequence[Mapping[str, Any]] = ()
    skipped: int = 0
    max_accuracy: float = 0.0
    max_ema_accuracy: float = 0.0
    data: str | None = None

    def models(self) -> dict[str, nn.Module]:
        """What is evaluated: the model ("val"), and its moving average ("ema") where there is one."""
        return {"val": self.model} if self.ema is None else {"val": self.model, "ema": self.ema.module}

    def buffers(self) -> dict[str, dict[str, Tensor]]:
        """Copies of the statistics of batch norms, by model, on the CPU: within an epoch each process has its own."""
        return {
            key: {name: buffer.detach().cpu().clone() for name, buffer in model.named_buffers()}
            for key, model in self.models().items()
        }

    def content(
        self, config: Mapping[str, Any], buffers: Sequence[Mapping[str, Mapping[str, Tensor]]] = ()
    ) -> dict[str, Any]:
        """A checkpoint with the entries of the published release, and ours.

        Args:
            config: of the run.
            buffers: those of all processes by rank, where they differ.
        """
        content = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "lr_scheduler": self.schedule.state_dict(),
            "max_accuracy": self.max_accuracy,
            "epoch": self.epoch - 1,  # the last one done, as the published release counts
            "config": dict(config),
            "scaler": self.precision.scaler.state_dict(),
            "max_ema_accuracy": self.max_ema_accuracy,
            "skipped": self.skipped,
            "data": self.data,
            "seen": list(self.seen),
            "buffers": list(buffers),
        }
        if self.scales is not None:
            content["scales"] = dict(self.scales)
        if self.ema is not None:
            content["ema"] = self.ema.module.state_dict()
        return content

    def restore(self, content: Mapping[str, Any], *, rank: int = 0, processes: int = 1) -> None:
        """Take over a checkpoint: all of a run, or the weights alone where it holds no optimizer.

        The learning rate is a function of the step, so the state of the schedule is not read. Where the checkpoint was
        made within an epoch by another number of processes, each takes the mean of their batch-norm statistics.

        Raises:
            UserError: it is not one of this model and optimizer.
        """
        load_weights(self.model, state_dict_of(content))
        if self.ema is not None:
            average = content if isinstance(content.get("ema"), Mapping) else {"ema": self.model.state_dict()}
            load_weights(self.ema.module, state_dict_of(average, "ema"))
        if "optimizer" not in content:
            return
        _load_optimizer(self.optimizer, content["optimizer"])
        self.epoch = int(_number(content, "epoch", -1, least=-1, most=2**31)) + 1
        self.skipped = int(_number(content, "skipped", 0, least=0, most=2**62))
        self.max_accuracy = _number(content, "max_accuracy", 0.0, least=0, most=100)
        self.max_ema_accuracy = _number(content, "max_ema_accuracy", 0.0, least=0, most=100)
        self.seen = content.get("seen", ())
        try:
            if content.get("scaler", {}) != {}:
                self.precision.scaler.load_state_dict(dict(content["scaler"]))
            self._load_buffers(content.get("buffers", ()), rank, processes)
        except (TypeError, ValueError, KeyError, RuntimeError, AttributeError) as error:
            raise UserError(f"the checkpoint's record of its training cannot be read: {one_line(error)}") from None

    @torch.no_grad()
    def _load_buffers(self, of_ranks: Sequence[Mapping[str, Mapping[str, Tensor]]], rank: int, processes: int) -> None:
        if not len(of_ranks):
            return
        if len(of_ranks) == processes:
            of_ranks = [of_ranks[rank]]
        for key, model in self.models().items():
            if key == "ema" and not any(key in buffers for buffers in of_ranks):  # it begins here
                continue
            for name, buffer in model.named_buffers():
                values = torch.stack([buffers[key][name] for buffers in of_ranks])
                buffer.copy_(values.mean(0) if values.is_floating_point() else values[0])


def _number(content: Mapping[str, Any], key: str, default: float, *, least: int, most: int) -> float:
    value = content.get(key, default)
    if type(value) not in (int, float) or not least <= value <= most:
        raise UserError(f"the checkpoint's {key} is {shown(value)}, not a number from {least} to {most}")
    return value


def _load_optimizer(optimizer: torch.optim.Optimizer, state: Any) -> None:
    """Take over momenta; the hyper-parameters stay those that this run is configured with.

    torch pairs states with parameters by position and looks at neither names nor shapes, so both are compared first.
    """
    configured = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    try:
        if not isinstance(state, Mapping):
            raise TypeError(f"it is {shown(state)}")
        for own, saved in zip(optimizer.param_groups, state["param_groups"], strict=True):
            if saved.get("param_names", own["param_names"]) != own["param_names"]:
                raise ValueError("its parameters have other names or another order")
            for name, param, index in zip(own["param_names"], own["params"], saved["params"], strict=True):
                for key, value in state["state"].get(index, {}).items():
                    if not _is_state(key, value, param):
                        raise ValueError(f"what it keeps of {name!r} as {shown(key)} is nothing of its shape and kind")
        optimizer.load_state_dict(state)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RuntimeError) as error:
        raise UserError(f"the checkpoint's optimizer is not that of this run: {one_line(error)}") from None
    for group, settings in zip(optimizer.param_groups, configured, strict=True):
        group.update(settings)


def _is_state(key: object, value: object, param: Tensor) -> bool:
    """Whether this may be what an optimizer keeps of a parameter: how many steps it did, or numbers of its shape.

    Adafactor keeps those of rows and columns: the shape has ones then.
    """
    if value is None or (key == "step" and type(value) in (int, float)):
        return True
    if not isinstance(value, Tensor) or not value.is_floating_point() or not torch.isfinite(value).all():
        return False
    if key == "step":
        return value.numel() == 1
    return value.dim() == param.dim() and all(
        size in (1, whole) for size, whole in zip(value.shape, param.shape, strict=True)
    )
