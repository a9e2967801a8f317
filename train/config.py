"""Configuration: every key is declared once, in `KEYS`; defaults, types, flags and errors are derived from it.

Precedence: defaults < ``--cfg`` file (its ``BASE`` files first) < flags that were given < ``--opts KEY VALUE ...``.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import functools
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from yacs.config import CfgNode

from repopt.errors import UserError, one_line, shown, unknown

_MAX_RECIPE_BYTES = 2**16
_MAX_LITERAL = 1000  # characters; Python's parser has no bound of its own
_MAX_BASES = 20  # recipes above one another


CLASSIFY, SEGMENT, DETECT = TASKS = ("classify", "segment", "detect")
DENSE = (SEGMENT, DETECT)


class Key(NamedTuple):
    """A configuration key: its default, what it means, and what may stand there."""

    default: Any
    meaning: str
    type: type | None = None  # of the value where the default is None
    choices: tuple[Any, ...] | None = None
    flag: str | None = None  # of the command line; a bool key's flag takes no value and sets True
    minimum: int = 0  # of a number
    maximum: float = sys.maxsize
    length: int | None = None  # of a tuple
    whole: bool = False  # a tuple of integers
    fixed: bool = False  # a run that is resumed may not change it
    tasks: tuple[str, ...] = TASKS  # whose runs read it


KEYS: dict[str, Key] = {
    "BASE": Key([""], "YAML recipes, relative to this one, that it builds upon"),
    "TASK": Key(CLASSIFY, "what the network is trained for", choices=TASKS, fixed=True),
    "DATA.BATCH_SIZE": Key(128, "images per process and step", flag="--batch-size", minimum=1),
    "DATA.DATA_PATH": Key("", "data set root, where one is needed", flag="--data-path"),
    "DATA.DATASET": Key(
        "imagenet", "of the task: a row of data/registry.py, segmentation.py or detection.py", fixed=True
    ),
    "DATA.IMG_SIZE": Key(
        224, "side of a training image in pixels; small data sets bring their own", minimum=1, tasks=(CLASSIFY,)
    ),
    "DATA.TEST_SIZE": Key(None, "side of a test image in pixels; None = IMG_SIZE", int, minimum=1, tasks=(CLASSIFY,)),
    "DATA.TEST_BATCH_SIZE": Key(None, "images per process and step in evaluation; None = BATCH_SIZE", int, minimum=1),
    "DATA.INTERPOLATION": Key(
        "bilinear",
        "of resizing; random: one of two per training image",
        choices=("bilinear", "bicubic", "random"),
        tasks=(CLASSIFY,),
    ),
    "DATA.ZIP_MODE": Key(
        False, "read images from train.zip and val.zip with train_map.txt, val_map.txt", flag="--zip", tasks=(CLASSIFY,)
    ),
    "DATA.CACHE_MODE": Key(
        "part",
        "zipped images in memory: none, all on every process, or sharded over the processes",
        choices=("no", "full", "part"),
        flag="--cache-mode",
        tasks=(CLASSIFY,),
    ),
    "DATA.PIN_MEMORY": Key(True, "copy batches to the GPU from pinned memory"),
    "DATA.NUM_WORKERS": Key(8, "worker processes that decode images, per process"),
    "DATA.ON_BAD_IMAGE": Key(
        "skip",
        "an image that cannot be read: another takes its place in training, and in evaluation it counts as wrong "
        "(classify only); or the run ends",
        choices=("skip", "raise"),
    ),
    "MODEL.ARCH": Key("RepOpt-VGG-B1", "model and mode, such as RepOpt-VGG-B1-target", flag="--arch", fixed=True),
    "MODEL.RESUME": Key("", "checkpoint to resume; with --eval the weights to evaluate", flag="--resume"),
    "MODEL.NUM_CLASSES": Key(1000, "that are told apart; if not given, the data set's", minimum=1, fixed=True),
    "MODEL.STRIDES": Key(
        (2, 2, 2, 2, 2),
        "of the five downsampling layers; a search on small images may have others",
        length=5,
        fixed=True,
    ),
    "MODEL.INITIAL_SCALES": Key(
        "depth",
        "at which a search begins, and constants that are initial: sqrt(2 / l) in a stage's l-th block, or all 1",
        choices=("depth", "one"),
        fixed=True,
    ),
    "MODEL.BACKBONE": Key(
        "", "checkpoint of a classifier, with whose weights the backbone begins", flag="--backbone", tasks=DENSE
    ),
    "MODEL.FREEZE_BN": Key(
        False, "statistics of the backbone's batch norms stay as they are", tasks=(DETECT,), fixed=True
    ),
    "MODEL.CHANNELS": Key(256, "of the feature pyramid and what follows it", minimum=1, tasks=DENSE, fixed=True),
    "MODEL.LABEL_SMOOTHING": Key(0.1, "of the training loss", maximum=1, tasks=(CLASSIFY,)),
    "TRAIN.START_EPOCH": Key(0, "epoch to start at when nothing is resumed"),
    "TRAIN.EPOCHS": Key(300, "epochs in all", minimum=1),
    "TRAIN.WARMUP_EPOCHS": Key(20, "epochs of linear warm-up"),
    "TRAIN.WARMUP_STEPS": Key(None, "optimizer steps of linear warm-up, instead of WARMUP_EPOCHS", int),
    "TRAIN.WEIGHT_DECAY": Key(0.05, "of kernels; biases and other 1-D parameters are not decayed"),
    "TRAIN.BASE_LR": Key(5e-4, "learning rate per 256 images of the whole step; scaled linearly"),
    "TRAIN.WARMUP_LR": Key(0.0, "where the warm-up starts, per 256 images"),
    "TRAIN.MIN_LR": Key(0.0, "where the schedule ends, per 256 images"),
    "TRAIN.CLIP_GRAD": Key(
        0.0, "bound of the gradient norm (of the imagined CSLA network under a RepOptimizer); 0 = none"
    ),
    "TRAIN.AUTO_RESUME": Key(True, "resume latest.pth of the output folder where there is one"),
    "TRAIN.ACCUMULATION_STEPS": Key(0, "batches per optimizer step; 0 and 1 are the same", flag="--accumulation-steps"),
    "TRAIN.USE_CHECKPOINT": Key(False, "activation checkpointing: less memory, more time", flag="--use-checkpoint"),
    "TRAIN.LR_SCHEDULER.NAME": Key(
        "cosine", "of the learning rate", choices=("cosine", "linear", "poly", "step", "multistep")
    ),
    "TRAIN.LR_SCHEDULER.DECAY_EPOCHS": Key(30, "of the step schedule", minimum=1),
    "TRAIN.LR_SCHEDULER.DECAY_RATE": Key(0.1, "of the step and multistep schedules"),
    "TRAIN.LR_SCHEDULER.MILESTONES": Key(
        (8, 11), "epochs after which the multistep schedule decays", minimum=1, whole=True
    ),
    "TRAIN.LR_SCHEDULER.POWER": Key(0.9, "of the poly schedule"),
    "TRAIN.OPTIMIZER.NAME": Key(
        "sgd", "update rule: sgd, adamw, adam, rmsprop or lion; without RepOptimizer also adafactor", fixed=True
    ),
    "TRAIN.OPTIMIZER.EPS": Key(1e-8, "of AdamW, Adam and RMSprop"),
    "TRAIN.OPTIMIZER.BETAS": Key((0.9, 0.999), "of AdamW, Adam and Lion", length=2),
    "TRAIN.OPTIMIZER.MOMENTUM": Key(0.9, "of SGD (Nesterov) and RMSprop"),
    "TRAIN.OPTIMIZER.IMPLEMENTATION": Key(
        "auto",
        "of a RepOptimizer's step: compiled is as fast as torch's fused one, eager starts at once",
        choices=("auto", "compiled", "eager"),
    ),
    "TRAIN.EMA_ALPHA": Key(
        0.0, "weight of the newest weights in their moving average, per image and epoch of training; 0 = no average"
    ),
    "TRAIN.EMA_UPDATE_PERIOD": Key(8, "optimizer steps between updates of the moving average", minimum=1),
    "TRAIN.SCALES_PATH": Key(
        None, "searched scales: a scale file or a hyper-search checkpoint", str, flag="--scales-path"
    ),
    "TRAIN.CONSTANTS": Key(
        "searched",
        "of a RepOptimizer: the searched scales, their means over channels, those at which a search begins, or all 1",
        choices=("searched", "channel-mean", "initial", "one"),
        fixed=True,
    ),
    "TRAIN.CHANGE_INITIALIZATION": Key(True, "by the constants (Rule of Initialization); the ablation is without"),
    "TRAIN.CHANGE_GRADIENTS": Key(
        True, "by the constants (Rule of Iteration); the ablation is the plain update rule", fixed=True
    ),
    "TRAIN.IDENTITY_INIT": Key(
        "searched", "how identity branches enter the initial weights", choices=("searched", "one")
    ),
    "TRAIN.MOST_SKIPPED_STEPS": Key(
        20, "steps left out in a row, because loss or gradients are not finite, that end the run", minimum=1
    ),
    "TRAIN.COMPILE": Key(
        "auto",
        "of the training step: off, or a mode of torch.compile; auto: off on CPUs, and on GPUs reduce-overhead for "
        "batches of small images, else default",
        choices=("auto", "off", "default", "reduce-overhead", "max-autotune"),
    ),
    "TRAIN.SYNC_BN": Key(
        False, "synchronise batch norms over GPUs; else their statistics are averaged before evaluation"
    ),
    "AUG.MIXUP": Key(0.0, "alpha of mixup; 0 = off", tasks=(CLASSIFY,)),
    "AUG.CUTMIX": Key(0.0, "alpha of cutmix; 0 = off", tasks=(CLASSIFY,)),
    "AUG.CUTMIX_MINMAX": Key(
        None, "range of cutmix's side ratio, instead of alpha", tuple, length=2, tasks=(CLASSIFY,)
    ),
    "AUG.MIXUP_PROB": Key(1.0, "of mixup or cutmix, per batch", maximum=1, tasks=(CLASSIFY,)),
    "AUG.MIXUP_SWITCH_PROB": Key(0.5, "of cutmix where both are on", maximum=1, tasks=(CLASSIFY,)),
    "AUG.MIXUP_MODE": Key("batch", "of mixup and cutmix", choices=("batch", "pair", "elem"), tasks=(CLASSIFY,)),
    "AUG.PRESET": Key(
        None,
        "of training images; None: the keys below",
        str,
        choices=(None, "raug15", "weak", "none"),
        tasks=(CLASSIFY,),
    ),
    "AUG.COLOR_JITTER": Key(0.4, "strength", tasks=(CLASSIFY,)),
    "AUG.AUTO_AUGMENT": Key("rand-m9-mstd0.5-inc1", "timm's policy, or none", tasks=(CLASSIFY,)),
    "AUG.REPROB": Key(0.25, "probability of random erasing", maximum=1, tasks=(CLASSIFY,)),
    "AUG.REMODE": Key("pixel", "of random erasing", choices=("const", "rand", "pixel"), tasks=(CLASSIFY,)),
    "AUG.RECOUNT": Key(1, "of random erasing", minimum=1, tasks=(CLASSIFY,)),
    "SEGMENT.CROP": Key(
        (512, 1024), "height and width of a training image", length=2, minimum=1, whole=True, tasks=(SEGMENT,)
    ),
    "SEGMENT.SCALES": Key(
        (0.5, 2.0), "range of the factor by which a training image is resized", length=2, tasks=(SEGMENT,)
    ),
    "SEGMENT.WINDOW": Key(
        None,
        "height and width of what is evaluated at once; None = whole images",
        tuple,
        length=2,
        minimum=1,
        whole=True,
        tasks=(SEGMENT,),
    ),
    "SEGMENT.STRIDE": Key(
        None, "of the windows; None = two thirds of one", tuple, length=2, minimum=1, whole=True, tasks=(SEGMENT,)
    ),
    "DETECT.HEAD": Key(
        "mask", "Faster, Mask or Cascade Mask R-CNN", choices=("faster", "mask", "cascade"), fixed=True, tasks=(DETECT,)
    ),
    "DETECT.NECK": Key(
        "plain",
        "3x3 convolutions of the feature pyramid: plain ones, or declared blocks in the backbone's mode",
        choices=("plain", "declared"),
        fixed=True,
        tasks=(DETECT,),
    ),
    "DETECT.HIDDEN": Key(1024, "units of the box head's layers", minimum=1, fixed=True, tasks=(DETECT,)),
    "DETECT.ROIS": Key(512, "regions per image that train the heads", minimum=1, tasks=(DETECT,)),
    "DETECT.SIZES": Key(
        (800,),
        "short sides in pixels to which images are resized, the last one in evaluation",
        minimum=1,
        whole=True,
        tasks=(DETECT,),
    ),
    "DETECT.MAX_SIZE": Key(1333, "longest side after resizing in pixels", minimum=1, tasks=(DETECT,)),
    "DETECT.ANCHOR_SCALE": Key(
        8, "side of an anchor in steps of its level of the pyramid", minimum=1, fixed=True, tasks=(DETECT,)
    ),
    "TEST.CROP": Key(
        False, "evaluate on the centre of an image whose short side is 256/224 of TEST_SIZE", tasks=(CLASSIFY,)
    ),
    "TEST.PERIOD": Key(1, "epochs between evaluations while training; the last is always evaluated", minimum=1),
    "AMP_OPT_LEVEL": Key(
        "",
        "O0: fp32; O1, O2: autocast; empty: autocast on GPUs",
        choices=("", "O0", "O1", "O2"),
        flag="--amp-opt-level",
    ),
    "AMP_DTYPE": Key("bf16", "of autocast", choices=("bf16", "fp16")),
    "OUTPUT": Key("", "where runs go, <output>/<arch>/<tag>; empty: output", flag="--output"),
    "TAG": Key("default", "name of the run", flag="--tag"),
    "SAVE_FREQ": Key(20, "epochs between the checkpoints that are kept", minimum=1),
    "PRINT_FREQ": Key(10, "batches between lines of the log", minimum=1),
    "SAVE_EVERY_MINUTES": Key(15.0, "between checkpoints, within epochs and after them; 0: after every epoch"),
    "SAVE_EVERY_STEPS": Key(0, "between checkpoints within epochs; 0 = none"),
    "SAVE_KEEP": Key(2, "of the last checkpoints: latest.pth, latest_1.pth ...", minimum=1),
    "SEED": Key(0, "of everything random", fixed=True),
    "DETERMINISTIC": Key(False, "deterministic algorithms on GPUs: the same weights in every run, bit for bit; slower"),
    "EVAL_MODE": Key(False, "evaluate only", flag="--eval"),
    "THROUGHPUT_MODE": Key(False, "measure the inference throughput only", flag="--throughput", tasks=(CLASSIFY,)),
    "QUANT.METHOD": Key(
        None,
        "to INT8 after training (ptq) or by training on (qat), by scripts/quantize.py",
        str,
        choices=(None, "ptq", "qat"),
        fixed=True,
    ),
    "QUANT.PRESET": Key("default", "how numbers become integers: a row of repopt/quantize.py", fixed=True),
    "QUANT.CALIBRATION_IMAGES": Key(1024, "training images, as in evaluation, that choose the ranges", minimum=1),
}


class Program(NamedTuple):
    """A command line that configures a run.

    Attributes:
        name, description: for its help and messages.
        flags: the keys that they set.
        recipe: that is read where --cfg names none.
        task: the TASK that it is for.
    """

    name: str
    description: str
    flags: Mapping[str, str]
    recipe: str | None = None
    task: str = CLASSIFY


def flags_of(task: str) -> dict[str, str]:
    """Flags of a task's runs, and the keys that they set."""
    return {key.flag: name for name, key in KEYS.items() if key.flag and task in key.tasks}


MAIN = Program(
    "main_repopt.py",
    "Search scales (-hs), train a plain network with them (-target), evaluate it, measure its speed.",
    flags_of(CLASSIFY),
)


class Settings(NamedTuple):
    """A configuration, and the keys that a user set in it; neither is changed."""

    cfg: CfgNode
    given: Set[str]

    def with_values(self, values: Mapping[str, Any]) -> Settings:
        """Return settings in which dotted keys have these values; whether a user set them stays as it is."""
        cfg = self.cfg.clone()
        cfg.defrost()
        for name, value in values.items():
            *path, leaf = name.split(".")
            functools.reduce(getattr, path, cfg)[leaf] = _coerce(name, value)
        return Settings(cfg, self.given)

    def with_defaults(self, values: Mapping[str, Any]) -> Settings:
        """Return settings in which dotted keys have these values, unless a user set them."""
        return self.with_values({name: value for name, value in values.items() if name not in self.given})


def parse(argv: Sequence[str] | None = None, program: Program = MAIN) -> Settings:
    """The configuration that a command line asks for.

    Raises:
        UserError: an unknown flag or key (with the nearest one), a value of the wrong kind, a recipe that is not there.
    """
    flags = program.flags
    parser = _Parser(
        prog=program.name,
        description=program.description,
        epilog="Any key of train/config.py is set by --opts or a recipe; --opts wins over flags, flags over --cfg.",
        allow_abbrev=False,
    )
    for flag, name in flags.items():
        key = KEYS[name]
        if isinstance(key.default, bool):
            parser.add_argument(flag, dest=name, action="store_const", const="True", help=key.meaning)
        else:
            shown = "|".join(filter(None, key.choices)) if key.choices else name.split(".")[-1]
            parser.add_argument(flag, dest=name, help=key.meaning, metavar=shown)
    known = f" (default: {program.recipe})" if program.recipe else ""
    parser.add_argument("--cfg", metavar="FILE", help=f"YAML recipe{known}", default=program.recipe)
    parser.add_argument("--local_rank", "--local-rank", type=int, help="set by old launchers; LOCAL_RANK counts")
    parser.add_argument(
        "--opts", nargs="*", action="extend", default=[], metavar="KEY VALUE", help="any other key and its value"
    )
    arguments, rest = parser.parse_known_args(argv)
    if rest:
        raise unknown("flag", rest[0], [*flags, "--cfg", "--opts"])

    values: dict[str, Any] = dict(_read_recipe(Path(arguments.cfg))) if arguments.cfg else {}
    values |= {name: getattr(arguments, name) for name in flags.values() if getattr(arguments, name) is not None}
    if len(arguments.opts) % 2:
        raise UserError(f"--opts takes pairs of KEY and VALUE; the last one, {arguments.opts[-1]!r}, stands alone")
    values |= dict(zip(arguments.opts[::2], arguments.opts[1::2], strict=True))
    if "BASE" in values:
        raise UserError("BASE stands in a recipe; on the command line give --cfg")
    return build(values).with_defaults({"TASK": program.task})


def build(values: Mapping[str, Any]) -> Settings:
    """The defaults with `values` (by dotted key) over them; strings are read as on a command line."""
    flat = {name: key.default for name, key in KEYS.items()}
    for name, value in values.items():
        flat[name] = _coerce(name, value)
    return Settings(_nest(flat), set(values))


def as_dict(cfg: CfgNode) -> dict[str, Any]:
    """A configuration as plain nested dicts."""
    return {name: as_dict(value) if isinstance(value, CfgNode) else value for name, value in cfg.items()}


def lookup(cfg: object, name: str) -> Any:
    """The value of a dotted key in nested mappings, such as a configuration that a checkpoint keeps; None if absent."""
    for part in name.split("."):
        cfg = cfg.get(part) if isinstance(cfg, Mapping) else None
    return cfg


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # type: ignore[override]
        raise UserError(message)


def _nest(flat: Mapping[str, Any]) -> CfgNode:
    root = CfgNode()
    for name, value in flat.items():
        *path, leaf = name.split(".")
        node = root
        for part in path:
            node = node.setdefault(part, CfgNode())
        node[leaf] = value
    return root


def _coerce(name: str, value: Any) -> Any:
    """`value` as the key's type; text is read as a Python literal where the type is not text."""
    if name not in KEYS:
        raise unknown("config key", name, KEYS)
    key = KEYS[name]
    kind = key.type or type(key.default)
    if isinstance(value, str) and kind is not str:
        value = _literal(value)
    elif value == "None" and key.default is None:
        value = None
    if kind is float and type(value) is int and abs(value) <= sys.maxsize:
        value = float(value)
    if kind in (tuple, list) and isinstance(value, (tuple, list)):
        value = kind(value)
    if type(value) is not kind and not (value is None and key.default is None):
        raise UserError(f"{name} takes a value of type {kind.__name__}, not {shown(value)}")
    if isinstance(value, str) and "\0" in value:
        raise UserError(f"{name} takes text without NUL characters, not {shown(value)}")
    if kind in (int, float) and value is not None and not key.minimum <= value <= key.maximum:
        limit = f"from {key.minimum} on" if key.maximum == sys.maxsize else f"from {key.minimum} to {key.maximum}"
        raise UserError(f"{name} is a number {limit}, not {shown(value)}")
    if kind is tuple and value is not None:
        is_one = _is_whole if key.whole else _is_number
        if (
            len(value) != (key.length or len(value))
            or not value
            or any(not is_one(v) or v < key.minimum for v in value)
        ):
            count, numbers = key.length or "one or more", "integers" if key.whole else "numbers"
            least = f" from {key.minimum} on" if key.minimum else ""
            raise UserError(f"{name} takes {count} {numbers}{least}, not {shown(value)}")
    if key.choices and value not in key.choices:
        raise unknown(f"value of {name}", str(value), map(str, key.choices))
    return value


def _literal(text: str) -> Any:
    """`text` as a Python literal; what is none stays text, and whoever wants another type says so."""
    if len(text) <= _MAX_LITERAL:
        unreadable = contextlib.suppress(ValueError, SyntaxError, TypeError, MemoryError, RecursionError)
        with unreadable, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd escapes in strings
            return ast.literal_eval(text)
    return text


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and abs(value) <= sys.maxsize  # NaN is not


def _is_whole(value: object) -> bool:
    return type(value) is int and _is_number(value)


def _read_recipe(path: Path) -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of a YAML recipe, those of its BASE recipes first.

    Raises:
        UserError: a recipe that is not there, is no plain YAML, has unknown keys or builds upon itself.
    """
    yield from _recipe_and_bases(path, above=(), done=set())


def _recipe_and_bases(path: Path, above: tuple[Path, ...], done: set[Path]) -> Iterator[tuple[str, Any]]:
    try:
        found = path.is_file()
    except OSError:  # a name that is too long
        found = False
    if not found:
        raise UserError(f"there is no recipe {shown(str(path))}")
    path = path.resolve()
    if path in done:  # two recipes may build upon the same one
        return
    if path in above:
        raise UserError(f"recipe {shown(str(path))} builds upon itself")
    if len(above) > _MAX_BASES:
        raise UserError(f"recipe {shown(str(path))} stands below {len(above)} others, and {_MAX_BASES} are allowed")
    content = _load_yaml(path)
    bases = content.pop("BASE", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise UserError(f"BASE of recipe {shown(str(path))} lists recipes, not {shown(bases)}")
    for base in map(path.parent.joinpath, filter(None, bases)):
        yield from _recipe_and_bases(base, (*above, path), done)
    given = set()
    for name, value in _flatten(content):
        if name not in KEYS:
            raise UserError(f"{unknown('config key', name, KEYS)} in {shown(str(path))}")
        if name in given:
            raise UserError(f"{name} stands twice in {shown(str(path))}")
        given.add(name)
        yield name, value
    done.add(path)


def _load_yaml(path: Path) -> dict[str, Any]:
    size = path.stat().st_size
    if size > _MAX_RECIPE_BYTES:
        raise UserError(f"recipe {shown(str(path))} has {size} bytes, and {_MAX_RECIPE_BYTES} are allowed")
    try:
        content = yaml.load(path.read_text(encoding="utf-8-sig"), Loader=_PlainLoader)
    except RecursionError:
        raise UserError(f"recipe {shown(str(path))} is no plain YAML: it is nested too deeply") from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # no YAML, no UTF-8, no such date or number
        raise UserError(f"recipe {shown(str(path))} is no plain YAML: {one_line(error)}") from None
    if not isinstance(content, dict):
        raise UserError(f"recipe {shown(str(path))} holds no keys")
    return content


class _PlainLoader(yaml.SafeLoader):
    """YAML without tags and references, whose expansion has no bound, and with text as keys, each once."""

    def compose_node(self, parent: yaml.Node | None, index: object) -> yaml.Node | None:
        event = self.peek_event()
        if event.anchor is not None or (isinstance(event, (yaml.ScalarEvent, yaml.CollectionStartEvent)) and event.tag):
            raise yaml.composer.ComposerError(None, None, "recipes have no tags and aliases", event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.Node, deep: bool = False) -> dict[str, Any]:
        names = set()
        for key, _ in node.value:
            if key.tag != "tag:yaml.org,2002:str" or key.value in names:
                problem = f"{shown(key.value)} is no text, or stands twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            names.add(key.value)
        return super().construct_mapping(node, deep)


def _flatten(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in content.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
