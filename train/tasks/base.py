"""What a task is."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Set
from functools import cached_property
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn
from yacs.config import CfgNode

import data
from repopt.description import InOut, NetworkDescription
from repopt.detection import EndToEnd
from repopt.errors import UserError
from repopt.images import Preprocessing
from repopt.models import parse_arch
from train import config
from train.distributed import World
from train.evaluation.base import Evaluate
from train.file_names import COLUMNS
from train.keys import KEYS
from train.placement import memory_format_of


class Task(ABC):
    """What differs from one task to another, bound to a configuration and to this process.

    Args:
        cfg: resolved; or as it is, where no images are read.
        world: this process among those of the run.

    Attributes:
        cfg, world: as given.
        arch: of the network, or of its backbone.
        backbone_path: the module that is the backbone; "" where the network is a classifier.
        multiple: of which height and width of an image have to be.
    """

    backbone_path: ClassVar[str] = ""
    multiple: ClassVar[int] = 1

    def __init__(self, cfg: CfgNode, world: World) -> None:
        self.cfg, self.world = cfg, world
        self.arch = parse_arch(cfg.MODEL.ARCH)

    @classmethod
    @abstractmethod
    def finalize(cls, cfg: CfgNode, given: Set[str]) -> dict[str, Any]:
        """Return keys that follow from the data set, with their values.

        Args:
            cfg: read, not changed.
            given: the keys that a user set.

        Raises:
            UserError: a key contradicts the data set or another one.
        """

    @property
    def metric_name(self) -> str:
        """Return the name of the score by which networks are compared."""
        return COLUMNS[self.cfg.TASK][0].title

    @abstractmethod
    def arguments(self) -> dict[str, Any]:
        """Return the arguments of the network's maker (`NetworkDescription`), but those of the backbone."""

    def description(self, mode: str | None = None) -> NetworkDescription:
        """Return of what the network is made, in its mode or another one."""
        arguments = self.arguments() | self.of_backbone()
        return NetworkDescription(self.cfg.TASK, self.arch.model, mode or self.arch.mode, arguments)

    def network(self, mode: str | None = None) -> nn.Module:
        """Return the network that the configuration describes, freshly initialized, in its mode or another one."""
        return self.description(mode).create()

    def notes(self) -> dict[str, Any]:
        """Return what a checkpoint says of the network for whoever loads it, as plain data."""
        _, classes, images = self.in_out()
        found: dict[str, Any] = {"classes": list(classes), "images": images.as_data()}
        return found if self.cfg.QUANT.METHOD else found | {"network": self.description().as_data()}

    def in_out(self) -> InOut:
        """Return what the network takes and gives."""
        return InOut(self.cfg.TASK, self.classes, self.images(training=False).preprocessing)

    def checked_network(self) -> nn.Module:
        """Return a fresh network, which takes the images.

        Raises:
            UserError: it does not.
        """
        model = self.network()
        self.check(model)
        return model

    def check(self, model: nn.Module) -> None:  # noqa: B027 (most take them all)
        """Raise a UserError where a fresh network does not take the images."""

    @abstractmethod
    def images(self, *, training: bool, subset: bool = False) -> data.ImageSet:
        """Return the data set, for training or evaluation; `subset`: a few of its images are read, and once."""

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes, by index; empty where the data set has none."""
        return self.images(training=False).class_names

    def train_loader(self) -> data.Loader:
        """Return the augmented training batches of this process."""
        images = self.images(training=True)
        return data.train_loader(images, batch_size=self.cfg.DATA.BATCH_SIZE, seed=self.cfg.SEED, **self.loading())

    def eval_loader(self, **subset: Any) -> data.Loader:
        """Return the evaluation batches of this process; `subset`: images other than those of the split "val"."""
        images = self.images(training=False, subset=bool(subset))
        return data.eval_loader(images, batch_size=self.cfg.DATA.TEST_BATCH_SIZE, **subset, **self.loading())

    def calibration_loader(self) -> data.Loader:
        """Return training images as in evaluation, the same in every process."""
        alone = type(self)(self.cfg, World(0, 1, self.world.device))
        return alone.eval_loader(split="train", max_images=self.cfg.QUANT.CALIBRATION_IMAGES, seed=self.cfg.SEED)

    def first_training_images(self) -> Iterator[Any]:
        """Yield the first training images in batches, the same in every process: QUANT.CALIBRATION_IMAGES, or all."""
        loader = type(self)(self.cfg, World(0, 1, self.world.device)).train_loader()
        batches = max(1, self.cfg.QUANT.CALIBRATION_IMAGES // self.cfg.DATA.BATCH_SIZE)
        yield from (images for images, _ in itertools.islice(loader, batches))

    @abstractmethod
    def example(self) -> tuple[Any, Any]:
        """Return a small training batch of no content, on this process's device."""

    @cached_property
    @abstractmethod
    def criterion(self) -> Callable[[Any, Any], Tensor]:
        """Return what gives the mean loss of a training batch, from what `forward` gives and the targets."""

    def forward(self, model: nn.Module, images: Any, targets: Any) -> Any:
        """Call the network in training."""
        return model(images)

    @abstractmethod
    def training_size(self) -> tuple[int, int]:
        """Return height and width of what a predictor sees in training."""

    @abstractmethod
    def image_size(self) -> tuple[int, int]:
        """Return height and width at which a network is exported."""

    def predictor(self, model: nn.Module) -> nn.Module:
        """Return what is quantized and exported of a network, (N, C, H, W) -> its outputs; it shares its modules."""
        return model

    def with_predictor(self, model: nn.Module, predictor: nn.Module) -> nn.Module:
        """Return a network as `model` is, whose predictor is another form of its own, at `image_size`."""
        return predictor

    def end_to_end(self, model: nn.Module, predictor: nn.Module, size: tuple[int, int]) -> EndToEnd | None:
        """Return what gives the network's answers as tensors, at a size; None where there is nothing of the kind."""
        return None

    def with_end_to_end(self, network: nn.Module) -> nn.Module:
        """Return what is called as a network is in eval mode, and answers as a form of `end_to_end` does."""
        return network

    def exported_images(self, images: Preprocessing) -> Preprocessing:
        """Return how the images are made that a predictor takes, where the network takes `images`."""
        return images

    def divergence(self, outputs: Any, expected: Any) -> Tensor:
        """Return how far outputs of a predictor are from those of another one, in training."""
        found = F.kl_div(outputs.log_softmax(1), expected.log_softmax(1), reduction="none", log_target=True)
        return found.sum(1).mean()

    def network_input(self, images: Any) -> Any:
        """Return what the network sees at once of a batch of evaluation."""
        return images

    @cached_property
    @abstractmethod
    def evaluate(self) -> Evaluate:
        """Return what evaluates a network."""

    def of_backbone(self) -> dict[str, Any]:
        """Return arguments of the backbone that are not its defaults, which other libraries' networks may not take."""
        return {
            key.backbone_argument: value
            for name, key in KEYS.items()
            if key.backbone_argument and (value := config.lookup(self.cfg, name)) != key.default
        }

    def loading(self) -> dict[str, Any]:
        """Return what all loaders have in common."""
        return {
            "device": self.world.device,
            "rank": self.world.rank,
            "world_size": self.world.size,
            "num_workers": self.cfg.DATA.NUM_WORKERS,
            "pin_memory": self.cfg.DATA.PIN_MEMORY,
            "memory_format": memory_format_of(self.world),
        }


def source_of(cfg: CfgNode, **of_task: Any) -> data.Source:
    """Return where the images of a configuration come from."""
    return data.Source(
        cfg.DATA.DATASET,
        cfg.DATA.DATA_PATH,
        on_bad_image=cfg.DATA.ON_BAD_IMAGE,
        classes=tuple(cfg.DATA.CLASSES or ()),
        channels=cfg.MODEL.IN_CHANS,
        mean=cfg.DATA.MEAN,
        std=cfg.DATA.STD,
        **of_task,
    )


def agreed(cfg: CfgNode, given: Set[str], key: str, value: int) -> dict[str, int]:
    """Return what the data set says of a key.

    Raises:
        UserError: a user said otherwise.
    """
    if key in given and config.lookup(cfg, key) != value:
        raise UserError(f"{key} is {config.lookup(cfg, key)}, but the data set's is {value}")
    return {key: value}
