"""The entrance: search scales, train a plain network with them, evaluate it, measure its speed.

    torchrun --nproc_per_node 1 main_repopt.py --cfg configs/hyper_search/b1.yaml --data-path CIFAR --tag search
    torchrun --nproc_per_node 8 main_repopt.py --cfg configs/imagenet/b1_target.yaml --data-path IMAGENET --tag train \\
        --scales-path output/RepOpt-VGG-B1-hs/search/scales.pth
    python main_repopt.py --arch RepOpt-VGG-B1-target --data-path IMAGENET --eval --resume FILE

A run is one process or many (torchrun); everything it writes goes to <output>/<arch>/<tag>/.
"""

from __future__ import annotations

import functools
import json
import os
import shlex
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from yacs.config import CfgNode

import data
import repopt
from repopt import checkpoint, config, engine
from repopt.distributed import World, decided_by_first, world
from repopt.errors import UserError, shown
from repopt.logging import logger, start_log
from repopt.models import Arch, list_archs, parse_arch
from repopt.run_folder import RunFolder

DONE = 0
MISTAKE = 2  # of the user, or of the machine: a full disk
INTERRUPTED = 75  # sysexits' EX_TEMPFAIL: saved after SIGTERM, SIGUSR1 or SIGINT; the same command goes on from there


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code, one of those below; what stopped it is one line on stderr."""
    try:
        settings = config.parse(argv)
        arch = parse_arch(settings.cfg.MODEL.ARCH)
        with world() as here:
            return run(arch, resolve(arch, settings), here, sys.argv[1:] if argv is None else argv)
    except UserError as error:
        message = str(error)
    except OSError as error:  # of the machine: no permission, no space, a path that is none
        message = f"{error.strerror or error}: {error.filename}" if error.filename else error.strerror or str(error)
    if os.environ.get("RANK", "0") != "0":
        time.sleep(2)  # mostly the first process has the same to say; torchrun then ends this one before it does
    print(f"main_repopt.py: {message}", file=sys.stderr)
    return MISTAKE


def resolve(arch: Arch, settings: config.Settings) -> CfgNode:
    """Fill in what follows from the data set and other keys, refuse what contradicts it, and freeze."""
    cfg, given = settings
    if cfg.EVAL_MODE and not cfg.MODEL.RESUME:
        raise UserError("--eval needs the weights to evaluate: --resume FILE")
    if cfg.TRAIN.SCALES_PATH and not needs_scales(arch):
        raise UserError(f"{cfg.MODEL.ARCH} takes no searched scales: leave --scales-path out, or train a -target")
    if not cfg.THROUGHPUT_MODE:
        info = data.describe(source_of(cfg), splits=("val",) if cfg.EVAL_MODE else ("train", "val"))
        for section, name, value in (
            ("MODEL", "NUM_CLASSES", info.num_classes),
            ("DATA", "IMG_SIZE", info.image_size),
            ("DATA", "TEST_SIZE", info.image_size),
        ):
            if value is None or (cfg.DATA.ZIP_MODE and f"{section}.{name}" in given and cfg[section][name] > value):
                continue  # a map file names the classes that occur, and there may be more
            if f"{section}.{name}" in given and cfg[section][name] != value:
                raise UserError(f"{section}.{name} is {cfg[section][name]}, but the data set's is {value}")
            cfg[section][name] = value
    if cfg.TRAIN.START_EPOCH >= cfg.TRAIN.EPOCHS:
        raise UserError(
            f"TRAIN.START_EPOCH {cfg.TRAIN.START_EPOCH} leaves none of {cfg.TRAIN.EPOCHS} TRAIN.EPOCHS to train"
        )
    cfg.DATA.TEST_SIZE = cfg.DATA.TEST_SIZE or cfg.DATA.IMG_SIZE
    cfg.DATA.TEST_BATCH_SIZE = cfg.DATA.TEST_BATCH_SIZE or cfg.DATA.BATCH_SIZE
    cfg.TRAIN.ACCUMULATION_STEPS = max(1, cfg.TRAIN.ACCUMULATION_STEPS)
    cfg.OUTPUT = str(Path(cfg.OUTPUT or "output", cfg.MODEL.ARCH, cfg.TAG))
    cfg.freeze()
    return cfg


def run(arch: Arch, cfg: CfgNode, world: World, argv: Sequence[str]) -> int:
    """Train, or evaluate, or measure throughput, as the command line `argv` says; the exit code."""
    Path(cfg.OUTPUT).mkdir(parents=True, exist_ok=True)
    folder = RunFolder(Path(cfg.OUTPUT), keep=cfg.SAVE_KEEP)
    if not (cfg.EVAL_MODE or cfg.THROUGHPUT_MODE):
        decided_by_first(folder.lock)
    if cfg.DETERMINISTIC:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when a GPU is first used
        torch.use_deterministic_algorithms(True)
    start_log(folder.path, world.rank)
    logger.info(f"main_repopt.py {shlex.join(argv)}")
    logger.info(f"torch {torch.__version__}, {world.size} process(es), {world.device.type}")
    torch.manual_seed(cfg.SEED)
    model = repopt.create_model(
        arch.model, mode=arch.mode, num_classes=cfg.MODEL.NUM_CLASSES, use_checkpoint=cfg.TRAIN.USE_CHECKPOINT
    )
    if cfg.THROUGHPUT_MODE:
        report_throughput(cfg, world, model)
    elif cfg.EVAL_MODE:
        report_evaluation(cfg, world, model)
    else:
        try:
            train(arch, cfg, world, model, folder)
        except engine.Interrupted as stopped:
            logger.info(stopped)
            return INTERRUPTED
    return DONE


def report_throughput(cfg: CfgNode, world: World, model: nn.Module) -> None:
    """Print the images per second of the network as it is deployed."""
    speed = engine.measure_throughput(
        to_device(repopt.deploy(model), world),
        batch_size=cfg.DATA.BATCH_SIZE,
        image_size=cfg.DATA.TEST_SIZE,
        precision=precision_of(cfg, world),
        memory_format=memory_format_of(world),
    )
    logger.info(
        f"{cfg.MODEL.ARCH} deployed: {speed:.1f} images/s in batches of {cfg.DATA.BATCH_SIZE}, {cfg.DATA.TEST_SIZE} px"
    )


def report_evaluation(cfg: CfgNode, world: World, model: nn.Module) -> None:
    """Print the accuracy of a checkpoint, and of its moving average where it keeps one."""
    content = checkpoint.read(cfg.MODEL.RESUME)
    loader = eval_loader(cfg, world)
    model = to_device(model, world)
    for key, label in (("model", "val"), ("ema", "ema")):
        if key == "model" or isinstance(content.get(key), Mapping):
            repopt.load_weights(model, checkpoint.state_dict_of(content, key))
            logger.info(f"{label}: {engine.evaluate(model, loader, precision_of(cfg, world))}")


def train(arch: Arch, cfg: CfgNode, world: World, model: nn.Module, folder: RunFolder) -> None:
    """Train from the beginning, or on from a checkpoint."""
    settings = config.as_dict(cfg)
    resume = decided_by_first(lambda: find_checkpoint(cfg, folder))
    content = checkpoint.read(resume) if resume else None
    goes_on = content is not None and "optimizer" in content  # else it gives its weights alone
    if goes_on:
        check_same_run(arch, cfg, content)
    scales = find_scales(arch, cfg, model, content)
    if scales is not None and content is None:
        repopt.initialize(model, scales, identity=cfg.TRAIN.IDENTITY_INIT)
    model = to_device(model, world)
    augmentation = data.Augmentation(**{f.name: cfg.AUG[f.name.upper()] for f in fields(data.Augmentation)})
    train_loader, val_loader = training_loader(cfg, world, augmentation), eval_loader(cfg, world)
    if goes_on and content.get("data") not in (None, train_loader.fingerprint):
        raise UserError("cannot resume: the training images of DATA.DATA_PATH are not those that this run began with")
    state = training_state(arch, cfg, world, model, scales, batches=len(train_loader))
    state.data = train_loader.fingerprint
    if content is not None:
        state.restore(content, rank=world.rank, processes=world.size)
        train_loader.set_epoch(state.epoch, state.seen)
        within = f", {train_loader.images_seen} images into the next" if state.seen else ""
        logger.info(f"resumed {resume} after epoch {state.epoch} of {cfg.TRAIN.EPOCHS}{within}")
    if world.is_main:
        (folder.path / "config.json").write_text(json.dumps(settings, indent=1) + "\n")
    logger.info(
        f"{cfg.MODEL.ARCH}: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, "
        f"{train_loader.num_images} training and {val_loader.num_images} test images"
    )
    engine.Training(
        state,
        distribute(cfg, world, model),
        train_loader,
        val_loader,
        nn.CrossEntropyLoss(label_smoothing=0.0 if augmentation.mixes else cfg.MODEL.LABEL_SMOOTHING),
        epochs=cfg.TRAIN.EPOCHS,
        folder=folder,
        config=settings,
        world=world,
        seed=cfg.SEED,
        searching=arch.mode == "hs",
        clip=clipping(arch, cfg, model, scales),
        accumulation_steps=cfg.TRAIN.ACCUMULATION_STEPS,
        ema_update_period=cfg.TRAIN.EMA_UPDATE_PERIOD,
        eval_period=cfg.TEST.PERIOD,
        save_period=cfg.SAVE_FREQ,
        save_every_minutes=cfg.SAVE_EVERY_MINUTES,
        save_every_steps=cfg.SAVE_EVERY_STEPS,
        most_skipped=cfg.TRAIN.MOST_SKIPPED_STEPS,
        print_period=cfg.PRINT_FREQ,
    ).run()


def find_checkpoint(cfg: CfgNode, folder: RunFolder) -> Path | None:
    """What to resume: what an earlier start of the same run left (it goes before --resume), or --resume, or nothing."""
    own = folder.resumable() if cfg.TRAIN.AUTO_RESUME else None
    if own is None:
        return Path(cfg.MODEL.RESUME) if cfg.MODEL.RESUME else None
    if cfg.MODEL.RESUME:
        logger.warning(f"this run goes on from its own {own}, not from {cfg.MODEL.RESUME}")
    return own


OF_A_START = ("MODEL.RESUME", "OUTPUT", "TAG", "EVAL_MODE")  # keys that differ without a meaning for the training


def check_same_run(arch: Arch, cfg: CfgNode, content: Mapping[str, Any]) -> None:
    """Refuse to go on from another kind of run; log what else differs."""
    if not isinstance(content.get("config", {}), Mapping):
        raise UserError(f"cannot resume: the checkpoint's config is {shown(content['config'])}")
    for key in config.KEYS:
        then, now = (config.lookup(source, key) for source in (content.get("config"), cfg))
        if then in (None, now) or (key == "MODEL.ARCH" and list_archs().get(str(then)) == arch):
            continue
        if config.KEYS[key].fixed:
            raise UserError(f"cannot resume: {key} was {shown(then)} in the checkpoint and is {now!r} now")
        if key not in OF_A_START:
            logger.info(f"{key} was {shown(then)} before this start and is {now!r} now")


def needs_scales(arch: Arch) -> bool:
    """Whether searched scales make the model or its optimizer."""
    return arch.repopt or arch.mode == "csla"


def find_scales(
    arch: Arch, cfg: CfgNode, model: nn.Module, content: Mapping[str, Any] | None
) -> Mapping[str, Tensor] | None:
    """The scales of a run that needs them: those kept in the checkpoint that it resumes, or --scales-path."""
    if not needs_scales(arch):
        return None
    path, kept = cfg.TRAIN.SCALES_PATH, content is not None and "scales" in content
    if not kept and not path:
        raise UserError(
            f"{cfg.MODEL.ARCH} needs searched scales: give --scales-path a scale file or the checkpoint of a "
            f"hyper-search ({arch.model}-target-norepopt trains with the plain optimizer)"
        )
    if not kept:
        return repopt.fit_scales(model, repopt.load_scales(path))
    scales = repopt.fit_scales(model, checkpoint.state_dict_of({"scales": content["scales"]}, "scales"))
    if path and Path(path).is_file():
        given = repopt.fit_scales(model, repopt.load_scales(path))
        if any(not torch.equal(scales[name], given[name]) for name in scales):
            raise UserError(
                f"cannot resume: TRAIN.SCALES_PATH: the scales of {path!r} are not those that this run began with"
            )
    return scales


def training_state(
    arch: Arch, cfg: CfgNode, world: World, model: nn.Module, scales: Mapping[str, Tensor] | None, *, batches: int
) -> engine.TrainingState:
    """Optimizer, schedule and moving average around a model."""
    images_per_step = cfg.DATA.BATCH_SIZE * world.size * cfg.TRAIN.ACCUMULATION_STEPS
    scaling = images_per_step / 256  # the learning rates of the configuration are per 256 images
    rule = cfg.TRAIN.OPTIMIZER
    optimizer = repopt.build_optimizer(
        rule.NAME,
        model,
        scales if arch.repopt else None,
        lr=cfg.TRAIN.BASE_LR * scaling,
        weight_decay=cfg.TRAIN.WEIGHT_DECAY,
        momentum=rule.MOMENTUM,
        nesterov=rule.MOMENTUM > 0,
        betas=rule.BETAS,
        eps=rule.EPS,
        implementation=rule.IMPLEMENTATION,
    )
    schedule = engine.build_schedule(
        optimizer,
        cfg.TRAIN.LR_SCHEDULER.NAME,
        steps_per_epoch=engine.count_steps(batches, cfg.TRAIN.ACCUMULATION_STEPS),
        epochs=cfg.TRAIN.EPOCHS,
        warmup_epochs=cfg.TRAIN.WARMUP_EPOCHS,
        warmup_lr=cfg.TRAIN.WARMUP_LR * scaling,
        min_lr=cfg.TRAIN.MIN_LR * scaling,
        decay_epochs=cfg.TRAIN.LR_SCHEDULER.DECAY_EPOCHS,
        decay_rate=cfg.TRAIN.LR_SCHEDULER.DECAY_RATE,
    )
    ema = None
    if cfg.TRAIN.EMA_ALPHA:  # of an image and an epoch of training; an update stands for many images
        alpha = cfg.TRAIN.EMA_ALPHA * images_per_step * cfg.TRAIN.EMA_UPDATE_PERIOD / cfg.TRAIN.EPOCHS
        ema = ModelEmaV3(model, decay=1 - min(1.0, alpha))
    return engine.TrainingState(
        model, optimizer, schedule, precision_of(cfg, world), scales, ema, epoch=cfg.TRAIN.START_EPOCH
    )


def clipping(
    arch: Arch, cfg: CfgNode, model: nn.Module, scales: Mapping[str, Tensor] | None
) -> Callable[[], Tensor] | None:
    """What clips the gradients: under a RepOptimizer by the norm that the imagined CSLA network's would have."""
    if not cfg.TRAIN.CLIP_GRAD:
        return None
    if arch.repopt and scales is not None:
        mults = repopt.grad_mults(model, scales, degree=1)
        return functools.partial(repopt.clip_grad_norm_, list(model.named_parameters()), cfg.TRAIN.CLIP_GRAD, mults)
    return functools.partial(nn.utils.clip_grad_norm_, list(model.parameters()), cfg.TRAIN.CLIP_GRAD)


def distribute(cfg: CfgNode, world: World, model: nn.Module) -> nn.Module:
    """The model as it is trained, in DDP where there are several processes."""
    if cfg.TRAIN.SYNC_BN and world.device.type != "cuda":
        raise UserError("TRAIN.SYNC_BN needs GPUs; without it statistics are averaged before every evaluation")
    if world.size == 1:
        return model
    if cfg.TRAIN.SYNC_BN:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # broadcast_buffers has a new name, which torch 2.11 lacks
        model = DistributedDataParallel(
            model,
            device_ids=[world.device] if world.device.type == "cuda" else None,
            broadcast_buffers=False,  # batch-norm statistics are averaged before every evaluation instead
            gradient_as_bucket_view=True,
        )
    # After its first backward pass DDP orders its buckets anew, and with them the sums over processes: so that a step
    # rounds alike whether it is the first of a start or not, there is one pass before, which leaves nothing else.
    images = torch.zeros(2, 3, cfg.DATA.IMG_SIZE, cfg.DATA.IMG_SIZE, device=world.device)
    model.eval()
    model(images.contiguous(memory_format=memory_format_of(world))).sum().backward()
    model.zero_grad(set_to_none=True)
    return model


def to_device(model: nn.Module, world: World) -> nn.Module:
    """The model where, and in the memory format in which, it runs."""
    return model.to(world.device, memory_format=memory_format_of(world))


def memory_format_of(world: World) -> torch.memory_format:
    """channels_last feeds the tensor cores of GPUs."""
    return torch.channels_last if world.device.type == "cuda" else torch.contiguous_format


def precision_of(cfg: CfgNode, world: World) -> engine.Precision:
    """What AMP_OPT_LEVEL asks for: O0 is fp32, O1 and O2 autocast; unasked, autocast on GPUs and fp32 on CPUs."""
    level = cfg.AMP_OPT_LEVEL or ("O1" if world.device.type == "cuda" else "O0")
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[cfg.AMP_DTYPE]
    return engine.Precision(world.device, None if level == "O0" else dtype)


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
        **loading(cfg, world),
    )


def eval_loader(cfg: CfgNode, world: World) -> data.Loader:
    """Evaluation batches of this process."""
    return data.eval_loader(
        source_of(cfg),
        image_size=cfg.DATA.TEST_SIZE,
        batch_size=cfg.DATA.TEST_BATCH_SIZE,
        crop=cfg.TEST.CROP,
        **loading(cfg, world),
    )


def loading(cfg: CfgNode, world: World) -> dict[str, Any]:
    """What training and evaluation loaders have in common."""
    return {
        "interpolation": cfg.DATA.INTERPOLATION,
        "num_classes": cfg.MODEL.NUM_CLASSES,
        "device": world.device,
        "rank": world.rank,
        "world_size": world.size,
        "num_workers": cfg.DATA.NUM_WORKERS,
        "pin_memory": cfg.DATA.PIN_MEMORY,
        "memory_format": memory_format_of(world),
    }


if __name__ == "__main__":
    sys.exit(main())
