"""A run: train, evaluate, or measure throughput, as a configuration says."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from yacs.config import CfgNode

import repopt
from repopt import checkpoint
from repopt.errors import UserError, shown
from repopt.models import Arch, parse_arch
from train import backbone, config, tasks
from train.build import clipping, distribute, training_state
from train.distributed import World, decided_by_first, world
from train.files import COLUMNS, CONFIG, THROUGHPUT
from train.interruption import Interrupted
from train.logging import logger, start_log
from train.placement import memory_format_of, precision_of, to_device
from train.resolve import resolve
from train.resume import check_same_run, find_checkpoint, find_scales, goes_on
from train.run_folder import RunFolder
from train.throughput import measure_throughput
from train.training import Training

# Keys that make another function of the same weights.
NOT_IN_WEIGHTS = ("MODEL.STRIDES", "DETECT.ANCHOR_SCALE")


def start(settings: config.Settings, argv: Sequence[str], program: config.Program = config.MAIN) -> bool:
    """Do what the command line `argv` of a program, read as `settings`, says; whether it came to its end.

    It does not where a signal stopped a training, which is saved then.

    Raises:
        UserError: a mistake of the user's.
        OSError: of the machine: no permission, no space, a path that is none.
    """
    if settings.cfg.QUANT.METHOD:
        raise UserError(f"QUANT.METHOD {settings.cfg.QUANT.METHOD} is for scripts/quantize.py")
    if program.task != settings.cfg.TASK:
        raise UserError(f"TASK {settings.cfg.TASK} is not what {program.name} does: its TASK is {program.task}")
    if settings.cfg.TASK != config.CLASSIFY and "TAG" not in settings.given:
        settings.cfg.TAG = settings.cfg.TASK
    arch = parse_arch(settings.cfg.MODEL.ARCH)
    with world() as here:
        return run(arch, resolve(arch, settings), here, program.name, argv)


def run(arch: Arch, cfg: CfgNode, world: World, program: str, argv: Sequence[str]) -> bool:
    """Train, or evaluate, or measure throughput, as the command line `argv` says; whether it came to its end."""
    folder = begin(program, cfg, world, argv)
    task = tasks.of(cfg)
    model = task.network(arch, cfg)
    task.check(arch, cfg, model)
    if cfg.THROUGHPUT_MODE:
        report_throughput(cfg, world, model, folder)
    elif cfg.EVAL_MODE:
        report_evaluation(cfg, world, model)
    else:
        return train(arch, cfg, world, model, folder)
    return True


def begin(program: str, cfg: CfgNode, world: World, argv: Sequence[str]) -> RunFolder:
    """The folder of a run, locked if it writes there; its log begins, and torch is set as the configuration says."""
    Path(cfg.OUTPUT).mkdir(parents=True, exist_ok=True)
    folder = RunFolder(Path(cfg.OUTPUT), keep=cfg.SAVE_KEEP)
    if not (cfg.EVAL_MODE or cfg.THROUGHPUT_MODE):
        decided_by_first(folder.lock)
    if cfg.DETERMINISTIC:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when a GPU is first used
        torch.use_deterministic_algorithms(True)
    # The fastest of its algorithms, found by trying for every shape; a detector's batches have many.
    torch.backends.cudnn.benchmark = not cfg.DETERMINISTIC and cfg.TASK != config.DETECT
    start_log(folder.path, world.rank)
    logger.info(f"{program} {shlex.join(argv)}")
    logger.info(f"torch {torch.__version__}, {world.size} process(es), {world.device.type}")
    torch.manual_seed(cfg.SEED)
    return folder


def report_throughput(cfg: CfgNode, world: World, model: nn.Module, folder: RunFolder) -> None:
    """Print and write the images per second of the network as it is deployed."""
    speed = measure_throughput(
        to_device(repopt.deploy(model), world),
        batch_size=cfg.DATA.BATCH_SIZE,
        image_size=cfg.DATA.TEST_SIZE,
        precision=precision_of(cfg, world),
        memory_format=memory_format_of(world),
    )
    logger.info(
        f"{cfg.MODEL.ARCH} deployed: {speed:.1f} images/s in batches of {cfg.DATA.BATCH_SIZE}, {cfg.DATA.TEST_SIZE} px"
    )
    if world.is_main:
        found = {"images_per_second": speed, "batch_size": cfg.DATA.BATCH_SIZE, "image_size": cfg.DATA.TEST_SIZE}
        (folder.path / THROUGHPUT).write_text(json.dumps(found) + "\n")


def report_evaluation(cfg: CfgNode, world: World, model: nn.Module) -> None:
    """Print what an evaluation of a checkpoint finds, and of its moving average where it keeps one."""
    content, task = checkpoint.read(cfg.MODEL.RESUME), tasks.of(cfg)
    for key in NOT_IN_WEIGHTS:
        then, now = (config.lookup(source, key) for source in (content.get("config"), cfg))
        if then not in (None, now):
            raise UserError(f"{cfg.MODEL.RESUME!r} was trained with {key} {shown(then)}, and it is {now} now")
    loader, evaluate = task.eval_loader(cfg, world), task.evaluate(cfg)
    model = to_device(model, world)
    for key, label in (("model", "val"), ("ema", "ema")):
        if key == "model" or isinstance(content.get(key), Mapping):
            repopt.load_weights(model, checkpoint.state_dict_of(content, key))
            logger.info(f"{label}: {evaluate(model, loader, precision_of(cfg, world))}")


def train(arch: Arch, cfg: CfgNode, world: World, model: nn.Module, folder: RunFolder) -> bool:
    """Train from the beginning, or on from a checkpoint; whether it came to its end."""
    resume = decided_by_first(lambda: find_checkpoint(cfg, folder))
    if resume:
        logger.info(f"resumed: {resume}")
    content = checkpoint.read(resume) if resume else None
    if goes_on(content):
        check_same_run(arch, cfg, content)
    scales = find_scales(arch, cfg, model, content)
    if content is None:
        if cfg.MODEL.FREEZE_BN and not cfg.MODEL.BACKBONE:
            raise UserError("MODEL.FREEZE_BN keeps the statistics of a --backbone, and none is given")
        if scales is not None and cfg.TRAIN.CHANGE_INITIALIZATION:
            repopt.initialize(model, scales, identity=cfg.TRAIN.IDENTITY_INIT)
        if cfg.MODEL.BACKBONE:
            backbone.load(arch, cfg, model)
    return fit(arch, cfg, world, to_device(model, world), scales, folder, content)


def keep_settings(cfg: CfgNode, world: World, folder: RunFolder) -> None:
    """Write the configuration to the folder of its run."""
    if world.is_main:
        (folder.path / CONFIG).write_text(json.dumps(config.as_dict(cfg), indent=1) + "\n")


def fit(
    arch: Arch,
    cfg: CfgNode,
    world: World,
    model: nn.Module,
    scales: Mapping[str, Tensor] | None,
    folder: RunFolder,
    content: Mapping[str, Any] | None,
) -> bool:
    """Train a model that is on its device, on from the content of a checkpoint where there is one.

    Returns:
        Whether it came to its end. It does not where a signal stopped it; then it is saved.
    """
    settings, task = config.as_dict(cfg), tasks.of(cfg)
    train_loader, val_loader = task.train_loader(cfg, world), task.eval_loader(cfg, world)
    if goes_on(content) and content.get("data") not in (None, train_loader.fingerprint):
        raise UserError("cannot resume: the training images of DATA.DATA_PATH are not those that this run began with")
    state = training_state(arch, cfg, world, model, scales, batches=len(train_loader))
    state.data = train_loader.fingerprint
    if content is not None:
        state.restore(content, rank=world.rank, processes=world.size)
        logger.info(f"goes on after epoch {state.epoch} of {cfg.TRAIN.EPOCHS}")
    keep_settings(cfg, world, folder)
    logger.info(
        f"{cfg.MODEL.ARCH}: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, "
        f"{train_loader.num_images} training and {val_loader.num_images} test images"
    )
    training = Training(
        state,
        distribute(task, cfg, world, model),
        train_loader,
        val_loader,
        task.criterion(cfg),
        forward=task.forward,
        evaluate=task.evaluate(cfg),
        measure=COLUMNS[cfg.TASK][0].title,
        epochs=cfg.TRAIN.EPOCHS,
        folder=folder,
        config=settings,
        world=world,
        seed=cfg.SEED,
        searching=arch.mode == "hs" and not cfg.QUANT.METHOD,
        clip=clipping(arch, cfg, model, scales),
        accumulation_steps=cfg.TRAIN.ACCUMULATION_STEPS,
        ema_update_period=cfg.TRAIN.EMA_UPDATE_PERIOD,
        eval_period=cfg.TEST.PERIOD,
        save_period=cfg.SAVE_FREQ,
        save_latest_period=cfg.SAVE_LATEST_FREQ,
        save_every_minutes=cfg.SAVE_EVERY_MINUTES,
        save_every_steps=cfg.SAVE_EVERY_STEPS,
        most_skipped=cfg.TRAIN.MOST_SKIPPED_STEPS,
        print_period=cfg.PRINT_FREQ,
    )
    try:
        training.run()
    except Interrupted as stopped:
        logger.info(stopped)
        return False
    return True
