"""Every configuration key: its default, its meaning, and what may stand there. Nothing else declares a key.

This module imports nothing that is slow to import, so that ``--help`` is.
"""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

CLASSIFY, SEGMENT, DETECT = TASKS = ("classify", "segment", "detect")
DENSE = (SEGMENT, DETECT)
AUTO = "auto"  # the word of a key that finds its value itself
FLOAT_LAYERS_DB = 20  # that QUANT.FLOAT_LAYERS auto reaches


class Key(NamedTuple):
    """A configuration key.

    Attributes:
        default: The value where nobody sets one; its type is the key's.
        help: What the key means.
        type: The type of the value where the default is None.
        choices: All values that are allowed.
        words: Words that may stand instead of a value.
        flag: The flag of the command line that sets it; a bool key's flag takes no value and sets True.
        former_flag: What the flag was called in earlier versions, which works still.
        minimum, maximum: Bounds of a number, or of each number of a tuple (`minimum`).
        length: The length of a tuple.
        integer: Whether a tuple holds integers.
        immutable_on_resume: Whether a resumed run may not change it.
        of_model: Whether the network is made of it, so that a checkpoint's network cannot be made without.
        backbone_argument: The argument of `repopt.create_model` that it is.
        tasks: The tasks whose runs read it.
        excludes: The key that says the same otherwise: where one of the two is set, the other is not.
    """

    default: Any
    help: str
    type: type | None = None
    choices: tuple[Any, ...] | None = None
    words: tuple[str, ...] = ()
    flag: str | None = None
    former_flag: str | None = None
    minimum: int = 0
    maximum: float = sys.maxsize
    length: int | None = None
    integer: bool = False
    immutable_on_resume: bool = False
    of_model: bool = False
    backbone_argument: str | None = None
    tasks: tuple[str, ...] = TASKS
    excludes: str | None = None


def _model(default: Any, help: str, **options: Any) -> Key:
    """Declare a key of which the network is made."""
    return Key(default, help, immutable_on_resume=True, of_model=True, **options)


def _classify(default: Any, help: str, type: type | None = None, **options: Any) -> Key:
    """Declare a key of classification."""
    return Key(default, help, type, tasks=(CLASSIFY,), **options)


KEYS: dict[str, Key] = {
    "BASE": Key([""], "YAML recipes, relative to this one, that it builds upon."),
    "TASK": _model(CLASSIFY, "What the network is trained for.", choices=TASKS),
    "DATA.BATCH_SIZE": Key(128, "Images per process and step.", flag="--batch-size", minimum=1),
    "DATA.DATA_PATH": Key("", "Root folder of the data set; some need none.", flag="--data-path"),
    "DATA.DATASET": _model("imagenet", "Name of the data set: a row of data/'s table for the task."),
    "DATA.IMG_SIZE": _classify(
        224, "Side of a training image in pixels; small data sets have a size of their own.", minimum=1
    ),
    "DATA.TEST_SIZE": _classify(None, "Side of a test image in pixels; None: DATA.IMG_SIZE.", int, minimum=1),
    "DATA.TEST_BATCH_SIZE": Key(
        None, "Images per process and step in evaluation; None: DATA.BATCH_SIZE.", int, minimum=1
    ),
    "DATA.INTERPOLATION": _classify(
        "bilinear",
        "Interpolation when images are resized; random: one of the other two for each training image.",
        choices=("bilinear", "bicubic", "random"),
    ),
    "DATA.ZIP_MODE": _classify(
        False, "Read images from train.zip and val.zip with train_map.txt and val_map.txt.", flag="--zip"
    ),
    "DATA.CACHE_MODE": _classify(
        "part",
        "Zipped images kept in memory: no: none; full: all, in every process; part: all, shared out to the processes.",
        choices=("no", "full", "part"),
        flag="--cache-mode",
    ),
    "DATA.IMAGE_COLUMN": _classify("image", "Column of the images in Parquet files."),
    "DATA.LABEL_COLUMN": _classify("label", "Column of the classes' numbers in Parquet files."),
    "DATA.SHUFFLE": _classify(
        "auto",
        "Order of a training on shards (parquet, wds); global: any image may follow any; blocks: images that lie "
        "beside each other are read together and come close to each other; auto: global where each can be read alone.",
        choices=("auto", "global", "blocks"),
        immutable_on_resume=True,
    ),
    "DATA.CLASSES": Key(
        None,
        "Names of the classes in the order of their indices; None: those of the checkpoint that is evaluated or "
        "quantized, else of the data set in its own order.",
        list,
    ),
    "DATA.VAL_FRACTION": _classify(
        0.0,
        "Part of every class's images that are held out for evaluation where class folders have no val/, from train/ "
        "or from the folder itself; 0: none.",
        maximum=0.9,
        immutable_on_resume=True,
    ),
    "DATA.MEAN": Key(
        None,
        "Mean of normalization per channel, of values in 0..1; None: the data set's.",
        tuple,
        immutable_on_resume=True,
    ),
    "DATA.STD": Key(None, "Standard deviation of normalization, likewise.", tuple, immutable_on_resume=True),
    "DATA.PIN_MEMORY": Key(True, "Copy batches to the GPU from pinned memory."),
    "DATA.NUM_WORKERS": Key(8, "Worker processes that decode images, per training process."),
    "DATA.DECODE": _classify(
        "auto",
        "What decodes and augments JPEGs for training; cpu: the workers; gpu: the GPU, for AUG.PRESET weak or raug15; "
        "auto: cpu.",
        choices=("auto", "cpu", "gpu"),
    ),
    "DATA.ON_BAD_IMAGE": Key(
        "skip",
        "What happens to an image that cannot be read; skip: another takes its place in training, and in evaluation "
        "it counts as wrong (classify only); raise: the run ends.",
        choices=("skip", "raise"),
    ),
    "MODEL.ARCH": _model(
        "RepOpt-VGG-B1", "Model and mode, such as RepOpt-VGG-B1-target or timm/repvgg_a0-target.", flag="--arch"
    ),
    "MODEL.RESUME": Key("", "Checkpoint to resume; with --eval the weights to evaluate.", flag="--resume"),
    "MODEL.NUM_CLASSES": _model(1000, "Number of classes; if it is not set, the data set's.", minimum=1),
    "MODEL.STRIDES": _model(
        (2, 2, 2, 2, 2),
        "Strides of the five downsampling layers; a search on small images may lower them.",
        length=5,
        backbone_argument="strides",
    ),
    "MODEL.INITIAL_SCALES": _model(
        "depth",
        "Scales at which a search begins, and constants that are initial; depth: sqrt(2 / l) in a stage's l-th block.",
        choices=("depth", "one"),
        backbone_argument="initial_scales",
    ),
    "MODEL.PRIOR": Key(
        "repvgg",
        "Branches that the convolutions before batch norms of another library's network without branches of its own "
        "(timm/NAME-target) train with.",
        choices=(
            "repvgg",
            "acnet",
            "average",
            "edge",
            "frequency",
            "distance",
            "dilated",
            "dbb",
            "orepa",
        ),
        immutable_on_resume=True,
    ),
    "MODEL.IN_CHANS": _model(
        3, "Channels of an image; 1: grey.", choices=(1, 3), backbone_argument="in_chans", tasks=(CLASSIFY,)
    ),
    "MODEL.PRETRAINED": Key(
        "",
        "Weights with which a training begins: a checkpoint of this project or of the published release, or timm's; "
        "the head, and what has another shape, is new. It also says the architecture, size and normalization if "
        "nothing else does.",
        flag="--pretrained",
        former_flag="--backbone",
    ),
    "MODEL.WEIGHTS": Key(
        "best",
        "Which of a checkpoint's weights are quantized, exported or begun with: the model's, their moving average, or "
        "the one that is better by the accuracies it holds.",
        choices=("best", "model", "ema"),
        flag="--weights",
    ),
    "MODEL.FREEZE_BN": _model(False, "Freeze the statistics of the backbone's batch norms.", tasks=(DETECT,)),
    "MODEL.CHANNELS": _model(256, "Channels of the feature pyramid and of what follows it.", minimum=1, tasks=DENSE),
    "MODEL.LABEL_SMOOTHING": _classify(0.1, "Label smoothing of the training loss.", maximum=1),
    "TRAIN.START_EPOCH": Key(0, "Epoch to start at when nothing is resumed."),
    "TRAIN.EPOCHS": Key(300, "Number of epochs in all.", minimum=1),
    "TRAIN.WARMUP_EPOCHS": Key(20, "Epochs of linear warm-up.", excludes="TRAIN.WARMUP_STEPS"),
    "TRAIN.WARMUP_STEPS": Key(
        None,
        "Optimizer steps of linear warm-up, instead of TRAIN.WARMUP_EPOCHS.",
        int,
        excludes="TRAIN.WARMUP_EPOCHS",
    ),
    "TRAIN.WEIGHT_DECAY": Key(0.05, "Weight decay of kernels; biases and other 1-D parameters are not decayed."),
    "TRAIN.BASE_LR": Key(5e-4, "Learning rate per 256 images of an optimizer step; it is scaled linearly."),
    "TRAIN.WARMUP_LR": Key(0.0, "Learning rate at which the warm-up starts, per 256 images."),
    "TRAIN.MIN_LR": Key(0.0, "Learning rate at which the schedule ends, per 256 images."),
    "TRAIN.HEAD_LR": Key(
        None, "Learning rate per 256 images of what stands on the backbone; None: TRAIN.BASE_LR.", float
    ),
    "TRAIN.LAYER_DECAY": Key(
        1.0,
        "Factor of the learning rate from every layer of the backbone to the one before it; a block whose branches are "
        "declared is one layer.",
        maximum=1,
    ),
    "TRAIN.FREEZE": Key(
        [],
        "Modules that are not trained, their batch norms at rest: paths with * and ?, such as stage0,stage1*.",
        immutable_on_resume=True,
    ),
    "TRAIN.CLIP_GRAD": Key(
        0.0,
        "Bound of the gradient norm (under a RepOptimizer that of the equivalent multi-branch network); 0: none.",
    ),
    "TRAIN.AUTO_RESUME": Key(True, "Resume latest.pth of the output folder where there is one."),
    "TRAIN.ACCUMULATION_STEPS": Key(
        0, "Batches per optimizer step; 0 and 1 are the same.", flag="--accumulation-steps"
    ),
    "TRAIN.USE_CHECKPOINT": Key(
        False,
        "Activation checkpointing: less memory, more time.",
        flag="--use-checkpoint",
        backbone_argument="use_checkpoint",
    ),
    "TRAIN.LR_SCHEDULER.NAME": Key(
        "cosine", "Schedule of the learning rate.", choices=("cosine", "linear", "poly", "step", "multistep")
    ),
    "TRAIN.LR_SCHEDULER.DECAY_EPOCHS": Key(30, "Epochs between the decays of the step schedule.", minimum=1),
    "TRAIN.LR_SCHEDULER.DECAY_RATE": Key(0.1, "Factor of a decay of the step and multistep schedules."),
    "TRAIN.LR_SCHEDULER.MILESTONES": Key(
        (8, 11), "Epochs after which the multistep schedule decays.", minimum=1, integer=True
    ),
    "TRAIN.LR_SCHEDULER.POWER": Key(0.9, "Power of the poly schedule."),
    "TRAIN.OPTIMIZER.NAME": Key(
        "sgd",
        "Update rule: sgd, adamw, adam, rmsprop, lion; muon, lars, lamb or adafactor, for which branches are held.",
        immutable_on_resume=True,
    ),
    "TRAIN.OPTIMIZER.EPS": Key(1e-8, "Epsilon of AdamW, Adam and RMSprop."),
    "TRAIN.OPTIMIZER.BETAS": Key((0.9, 0.999), "Betas of AdamW, Adam and Lion.", length=2),
    "TRAIN.OPTIMIZER.MOMENTUM": Key(0.9, "Momentum of SGD (Nesterov) and RMSprop."),
    "TRAIN.OPTIMIZER.IMPLEMENTATION": Key(
        "auto",
        "How a RepOptimizer computes a step; compiled is as fast as torch's fused one, eager starts at once.",
        choices=("auto", "compiled", "eager"),
    ),
    "TRAIN.EMA_ALPHA": Key(
        0.0, "Weight of the newest weights in their moving average, per image and epoch of training; 0: no average."
    ),
    "TRAIN.EMA_UPDATE_PERIOD": Key(8, "Optimizer steps between updates of the moving average.", minimum=1),
    "TRAIN.SCALES_PATH": Key(
        None, "Searched scales: a scale file or a hyper-search checkpoint.", str, flag="--scales-path"
    ),
    "TRAIN.SEARCH_EPOCHS": Key(
        0,
        "Epochs at whose end the scales, searched in the training of the -target itself, become constants; auto: when "
        "they have settled, after a tenth of the epochs at the latest; 0: they come from TRAIN.SCALES_PATH.",
        words=(AUTO,),
    ),
    "TRAIN.CONSTANTS": Key(
        "searched",
        "Constants of a RepOptimizer: the searched scales, their means over channels, those at which a search begins, "
        "or all 1.",
        choices=("searched", "channel-mean", "initial", "one"),
        immutable_on_resume=True,
    ),
    "TRAIN.CHANGE_INITIALIZATION": Key(
        True, "Change the initial weights by the constants (Rule of Initialization); False is the ablation."
    ),
    "TRAIN.CHANGE_GRADIENTS": Key(
        True,
        "Change the gradients by the constants (Rule of Iteration); False is the ablation.",
        immutable_on_resume=True,
    ),
    "TRAIN.IDENTITY_INIT": Key(
        "searched", "How identity branches enter the initial weights.", choices=("searched", "one")
    ),
    "TRAIN.MAX_SKIPPED_STEPS": Key(
        20, "Steps skipped in a row, because loss or gradients are not finite, that end the run.", minimum=1
    ),
    "TRAIN.COMPILE": Key(
        "auto",
        "How torch.compile treats the training step: off, or its mode; auto: off on CPUs, and on GPUs reduce-overhead "
        "for batches of small images, else default.",
        choices=("auto", "off", "default", "reduce-overhead", "max-autotune"),
    ),
    "TRAIN.SYNC_BN": Key(
        False, "Synchronise batch norms over GPUs; else their statistics are averaged before evaluation."
    ),
    "AUG.MIXUP": _classify(0.0, "Alpha of mixup; 0: off."),
    "AUG.CUTMIX": _classify(0.0, "Alpha of cutmix; 0: off."),
    "AUG.CUTMIX_MINMAX": _classify(None, "Range of cutmix's side ratio, instead of its alpha.", tuple, length=2),
    "AUG.MIXUP_PROB": _classify(1.0, "Probability of mixup or cutmix, per batch.", maximum=1),
    "AUG.MIXUP_SWITCH_PROB": _classify(0.5, "Probability of cutmix where both are on.", maximum=1),
    "AUG.MIXUP_MODE": _classify("batch", "What mixup and cutmix draw for.", choices=("batch", "pair", "elem")),
    "AUG.PRESET": _classify(
        None,
        "Preset for training images; None: as the other AUG keys say.",
        str,
        choices=(None, "raug15", "weak", "none"),
    ),
    "AUG.CROP_AREA": _classify(
        (0.08, 1.0), "Smallest and largest part of an image that a random crop for training covers.", length=2
    ),
    "AUG.HFLIP": _classify(0.5, "Probability that a training image is mirrored.", maximum=1),
    "AUG.COLOR_JITTER": _classify(0.4, "Strength of the colour jitter."),
    "AUG.AUTO_AUGMENT": _classify("rand-m9-mstd0.5-inc1", "Policy of AutoAugment or RandAugment as timm names it."),
    "AUG.REPROB": _classify(0.25, "Probability of random erasing.", maximum=1),
    "AUG.REMODE": _classify("pixel", "What random erasing fills in.", choices=("const", "rand", "pixel")),
    "AUG.RECOUNT": _classify(1, "Number of rectangles of random erasing.", minimum=1),
    "SEGMENT.CROP": Key(
        (512, 1024), "Height and width of a training image.", length=2, minimum=1, integer=True, tasks=(SEGMENT,)
    ),
    "SEGMENT.SCALES": Key(
        (0.5, 2.0), "Range of the factor by which a training image is resized.", length=2, tasks=(SEGMENT,)
    ),
    "SEGMENT.WINDOW": Key(
        None,
        "Height and width of the windows in which an image is evaluated; None: whole images.",
        tuple,
        length=2,
        minimum=1,
        integer=True,
        tasks=(SEGMENT,),
    ),
    "SEGMENT.STRIDE": Key(
        None,
        "Vertical and horizontal stride of the windows; None: two thirds of one.",
        tuple,
        length=2,
        minimum=1,
        integer=True,
        tasks=(SEGMENT,),
    ),
    "DETECT.HEAD": _model(
        "mask",
        "Faster, Mask or Cascade Mask R-CNN, or FCOS, which has one stage and a declared neck.",
        choices=("faster", "mask", "cascade", "fcos"),
        tasks=(DETECT,),
    ),
    "DETECT.NECK": _model(
        "plain",
        "3x3 convolutions of the feature pyramid: plain ones, or declared blocks in the backbone's mode.",
        choices=("plain", "declared"),
        tasks=(DETECT,),
    ),
    "DETECT.HIDDEN": _model(1024, "Units of the box head's layers.", minimum=1, tasks=(DETECT,)),
    "DETECT.ROIS": Key(512, "Regions per image that train the heads.", minimum=1, tasks=(DETECT,)),
    "DETECT.SIZES": Key(
        (800,),
        "Short sides in pixels to which images are resized, the last one in evaluation.",
        minimum=1,
        integer=True,
        tasks=(DETECT,),
    ),
    "DETECT.MAX_SIZE": Key(1333, "Longest side in pixels after resizing.", minimum=1, tasks=(DETECT,)),
    "DETECT.ANCHOR_SCALE": _model(
        8, "Side of an anchor, in strides of its level of the pyramid.", minimum=1, tasks=(DETECT,)
    ),
    "TEST.CROP": _classify(False, "Evaluate on the centre of an image whose short side is 256/224 of DATA.TEST_SIZE."),
    "TEST.PERIOD": Key(1, "Epochs between evaluations while training; the last is always evaluated.", minimum=1),
    "AMP_OPT_LEVEL": Key(
        "",
        "Mixed precision; O0: fp32; O1, O2: autocast; empty: autocast on GPUs.",
        choices=("", "O0", "O1", "O2"),
        flag="--amp-opt-level",
    ),
    "AMP_DTYPE": Key("bf16", "Lower precision of autocast.", choices=("bf16", "fp16")),
    "OUTPUT": Key("", "Folder below which runs go, to <output>/<arch>/<tag>; empty: output.", flag="--output"),
    "TAG": Key("default", "Name of the run.", flag="--tag"),
    "SAVE_FREQ": Key(20, "Epochs between the checkpoints that are kept.", minimum=1),
    "PRINT_FREQ": Key(10, "Batches between lines of the log.", minimum=1),
    "SAVE_EVERY_MINUTES": Key(15.0, "Minutes between checkpoints, within epochs and after them; 0: after every epoch."),
    "SAVE_EVERY_STEPS": Key(0, "Optimizer steps between checkpoints within epochs; 0: none."),
    "SAVE_KEEP": Key(2, "How many of the last checkpoints are kept: latest.pth, latest_1.pth ...", minimum=1),
    "SEED": Key(0, "Seed of everything random.", immutable_on_resume=True),
    "DETERMINISTIC": Key(
        False, "Use deterministic algorithms on GPUs: the same weights in every run, bit for bit, but slower."
    ),
    "EVAL_MODE": Key(False, "Evaluate only.", flag="--eval"),
    "THROUGHPUT_MODE": _classify(False, "Measure the inference throughput only.", flag="--throughput"),
    "QUANT.METHOD": Key(
        None,
        "How scripts/quantize.py makes the network INT8: after training (ptq) or by training on (qat); compare: after "
        "training in every way, to choose one.",
        str,
        choices=(None, "ptq", "qat", "compare"),
        immutable_on_resume=True,
    ),
    "QUANT.PRESET": Key(
        "default", "How numbers become integers: a row of repopt/quantization/presets.py.", immutable_on_resume=True
    ),
    "QUANT.CALIBRATOR": Key(
        None,
        "How ptq chooses the ranges of activations: minmax, histogram, percentile, mse or entropy (a row of "
        "repopt/quantization/calibrators.py); None: as the preset says.",
        str,
    ),
    "QUANT.FLOAT_LAYERS": Key(
        "",
        "Layers that stay in float: names as in signal_to_noise.json, with commas between; a number: so many of the "
        f"most sensitive; auto: as few of these as put the network's outputs {FLOAT_LAYERS_DB} dB above their noise "
        "after ptq, on the calibration images; empty: none.",
        immutable_on_resume=True,
    ),
    "QUANT.EQUALIZE": Key(False, "Whether ptq equalizes the weights of consecutive layers before (Nagel et al. 2019)."),
    "QUANT.BIAS_CORRECTION": Key(
        False, "Whether ptq takes the mean error of every channel, on the calibration images, from its bias."
    ),
    "QUANT.DISTILL": Key(
        0.0,
        "Weight of the Kullback-Leibler divergence of the logits from the float network's in the loss of qat; 0: none.",
        immutable_on_resume=True,
    ),
    "QUANT.CALIBRATION_IMAGES": Key(
        1024,
        "Training images that choose the ranges, transformed as in evaluation; or that put batch norms back where the "
        "branches of MODEL.PRETRAINED are merged, as training sees them.",
        minimum=1,
    ),
}

RENAMED = {"TRAIN.MOST_SKIPPED_STEPS": "TRAIN.MAX_SKIPPED_STEPS", "MODEL.BACKBONE": "MODEL.PRETRAINED"}
"""Keys of earlier versions, which recipes and command lines may hold, and what they are called now."""


def flags_of(task: str) -> dict[str, str]:
    """Return the flags of a task's runs, and the keys that they set."""
    return {
        flag: name
        for name, key in KEYS.items()
        for flag in (key.flag, key.former_flag)
        if flag is not None and task in key.tasks
    }


# Of what a network is made but for its classes, and for what.
OF_NETWORK = tuple(name for name, key in KEYS.items() if key.of_model and name not in ("TASK", "MODEL.NUM_CLASSES"))

# Of these what makes another network of the same architecture, or another function of the same weights.
ARGUMENTS = (
    *("MODEL.STRIDES", "MODEL.IN_CHANS", "MODEL.CHANNELS"),
    *("DETECT.HEAD", "DETECT.NECK", "DETECT.HIDDEN", "DETECT.ANCHOR_SCALE"),
)

# How a picture becomes an image in evaluation, which a checkpoint says for whoever evaluates it or begins with it.
OF_IMAGES = (
    *("DATA.IMG_SIZE", "DATA.TEST_SIZE", "DATA.INTERPOLATION", "TEST.CROP", "DATA.MEAN", "DATA.STD"),
    *("DETECT.SIZES", "DETECT.MAX_SIZE"),
)
