"""What trains a model: optimizer, schedule and moving average, clipping, and the wrapping of several processes."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping

import torch
from timm.layers import convert_sync_batchnorm
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from yacs.config import CfgNode

import repopt
from data import seeding
from repopt import BoundScales
from repopt.branches import hold_branches, share_branches
from repopt.errors import UserError
from repopt.optim import HeldBranches
from repopt.reparam import needs_branches
from train import compilation
from train.distributed import World
from train.finetuning import learning_rate_factors
from train.keys import CLASSIFY
from train.logging import logger
from train.parallel import data_parallel
from train.placement import precision_of, to_device
from train.schedule import build_schedule
from train.state import TrainingState, count_steps
from train.tasks import Task

ONE_VALUE = "Expected more than 1 value per channel"  # torch, where a batch norm that trains meets one
MAX_GRAPH_PIXELS = 2**19  # of a batch that is small: 128 images of 64 x 64


def check_batch_norms(task: Task, model: nn.Module) -> None:
    """Refuse batches of one image in which a batch norm of a model would meet one value per channel.

    Args:
        task: of the training.
        model: on the task's device; it stays as it is.

    Raises:
        UserError: it would.
    """
    cfg, world = task.cfg, task.world
    if cfg.DATA.BATCH_SIZE * (world.size if cfg.TRAIN.SYNC_BN else 1) > 1:
        return
    images, targets = task.example()
    try:
        with torch.no_grad(), seeding.preserved():
            task.forward(copy.deepcopy(model).train(), images[:1], targets[:1])
    except ValueError as error:
        if ONE_VALUE not in str(error):
            raise
        raise UserError(
            "a batch norm would see one value per channel, which has no variance: train on batches of 2 at least "
            "(--batch-size), on larger images, or with TRAIN.SYNC_BN in several processes"
        ) from None


def plain_form(
    task: Task, model: nn.Module, scales: BoundScales | None, *, keep_weights: bool
) -> tuple[nn.Module, dict[str, HeldBranches] | None]:
    """Return the network that computes in a training, and the branches that the optimizer holds for it.

    A hyper-search computes with the plain network, which shares everything else with `model`: what a checkpoint holds
    is the network with branches. A target holds branches while its scales are searched, and longer under rules whose
    state does not merge with the kernels, or where no constants follow a block; they begin with new kernels, or
    with `keep_weights` so that the model's stay.
    """
    cfg = task.cfg
    if cfg.QUANT.METHOD:
        return model, None
    if task.arch.mode == "hs":
        plain = to_device(task.network("target"), task.world)
        return plain, share_branches(model, plain)
    rule = cfg.TRAIN.OPTIMIZER.NAME
    if not task.arch.repopt or not cfg.TRAIN.CHANGE_GRADIENTS:
        return model, None
    held = needs_branches(rule, model)
    searched = cfg.TRAIN.SEARCH_EPOCHS and (scales is None or rule != "sgd")
    if searched or (scales and held):
        if not cfg.TRAIN.CHANGE_INITIALIZATION:
            raise UserError(f"optimizer {rule!r} holds branches, which make the initial kernels: leave that switch out")
        return model, hold_branches(model, scales, identity=cfg.TRAIN.IDENTITY_INIT, keep_weights=keep_weights)
    return model, None


def training_state(
    task: Task,
    model: nn.Module,
    scales: BoundScales | None,
    *,
    batches: int,
    plain: nn.Module,
    branches: Mapping[str, HeldBranches] | None,
) -> TrainingState:
    """Return optimizer, schedule and moving average around a model; `batches` are those of an epoch.

    Args:
        task, model: of the training.
        scales: constants of a RepOptimizer.
        batches: of an epoch.
        plain, branches: see `plain_form`.

    Raises:
        UserError: a step accumulates more batches than an epoch has, or the optimizer refuses its settings.
    """
    cfg, world = task.cfg, task.world
    accumulation = cfg.TRAIN.ACCUMULATION_STEPS
    if accumulation > batches:
        raise UserError(
            f"TRAIN.ACCUMULATION_STEPS is {accumulation}, and an epoch has {batches} batches: a step would have fewer "
            "images than its learning rate is for"
        )
    images_per_step = cfg.DATA.BATCH_SIZE * world.size * accumulation
    scaling = images_per_step / 256  # the learning rates of the configuration are per 256 images
    base_lr, factors = cfg.TRAIN.BASE_LR * scaling, learning_rate_factors(task, plain)
    rule, multiplied = cfg.TRAIN.OPTIMIZER, scales_of_gradients(task, scales) if branches is None else None
    optimizer = repopt.build_optimizer(
        rule.NAME,
        plain,
        multiplied,
        branches=branches,
        max_norm=None if branches is None and multiplied is None else cfg.TRAIN.CLIP_GRAD or None,
        lr=base_lr,
        lr_factors=factors,
        weight_decay=cfg.TRAIN.WEIGHT_DECAY,
        momentum=rule.MOMENTUM,
        nesterov=rule.MOMENTUM > 0,
        betas=rule.BETAS,
        eps=rule.EPS,
        implementation=rule.IMPLEMENTATION,
    )
    for group in optimizer.param_groups if factors else ():  # timm's schedules multiply the first and last rate, too
        group["lr_scale"], group["lr"] = group["lr"] / base_lr if base_lr else 1.0, base_lr
    steps_per_epoch = count_steps(batches, accumulation)
    warmup_steps = cfg.TRAIN.WARMUP_STEPS
    schedule = build_schedule(
        optimizer,
        cfg.TRAIN.LR_SCHEDULER.NAME,
        steps_per_epoch=steps_per_epoch,
        epochs=cfg.TRAIN.EPOCHS,
        warmup_steps=cfg.TRAIN.WARMUP_EPOCHS * steps_per_epoch if warmup_steps is None else warmup_steps,
        warmup_lr=cfg.TRAIN.WARMUP_LR * scaling,
        min_lr=cfg.TRAIN.MIN_LR * scaling,
        decay_epochs=cfg.TRAIN.LR_SCHEDULER.DECAY_EPOCHS,
        decay_rate=cfg.TRAIN.LR_SCHEDULER.DECAY_RATE,
        milestones=cfg.TRAIN.LR_SCHEDULER.MILESTONES,
        power=cfg.TRAIN.LR_SCHEDULER.POWER,
    )
    ema = None
    if cfg.TRAIN.EMA_ALPHA:  # of an image and an epoch of training; an update stands for many images
        alpha = cfg.TRAIN.EMA_ALPHA * images_per_step * cfg.TRAIN.EMA_UPDATE_PERIOD / cfg.TRAIN.EPOCHS
        ema = ModelEmaV3(model, decay=1 - min(1.0, alpha))
    kept = None if scales is None else scales.scales
    return TrainingState(model, optimizer, schedule, precision_of(cfg, world), kept, ema, epoch=cfg.TRAIN.START_EPOCH)


def scales_of_gradients(task: Task, scales: BoundScales | None) -> BoundScales | None:
    """Return those that the optimizer multiplies gradients by, or None for the plain rule."""
    return scales if task.arch.repopt and task.cfg.TRAIN.CHANGE_GRADIENTS else None


def clipping(cfg: CfgNode, model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[], Tensor] | None:
    """Return what clips the gradients; None where nothing is clipped, or the optimizer does it."""
    max_norm = cfg.TRAIN.CLIP_GRAD
    if not max_norm or getattr(optimizer, "max_norm", None) is not None:
        return None
    return functools.partial(nn.utils.clip_grad_norm_, list(model.parameters()), max_norm)


def distribute(task: Task, model: nn.Module) -> nn.Module:
    """Return the model as it is trained: compiled where that is worth while, in DDP where processes are several."""
    cfg, world = task.cfg, task.world
    if cfg.TRAIN.SYNC_BN and world.device.type != "cuda":
        raise UserError("TRAIN.SYNC_BN needs GPUs; without it statistics are averaged before every evaluation")
    if cfg.TRAIN.SYNC_BN and world.size > 1:
        model = convert_sync_batchnorm(model)  # torch's would lose the activations in timm's batch norms
    model = compiled(cfg, world, model)
    if world.size == 1:
        return model
    parallel = data_parallel(model, world.device)
    # After its first backward pass DDP orders its buckets anew, and with them the sums over processes: so that a step
    # rounds alike whether it is the first of a start or not, there is one pass before, which leaves nothing else.
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    images, targets = task.example()
    with torch.compiler.set_stance("force_eager"):  # compiling takes long, and this has a shape of its own
        task.criterion(task.forward(parallel.train(), images, targets), targets).backward()
    model.zero_grad(set_to_none=True)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            buffer.copy_(before[name])
    return parallel


def compiled(cfg: CfgNode, world: World, model: nn.Module) -> nn.Module:
    """Return the model under torch.compile, where that is asked for, or not said and worth while."""
    mode = compile_mode(cfg, world)
    if cfg.TRAIN.COMPILE == "auto":
        logger.info(f"TRAIN.COMPILE auto: {mode}")
    if mode == "off":
        return model
    if mode != "default" and cfg.TRAIN.ACCUMULATION_STEPS > 1:
        raise UserError(
            f"TRAIN.COMPILE {mode} runs CUDA graphs, whose gradients do not outlive the next batch: TRAIN.COMPILE "
            "default goes with TRAIN.ACCUMULATION_STEPS"
        )
    try:
        return compilation.compiled(model, world.device, mode)
    except UserError as error:
        if cfg.TRAIN.COMPILE != "auto":
            raise
        logger.warning(f"{error}; so training goes on without")
        return model


def compile_mode(cfg: CfgNode, world: World) -> str:
    """Return torch.compile's mode for a training, or "off": the one asked for, or what suits device and batches.

    A GPU has done a small batch before the host has launched the kernels of the next: "reduce-overhead" launches them
    as one CUDA graph. It needs one process, and gradients that do not have to outlive a batch. Checkpointed activations
    are not compiled, for their second run puts batch norms to rest.
    """
    if cfg.TRAIN.COMPILE != "auto":
        return cfg.TRAIN.COMPILE
    if world.device.type != "cuda" or cfg.TRAIN.USE_CHECKPOINT:
        return "off"
    pixels = cfg.DATA.BATCH_SIZE * cfg.DATA.IMG_SIZE**2
    small = cfg.TASK == CLASSIFY and pixels <= MAX_GRAPH_PIXELS
    return "reduce-overhead" if small and world.size == 1 and cfg.TRAIN.ACCUMULATION_STEPS <= 1 else "default"
