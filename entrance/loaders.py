"""Loaders of images as a configuration describes them."""

from __future__ import annotations

import dataclasses
from typing import Any

from yacs.config import CfgNode

import data
from entrance.placement import memory_format_of
from repopt.distributed import World


def source_of(cfg: CfgNode) -> data.Source:
    """Where the images come from."""
    return data.Source(
        cfg.DATA.DATASET, cfg.DATA.DATA_PATH, cfg.DATA.ZIP_MODE, cfg.DATA.CACHE_MODE, cfg.DATA.ON_BAD_IMAGE
    )


def training_loader(cfg: CfgNode, world: World, augmentation: data.Augmentation) -> data.Loader:
    """Augmented training batches of this process."""
    return data.train_loader(
        source_of(cfg),
        augmentation,
        image_size=cfg.DATA.IMG_SIZE,
        batch_size=cfg.DATA.BATCH_SIZE,
        label_smoothing=cfg.MODEL.LABEL_SMOOTHING,
        seed=cfg.SEED,
        rank=world.rank,
        world_size=world.size,
        **_loading(cfg, world),
    )


def eval_loader(cfg: CfgNode, world: World) -> data.Loader:
    """Evaluation batches of this process."""
    return data.eval_loader(source_of(cfg), rank=world.rank, world_size=world.size, **_evaluating(cfg, world))


def calibration_loader(cfg: CfgNode, world: World) -> data.Loader:
    """Training images as in evaluation, the same in every process."""
    source = dataclasses.replace(source_of(cfg), cache_mode="no")  # these few are read but once
    return data.eval_loader(
        source, split="train", most=cfg.QUANT.CALIBRATION_IMAGES, seed=cfg.SEED, **_evaluating(cfg, world)
    )


def _evaluating(cfg: CfgNode, world: World) -> dict[str, Any]:
    return {
        "image_size": cfg.DATA.TEST_SIZE,
        "batch_size": cfg.DATA.TEST_BATCH_SIZE,
        "crop": cfg.TEST.CROP,
        **_loading(cfg, world),
    }


def _loading(cfg: CfgNode, world: World) -> dict[str, Any]:
    """What all loaders have in common."""
    return {
        "interpolation": cfg.DATA.INTERPOLATION,
        "num_classes": cfg.MODEL.NUM_CLASSES,
        "device": world.device,
        "num_workers": cfg.DATA.NUM_WORKERS,
        "pin_memory": cfg.DATA.PIN_MEMORY,
        "memory_format": memory_format_of(world),
    }
