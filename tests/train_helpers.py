"""What tests of trainings share: a trainer, and batches for it."""

from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar
from unittest import mock

import torch
from timm.utils import ModelEmaV3
from torch import nn

import repopt
from train import config
from train.checkpoint import RunFolder
from train.distributed import World
from train.evaluation.classification import evaluate
from train.precision import Precision
from train.schedule import build_schedule
from train.state import TrainingState
from train.trainer import Trainer

CPU = torch.device("cpu")


def network(seed=0, dropout=0.0):
    torch.manual_seed(seed)
    layers = nn.Flatten(), nn.Linear(12, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(dropout), nn.Linear(8, 4)
    return nn.Sequential(*layers).double()


def three_blocks(mode):
    """The beginning of a RepOpt-VGG, with a classifier of 10 classes."""
    torch.manual_seed(0)
    whole = repopt.create_model("RepOpt-VGG-nano", mode=mode, layers=(2, 1, 1, 1), widths=(0.1, 0.1, 0.1, 0.1))
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(whole.stage1[-1].bn.num_features, 10)
    return nn.Sequential(whole.stage0, whole.stage1, *head).double()


class Batches:
    """A loader whose batches depend on the epoch; where it stands in it is the number of batches done."""

    unreadable: ClassVar = {}

    def __init__(self, count=5, size=6, classes=4):
        self.count, self.size, self.classes, self.epoch, self.done = count, size, classes, 0, 0
        self.images_per_batch, self.num_images = size, count * size

    def __len__(self):
        return self.count - self.done

    def set_epoch(self, epoch, seen=()):
        self.epoch, self.done = epoch, sum(seen)

    @property
    def images_seen(self):
        return self.done * self.size

    def position_after(self, batches):
        return [self.done + batches]

    def __iter__(self):
        generator = torch.Generator().manual_seed(self.epoch)
        for batch in range(self.count):
            images = torch.randn(self.size, 3, 2, 2, generator=generator, dtype=torch.float64)
            targets = torch.randint(self.classes, (self.size,), generator=generator)
            if batch >= self.done:
                yield images, targets


def make_state(model, *, average=True):
    optimizer = torch.optim.SGD(model.named_parameters(), lr=0.1, momentum=0.9)
    schedule = build_schedule(optimizer, "cosine", steps_per_epoch=5, epochs=4, warmup_steps=5)
    ema = ModelEmaV3(model, decay=0.8) if average else None
    return TrainingState(model, optimizer, schedule, Precision(CPU), ema=ema)


class Listed(Batches):
    """Batches that are given."""

    def __init__(self, batches):
        super().__init__(len(batches))
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


def trainer(
    state, loader=None, val_loader=None, *, folder=None, criterion=nn.functional.cross_entropy, world=None, **arguments
):
    """A trainer of a classifier; upper-case arguments are configuration keys, __ for their dots."""
    keys = {name.replace("__", "."): arguments.pop(name) for name in list(arguments) if name.isupper()}
    cfg = config.build(
        {"SAVE_EVERY_MINUTES": 0.0, "TRAIN.ACCUMULATION_STEPS": 1, "TRAIN.EMA_UPDATE_PERIOD": 1, **keys}
    ).cfg
    task = SimpleNamespace(
        cfg=cfg,
        world=world or World(0, 1, CPU),
        metric_name="top-1",
        criterion=criterion,
        forward=lambda model, images, targets: model(images),
        evaluate=evaluate,
    )
    return Trainer(
        task, state, loader or Batches(), val_loader or Batches(count=2), RunFolder(folder or Path()), **arguments
    )


class Reports:
    """What a trainer reports."""

    def __init__(self):
        self.steps, self.numbers = [], []

    def write(self, step, images, train):
        self.steps.append(step)
        self.numbers.append(train)


def run_epoch(model, loader, optimizer, /, *, schedule=None, precision=None, reports=None, ema=None, **arguments):
    """Train for an epoch; the mean loss."""
    state = TrainingState(model, optimizer, schedule or mock.Mock(), precision or Precision(CPU), ema=ema)
    training = trainer(state, loader, **arguments)
    training.metrics = reports or Reports()
    return training.train_epoch()
