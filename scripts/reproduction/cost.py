"""How long a training takes on the paper's GPUs (2080Ti), at the speed that its table 2 prints.

Models that are not in it take as long as their multiply-adds do at the speed of RepOpt-VGG-B1. That is too short for
small images (a search on CIFAR-100), and far too short for grouped convolutions: those are not guessed.
"""

from __future__ import annotations

from torch import nn

from repopt.models import parse_arch
from reproduction import paper
from reproduction.experiment import multiply_adds, network
from reproduction.run import QAT, TRAIN, ExperimentRun

TRAINING_IMAGES = {"imagenet": 1_281_167, "cf100": 50_000, "caltech256": 257 * 60}
SIZES = {"cf100": 32}  # of images; the others have the configuration's
REFERENCE = "RepOpt-VGG-B1"


def gpu_hours(run: ExperimentRun) -> float | None:
    """Return the hours of a training on one of the paper's GPUs; None where it is not known, or nothing is trained."""
    cfg = run.cfg if run.kind in (TRAIN, QAT) else None
    if cfg is None or cfg.DATA.DATASET not in TRAINING_IMAGES:
        return None
    speed = images_per_second(run.arch, SIZES.get(cfg.DATA.DATASET, cfg.DATA.IMG_SIZE))
    return speed and TRAINING_IMAGES[cfg.DATA.DATASET] * cfg.TRAIN.EPOCHS / speed / 3600


def images_per_second(arch: str, size: int) -> float | None:
    """Return the speed of a training on one of the paper's GPUs, in batches of 32; None where it is not known."""
    model, mode, _ = parse_arch(arch)
    reference, row = arch, paper.in_training(model, mode)
    if not row:
        if any(isinstance(m, nn.Conv2d) and m.groups > 1 for m in network(arch).modules()):
            return None
        reference, row = f"{REFERENCE}-target", paper.in_training(REFERENCE, "target")
    return row["train samples/s/GPU @BS=32"] * multiply_adds(reference) / multiply_adds(arch, size)
