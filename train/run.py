"""A run: train, evaluate, or measure throughput, as a configuration says."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from yacs.config import CfgNode

import repopt
from repopt import checkpoint
from repopt.errors import UserError
from repopt.models import parse_arch
from train import config, pretrained, run_record, tasks
from train.as_trained import as_trained
from train.build import check_batch_norms, clipping, distribute, plain_form, training_state
from train.checkpoint import RunFolder
from train.command import MAIN, Program
from train.distributed import run_on_main, world
from train.file_names import THROUGHPUT
from train.finetuning import freeze
from train.interruption import Interrupted
from train.keys import CLASSIFY, DETECT
from train.logging import listed, logger, start_log
from train.placement import memory_format_of, precision_of, to_device
from train.resolve import resolve
from train.resume import check_network, check_same_run, find_scales, goes_on, log_images, match_images, read_checkpoint
from train.state import TrainingState
from train.throughput import measure_throughput
from train.trainer import Trainer


def start(settings: config.Settings, argv: Sequence[str], program: Program = MAIN) -> CfgNode | None:
    """Do what the command line `argv` of a program, read as `settings`, says.

    Returns:
        The configuration as it was resolved; None where a signal stopped a training, which is saved then.

    Raises:
        UserError: a mistake of the user's.
        OSError: of the machine: no permission, no space, a path that is none.
    """
    cfg = settings.cfg
    if cfg.QUANT.METHOD:
        raise UserError(f"QUANT.METHOD {cfg.QUANT.METHOD} is for scripts/quantize.py")
    if program.task != cfg.TASK:
        raise UserError(f"TASK {cfg.TASK} is not what {program.name} does: its TASK is {program.task}")
    if cfg.TASK != CLASSIFY:
        settings = settings.with_defaults({"TAG": cfg.TASK})
    job = report_throughput if cfg.THROUGHPUT_MODE else report_evaluation if cfg.EVAL_MODE else train
    return run(settings, argv, program, job)


def run(
    settings: config.Settings,
    argv: Sequence[str],
    program: Program,
    job: Callable[[tasks.Task, RunFolder], bool],
) -> CfgNode | None:
    """Do a job in this process and those that torchrun started beside it; see `start`.

    Args:
        settings: as `argv`, the command line of `program`, was read.
        job: returns whether it came to its end.
    """
    settings = as_trained(settings)
    parse_arch(settings.cfg.MODEL.ARCH)  # a mistake there is told before the processes meet
    with world() as here:
        task = tasks.create(resolve(settings), here)
        folder = set_up(task, f"{program.name} {shlex.join(argv)}")
        return task.cfg if job(task, folder) else None


def set_up(task: tasks.Task, command: str) -> RunFolder:
    """Return the folder of a run, locked if it trains; its log begins, and torch is set as the configuration says."""
    cfg, world = task.cfg, task.world
    Path(cfg.OUTPUT).mkdir(parents=True, exist_ok=True)
    folder = RunFolder(Path(cfg.OUTPUT), command, keep=cfg.SAVE_KEEP)
    trains = not (cfg.EVAL_MODE or cfg.THROUGHPUT_MODE)
    if trains:
        run_on_main(folder.lock)
    if cfg.DETERMINISTIC:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when a GPU is first used
        torch.use_deterministic_algorithms(True)
    # The fastest of its algorithms, found by trying for every shape; a detector's batches have many.
    torch.backends.cudnn.benchmark = not cfg.DETERMINISTIC and cfg.TASK != DETECT
    # The log of a training is of its starts alone.
    start_log(folder.path / f"{'log' if trains else 'eval_log'}_rank{world.rank}.txt", console=world.is_main)
    logger.info(command)
    logger.info(f"torch {torch.__version__}, {world.size} process(es), {world.device.type}")
    torch.manual_seed(cfg.SEED)
    return folder


def report_throughput(task: tasks.Task, folder: RunFolder) -> bool:
    """Print and write the images per second of the network as it is deployed."""
    cfg, world, model = task.cfg, task.world, task.checked_network()
    speed = measure_throughput(
        to_device(repopt.deploy(model), world),
        batch_size=cfg.DATA.BATCH_SIZE,
        image_size=cfg.DATA.TEST_SIZE,
        channels=cfg.MODEL.IN_CHANS,
        precision=precision_of(cfg, world),
        memory_format=memory_format_of(world),
    )
    logger.info(
        f"{cfg.MODEL.ARCH} deployed: {speed:.1f} images/s in batches of {cfg.DATA.BATCH_SIZE}, {cfg.DATA.TEST_SIZE} px"
    )
    if world.is_main:
        found = {"images_per_second": speed, "batch_size": cfg.DATA.BATCH_SIZE, "image_size": cfg.DATA.TEST_SIZE}
        (folder.path / THROUGHPUT).write_text(json.dumps(found) + "\n")
    return True


def report_evaluation(task: tasks.Task, folder: RunFolder) -> bool:
    """Print what an evaluation of a checkpoint finds, and of its moving average where it keeps one."""
    cfg, world, model = task.cfg, task.world, task.checked_network()
    content = checkpoint.read(cfg.MODEL.RESUME)
    check_network(cfg, content, cfg.MODEL.RESUME)
    match_images(task, content, cfg.MODEL.RESUME)
    loader, precision = task.eval_loader(), precision_of(cfg, world)
    model = to_device(model, world)
    for key, label in (("model", "val"), ("ema", "ema")):
        if key == "model" or isinstance(content.get(key), Mapping):
            repopt.load_weights(model, checkpoint.state_dict_of(content, key))
            logger.info(f"{label}: {task.evaluate(model, loader, precision)}")
    return True


def train(task: tasks.Task, folder: RunFolder) -> bool:
    """Train from the beginning, or on from a checkpoint; return whether it came to its end."""
    model = task.checked_network()
    if task.arch.takes_prior:
        prior = task.cfg.MODEL.PRIOR
        logger.info(f"MODEL.PRIOR {prior}: branches for {len(repopt.declare(model, prior))} convolutions")
    content = read_checkpoint(task, folder)
    if goes_on(content):
        check_same_run(task.cfg, content)
    source = (
        pretrained.read(task, task.cfg.MODEL.PRETRAINED) if task.cfg.MODEL.PRETRAINED and content is None else None
    )  # where it begins
    scales = find_scales(task, model, content, source)
    if content is None:
        if task.cfg.MODEL.FREEZE_BN and source is None:
            raise UserError("MODEL.FREEZE_BN keeps the statistics of --pretrained weights, and none are given")
        if scales is not None and task.cfg.TRAIN.CHANGE_INITIALIZATION:
            scales.initialize(identity=task.cfg.TRAIN.IDENTITY_INIT)
        if source is not None:
            pretrained.load(task, model, source)
            if task.arch.mode == "csla" and scales is not None:
                pretrained.check_scales(model, scales, source.path)
            log_images(task, source.content)
    model = to_device(model, task.world)
    check_batch_norms(task, model)
    trainer = prepare(task, model, scales, folder, content)
    del content, source  # as large as the network and its momenta
    return fit(trainer)


def prepare(
    task: tasks.Task,
    model: nn.Module,
    scales: repopt.BoundScales | None,
    folder: RunFolder,
    content: Mapping[str, Any] | None,
    added_loss: Callable[[], Tensor] | None = None,
) -> Trainer:
    """Return what trains a model that is on its device, on from the content of a checkpoint where there is one."""
    cfg, world = task.cfg, task.world
    train_loader, val_loader = task.train_loader(), task.eval_loader()
    if goes_on(content) and content.get("data") not in (None, train_loader.fingerprint):
        raise UserError("cannot resume: the training images of DATA.DATA_PATH are not those that this run began with")
    if content is not None and not goes_on(content):  # weights alone, of which branches are made, so before them
        taken = checkpoint.choose_weights(content, cfg.MODEL.WEIGHTS)
        content = {"model": checkpoint.state_dict_of(content, taken)}
        repopt.load_weights(model, content["model"])
        logger.info(f"begins with {checkpoint.WEIGHTS[taken]} of {cfg.MODEL.RESUME}")
    keep_weights = bool(cfg.MODEL.PRETRAINED) if content is None else not goes_on(content)
    frozen = freeze(model, cfg.TRAIN.FREEZE)
    plain, branches = plain_form(task, model, scales, keep_weights=keep_weights)
    state: TrainingState = training_state(
        task, model, scales, batches=len(train_loader), plain=plain, branches=branches
    )
    state.data, state.notes = train_loader.fingerprint, task.notes()
    if content is not None:
        state.load_state_dict(content, rank=world.rank, processes=world.size)
        logger.info(f"goes on after epoch {state.epoch} of {cfg.TRAIN.EPOCHS}")
    sizes = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "training_images": train_loader.num_images,
        "test_images": val_loader.num_images,
    }
    run_record.write(task, folder, **sizes)
    logger.info(
        f"{cfg.MODEL.ARCH}: {sizes['parameters'] / 1e6:.2f} M parameters, {train_loader.num_images} training and "
        f"{val_loader.num_images} test images"
    )
    if task.classes:
        logger.info(f"{len(task.classes)} classes: {listed(task.classes)}")
    return Trainer(
        task,
        state,
        train_loader,
        val_loader,
        folder,
        model=distribute(task, plain),
        frozen=frozen,
        clip=clipping(task.cfg, model, state.optimizer),
        added_loss=added_loss,
    )


def fit(trainer: Trainer) -> bool:
    """Train; return whether it came to its end, or else a signal stopped it, and it is saved."""
    try:
        trainer.fit()
    except Interrupted as stopped:
        logger.info(stopped)
        return False
    return True
