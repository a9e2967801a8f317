"""What a task is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from yacs.config import CfgNode

import data
from repopt.errors import UserError
from repopt.models import Arch
from train import config
from train.distributed import World
from train.evaluation.base import Evaluate
from train.placement import memory_format_of

OF_BACKBONE = {
    "strides": "MODEL.STRIDES",
    "initial_scales": "MODEL.INITIAL_SCALES",
    "use_checkpoint": "TRAIN.USE_CHECKPOINT",
}


class Task(ABC):
    """What differs from one task to another.

    Attributes:
        body: the module that is the backbone; "" where the network is a classifier.
        multiple: of which height and width of an image have to be.
    """

    body: ClassVar[str] = ""
    multiple: ClassVar[int] = 1

    @abstractmethod
    def settle(self, cfg: CfgNode, given: set[str]) -> None:
        """Fill in what follows from the data set, and refuse what contradicts it; `given` are the keys a user set."""

    @abstractmethod
    def network(self, arch: Arch, cfg: CfgNode) -> nn.Module:
        """The network that an architecture and the configuration describe, freshly initialized."""

    def check(self, arch: Arch, cfg: CfgNode, model: nn.Module) -> None:  # noqa: B027 (most take them all)
        """UserError where a fresh network does not take the images."""

    @abstractmethod
    def train_loader(self, cfg: CfgNode, world: World) -> data.Loader:
        """Augmented training batches of this process."""

    @abstractmethod
    def eval_loader(self, cfg: CfgNode, world: World, **chosen: Any) -> data.Loader:
        """Evaluation batches of this process; `chosen`: images other than those of the split "val"."""

    def calibration_loader(self, cfg: CfgNode, world: World) -> data.Loader:
        """Training images as in evaluation, the same in every process."""
        return self.eval_loader(
            cfg, World(0, 1, world.device), split="train", most=cfg.QUANT.CALIBRATION_IMAGES, seed=cfg.SEED
        )

    @abstractmethod
    def example(self, cfg: CfgNode, device: torch.device) -> tuple[Any, Any]:
        """A small training batch of no content."""

    @abstractmethod
    def criterion(self, cfg: CfgNode) -> Callable[[Any, Any], Tensor]:
        """The mean loss of a training batch, from what `forward` gives and the targets."""

    def forward(self, model: nn.Module, images: Any, targets: Any) -> Any:
        """Call the network in training."""
        return model(images)

    def image_size(self, cfg: CfgNode) -> tuple[int, int]:
        """Height and width at which a network is exported; UserError where it has none."""
        raise UserError(f"a network of TASK {cfg.TASK} takes images of any size, and cannot be exported for one")

    def seen(self, cfg: CfgNode, images: Any) -> Any:
        """What the network sees at once of a batch of evaluation."""
        return images

    @abstractmethod
    def evaluate(self, cfg: CfgNode) -> Evaluate:
        """What evaluates a network."""


def source_of(cfg: CfgNode, **zipped: Any) -> data.Source:
    """Where the images come from."""
    return data.Source(cfg.DATA.DATASET, cfg.DATA.DATA_PATH, on_bad_image=cfg.DATA.ON_BAD_IMAGE, **zipped)


def of_backbone(cfg: CfgNode) -> dict[str, Any]:
    """Arguments of the backbone that are not its defaults, which other libraries' networks may not take."""
    return {
        name: value
        for name, key in OF_BACKBONE.items()
        if (value := config.lookup(cfg, key)) != config.KEYS[key].default
    }


def fill_in(cfg: CfgNode, given: set[str], key: str, value: int) -> None:
    """Set a key to what the data set says; UserError where a user said otherwise."""
    section, name = key.split(".")
    if key in given and cfg[section][name] != value:
        raise UserError(f"{key} is {cfg[section][name]}, but the data set's is {value}")
    cfg[section][name] = value


def loading(cfg: CfgNode, world: World) -> dict[str, Any]:
    """What all loaders have in common."""
    return {
        "device": world.device,
        "rank": world.rank,
        "world_size": world.size,
        "num_workers": cfg.DATA.NUM_WORKERS,
        "pin_memory": cfg.DATA.PIN_MEMORY,
        "memory_format": memory_format_of(world),
    }
