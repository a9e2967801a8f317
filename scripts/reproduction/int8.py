"""What INT8 costs every network under every method: a table of ours, "table int8"."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

from reproduction.experiment import Cell, Experiment, Row, quantized
from reproduction.run import DETECT, PTQ, QAT, SEGMENT, TRAIN, Kind, Training
from train import config
from train.keys import AUTO


class Method(NamedTuple):
    """A way to INT8: the name of its runs, their kind, and settings over the recipe."""

    name: str
    kind: Kind
    settings: Mapping[str, Any]


METHODS = {
    "PTQ, a scale per tensor, minmax": Method("tensor", PTQ, {"QUANT.PRESET": "per_tensor"}),
    **{
        f"PTQ, {name}": Method(name, PTQ, {} if name == "histogram" else {"QUANT.CALIBRATOR": name})
        for name in ("minmax", "histogram", "percentile", "mse", "entropy")
    },
    "PTQ, equalized, biases corrected": Method("equal", PTQ, {"QUANT.EQUALIZE": True, "QUANT.BIAS_CORRECTION": True}),
    "PTQ, float layers auto": Method("float", PTQ, {"QUANT.FLOAT_LAYERS": AUTO}),
    "QAT": Method("qat", QAT, {}),
    "QAT, distilled": Method("distill", QAT, {"QUANT.DISTILL": 1.0}),
}
FIRST = next(iter(METHODS))
MODES = {
    "RepVGG": "repvgg",
    "QARepVGG": "qarepvgg",
    "RepOpt, two runs": "target",
    "RepOpt, one run": "target",
    "plain SGD": "target-norepopt",
}
NAMES = dict(zip(MODES, ("repvgg", "qarepvgg", "target", "one-run", "plain"), strict=True))  # of their runs


class Subject(NamedTuple):
    """Images, and what is trained on them and quantized.

    Attributes:
        model: name of the network, or of its backbone.
        recipes: of a training, a search and a quantization, in configs/.
        measure: what an evaluation calls the number that is shown, and what it is called in the table.
        search_epochs: of a training that searches, too.
        kind: of a training.
        base: where the backbone begins with a classifier's weights, whose.
        suffix: of the names of runs.
        settings: over the recipes of trainings.
        gpus: of a training and of a quantization by training.
    """

    model: str
    recipes: tuple[str, str, str]
    measure: tuple[str, str]
    search_epochs: int | str
    kind: Kind = TRAIN
    base: Subject | None = None
    suffix: str = ""
    settings: tuple[tuple[str, Any], ...] = ()
    gpus: int = 1


def subjects(full: bool) -> Mapping[str, Subject]:
    """Return what the table is of, by the name of the images."""
    top1, box_map, miou = ("top1", "top-1"), ("box_map", "box mAP"), ("miou", "mIoU")
    if full:
        recipes = ("imagenet/b1_{name}", "hyper_search/b1", "imagenet/quantize")
        detector = ("coco/fcos", "coco/fcos", "coco/quantize")
        return {
            "ImageNet": Subject("RepOpt-VGG-B1", recipes, top1, AUTO, gpus=8),
            "COCO (FCOS)": Subject("RepOpt-VGG-B1", detector, box_map, AUTO, DETECT, suffix="-fcos", gpus=8),
        }
    model = "RepOpt-VGG-nano"
    digits = Subject(model, ("digits/train", "digits/search", "digits/quantize"), top1, 8)
    glyphs = ("glyphs/train", "glyphs/search", "glyphs/quantize")
    shorter = (("TRAIN.EPOCHS", 4),)
    fcos = ("scenes/fcos", "scenes/fcos", "scenes/quantize_fcos")
    segment = ("scenes/segment", "", "scenes/quantize")
    return {
        "digits": digits,
        "glyphs": Subject(model, glyphs, top1, 1, suffix="-glyphs", settings=shorter),
        "scenes (FCOS)": Subject(model, fcos, box_map, 4, DETECT, suffix="-fcos"),
        "scenes (UPerNet)": Subject(model, segment, miou, 4, SEGMENT, digits, suffix="-segment"),
    }


@functools.cache
def training(subject: Subject, network: str) -> Training:
    """Return the training of a network of `MODES`."""
    name, mode, (recipe, search_recipe, _) = NAMES[network], MODES[network], subject.recipes
    family = name if mode in ("repvgg", "target-norepopt") else "target"  # one recipe of each at full scale
    found = Training(
        f"{name}{subject.suffix}",
        f"{subject.model}-{mode}",
        f"configs/{recipe.format(name=family)}.yaml",
        subject.kind,
        dict(subject.settings),
        base=training(subject.base, network) if subject.base else None,
        gpus=subject.gpus,
    )
    if mode == "qarepvgg":  # at the rate of the others it hardly learns digits (docs/quantization.md)
        half = config.parse(["--cfg", str(found.cfg)], subject.kind.program).cfg.TRAIN.BASE_LR / 2
        return found.but(found.name, {"TRAIN.BASE_LR": half})
    if mode != "target" or found.base:  # a classifier's scales go with its weights
        return found
    if name == "one-run":
        return found.but(found.name, {"TRAIN.SEARCH_EPOCHS": subject.search_epochs})
    search = Training(
        f"search{subject.suffix}",
        f"{subject.model}-hs",
        f"configs/{search_recipe}.yaml",
        subject.kind,
        dict(subject.settings),
        once=True,
    )
    return found.but(found.name, scales=search)


@functools.cache
def quantization(subject: Subject, network: str, label: str) -> Training:
    """Return the quantization of a network of `MODES` by a method of `METHODS`."""
    method, base = METHODS[label], training(subject, network)
    cfg, gpus = f"configs/{subject.recipes[2]}.yaml", subject.gpus if method.kind is QAT else 1
    return Training(f"{method.name}-{base.name}", "", cfg, method.kind, method.settings, base=base, gpus=gpus)


def table(full: bool) -> Experiment:
    """Return the table: images and methods by networks."""
    rows = []
    for images, subject in subjects(full).items():
        name, title = subject.measure

        def cells(label: str, form: str, subject: Subject = subject, name: str = name) -> dict[str, Cell]:
            found = {}
            for network in MODES:
                run = quantization(subject, network, label)
                found[network] = quantized(run, form, name)
                found[f"{network} (dB)"] = quantized(run, form, "signal_to_noise")._replace(decimals=1)
            return found

        rows.append(Row((f"{images}, {title} (%)", "fp32"), cells(FIRST, "fp32")))
        rows += [Row((f"{images}, {title} (%)", label), cells(label, "INT8")) for label in METHODS]
    notes = (
        "What torch computes. Multi-branch networks are folded before; dB: of the outputs above the noise of "
        "quantization, on the calibration images (of a detector's outputs the one with the most noise).",
        "QARepVGG is trained at half the learning rate of the others, at which it learns digits.",
    )
    return Experiment("What INT8 costs", notes, rows=rows, label_names=("images", "INT8 by"))
