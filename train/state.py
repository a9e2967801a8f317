"""What a training run is made of, and how it goes to a checkpoint and comes back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.distributed.checkpoint.stateful import Stateful

from repopt.branches import held_state
from repopt.checkpoint import load_weights, state_dict_of
from repopt.errors import UserError, one_line, shown
from repopt.optim import BranchOptimizer
from repopt.scales import bind
from train.precision import Precision


@dataclass
class TrainingState:
    """Everything that a run needs to go on where it stopped.

    No generator of random numbers is among it: each batch seeds them all by its place in the training.

    Attributes:
        model: not wrapped in DDP.
        scales: that a RepOptimizer's constants came from; kept, so that resuming needs no other file.
        ema: moving average of the weights, or None.
        epoch: epochs done.
        seen: what of the next epoch is done, as its loader says (``Loader.position_after``); empty at its beginning.
        skipped: steps that were skipped because something was not finite.
        max_accuracy, max_ema_accuracy: best score so far (top-1 of a classifier), in percent.
        data: fingerprint of the training images; None where it is not known.
        notes: what a checkpoint says of the network for whoever loads it, as plain data: its "classes" (names by index,
            none where they have none), what it is made of ("network"), and how its "images" are made.
        searched: the scales of a search at the end of the last epoch; empty without, or in the first epoch.
        settled: whether they have settled then.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: Scheduler
    precision: Precision
    scales: Mapping[str, Tensor] | None = None
    ema: ModelEmaV3 | None = None
    epoch: int = 0
    seen: Sequence[Mapping[str, Any]] = ()
    skipped: int = 0
    max_accuracy: float = 0.0
    max_ema_accuracy: float = 0.0
    data: str | None = None
    notes: Mapping[str, Any] = field(default_factory=dict)
    searched: Mapping[str, Tensor] = field(default_factory=dict)
    settled: bool = False

    def models(self) -> dict[str, nn.Module]:
        """Return what is evaluated: the model ("val"), and its moving average ("ema") where there is one."""
        return {"val": self.model} if self.ema is None else {"val": self.model, "ema": self.ema.module}

    def buffers(self) -> dict[str, dict[str, Tensor]]:
        """Return copies of the batch-norm statistics on the CPU, by model: within an epoch each process has its own."""
        return {
            key: {name: buffer.detach().cpu().clone() for name, buffer in model.named_buffers()}
            for key, model in self.models().items()
        }

    def parts(self) -> dict[str, Stateful]:
        """Return what saves and loads its own state, by its entry in a checkpoint."""
        parts: dict[str, Stateful] = {
            "model": _Weights(self.model),
            "optimizer": _OptimizerState(self.optimizer, self.model),
            "scaler": self.precision.scaler,
        }
        if self.ema is not None:
            parts["ema"] = _Weights(self.ema.module)
        return parts

    def state_dict(self) -> dict[str, Any]:
        """Return the entries of the published release's checkpoints, and ours; tensors are not copied."""
        content = {key: part.state_dict() for key, part in self.parts().items()} | {
            **self.notes,
            "lr_scheduler": self.schedule.state_dict(),  # for others: the learning rate is a function of the step
            "epoch": self.epoch - 1,  # the last one done, as the published release counts
            "max_accuracy": self.max_accuracy,
            "max_ema_accuracy": self.max_ema_accuracy,
            "skipped": self.skipped,
            "data": self.data,
            "seen": list(self.seen),
        }
        if self.searched:
            content["search"] = {"scales": dict(self.searched), "settled": self.settled}
        return content if self.scales is None else content | {"scales": dict(self.scales)}

    def load_state_dict(self, content: Mapping[str, Any], *, rank: int = 0, processes: int = 1) -> None:
        """Take over a checkpoint: all of a run, or the weights alone where it holds no optimizer.

        Args:
            content: of `state_dict`, and under "buffers" what `buffers` gave in every process, by rank; where it was
                made within an epoch by another number of processes, each takes the mean of their statistics.
            rank, processes: of this run.

        Raises:
            UserError: it is not one of this model and optimizer.
        """
        parts, weights = self.parts(), state_dict_of(content)
        parts.pop("model").load_state_dict(weights)
        if average := parts.pop("ema", None):
            average.load_state_dict(
                state_dict_of(content, "ema") if isinstance(content.get("ema"), Mapping) else weights
            )
        if "optimizer" not in content:
            return
        parts.pop("optimizer").load_state_dict(content["optimizer"])
        self.epoch = int(_number(content, "epoch", -1, minimum=-1, maximum=2**31)) + 1
        self.skipped = int(_number(content, "skipped", 0, minimum=0, maximum=2**62))
        self.max_accuracy = _number(content, "max_accuracy", 0.0, minimum=0, maximum=100)
        self.max_ema_accuracy = _number(content, "max_ema_accuracy", 0.0, minimum=0, maximum=100)
        self.seen = content.get("seen", ())
        if isinstance(search := content.get("search"), Mapping):
            self.searched = bind(self.model, state_dict_of(search, "scales")).scales
            self.settled = search.get("settled") is True
        try:
            if content.get("scaler", {}) != {}:
                parts["scaler"].load_state_dict(dict(content["scaler"]))
            self._load_buffers(content.get("buffers", ()), rank, processes)
        except (TypeError, ValueError, KeyError, RuntimeError, AttributeError) as error:
            raise UserError(f"the checkpoint's record of its training cannot be read: {one_line(error)}") from None

    def new_bests(self, scores: Mapping[str, float]) -> list[str]:
        """Remember scores, by the keys of `models`, that are the best so far; return names of checkpoints for them."""
        names = []
        if scores["val"] > self.max_accuracy:
            self.max_accuracy = scores["val"]
            names.append("best_ckpt.pth")
        if "ema" in scores and scores["ema"] > self.max_ema_accuracy:
            self.max_ema_accuracy = scores["ema"]
            names.append("best_ema_ckpt.pth")
        return names

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


def count_steps(batches: int, accumulation_steps: int) -> int:
    """Return the optimizer steps of an epoch; the last one takes what is left."""
    return -(-batches // accumulation_steps)


class _Weights:
    """A model whose state dict has to fit in every name and shape."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def state_dict(self) -> dict[str, Any]:
        return self._model.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        load_weights(self._model, state_dict)


class _OptimizerState:
    """Momenta of an optimizer; its hyper-parameters stay those that this run is configured with.

    torch pairs states with parameters by position and looks at neither names nor shapes, so both are compared first.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
        self._optimizer, self._model = optimizer, model

    def state_dict(self) -> dict[str, Any]:
        return self._optimizer.state_dict()

    def load_state_dict(self, state_dict: Any) -> None:
        groups = self._optimizer.param_groups
        branches = self._optimizer.branches if isinstance(self._optimizer, BranchOptimizer) else {}
        configured = [{k: v for k, v in group.items() if k != "params"} for group in groups]
        try:
            if not isinstance(state_dict, Mapping):
                raise TypeError(f"it is {shown(state_dict)}")
            if isinstance(self._optimizer, BranchOptimizer) and _sizes(state_dict["param_groups"]) != _sizes(groups):
                state_dict = held_state(self._optimizer, self._model, state_dict)  # of the network with branches
            for own, saved in zip(groups, state_dict["param_groups"], strict=True):
                if saved.get("param_names", own["param_names"]) != own["param_names"]:
                    raise ValueError("its parameters have other names or another order")
                for name, param, index in zip(own["param_names"], own["params"], saved["params"], strict=True):
                    held = branches.get(name)
                    for key, value in state_dict["state"].get(index, {}).items():
                        of, entry = (param, key) if held is None else held.find(key)
                        if of is None or not _is_state(entry, value, of):
                            raise ValueError(
                                f"what it keeps of {name!r} as {shown(key)} is nothing of its shape and kind"
                            )
            self._optimizer.load_state_dict(dict(state_dict))
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RuntimeError) as error:
            raise UserError(f"the checkpoint's optimizer is not that of this run: {one_line(error)}") from None
        for group, settings in zip(self._optimizer.param_groups, configured, strict=True):
            group.update(settings)


def _number(content: Mapping[str, Any], key: str, default: float, *, minimum: int, maximum: int) -> float:
    value = content.get(key, default)
    if type(value) not in (int, float) or not minimum <= value <= maximum:
        raise UserError(f"the checkpoint's {key} is {shown(value)}, not a number from {minimum} to {maximum}")
    return value


def _sizes(groups: Sequence[Mapping[str, Any]]) -> list[int]:
    return [len(group["params"]) for group in groups]


def _is_state(key: object, value: object, param: Tensor) -> bool:
    """Return whether an optimizer may keep this of a parameter: how many steps it did, or numbers of its shape.

    Adafactor keeps those of rows and columns: the shape has ones then.
    """
    if value is None or type(value) is bool or (key == "step" and type(value) in (int, float)):
        return True
    if not isinstance(value, Tensor) or not value.is_floating_point() or not torch.isfinite(value).all():
        return False
    if key == "step":
        return value.numel() == 1
    return value.dim() == param.dim() and all(
        size in (1, whole) for size, whole in zip(value.shape, param.shape, strict=True)
    )
