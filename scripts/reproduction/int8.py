"""What INT8 costs every network under every method: a table of ours, "table int8"."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from reproduction.experiment import Experiment, Row, quantized
from reproduction.run import COMPARE, DETECT, QAT, SEGMENT, TRAIN, Kind, Training
from train import config
from train.keys import AUTO
from train.ways import WAYS

QATS: Mapping[str, Mapping[str, Any]] = {"qat": {}, "qat-distilled": {"QUANT.DISTILL": 1.0}}
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
        once: whether there is one seed.
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
    once: bool = False


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
        "glyphs": Subject(model, glyphs, top1, 1, suffix="-short-glyphs", settings=shorter, once=True),
        "scenes (FCOS)": Subject(model, fcos, box_map, 4, DETECT, suffix="-fcos"),
        "scenes (UPerNet)": Subject(model, segment, miou, 4, SEGMENT, digits, suffix="-segment"),
    }


@functools.cache
def training(subject: Subject, network: str) -> Training:
    """Return the training of a network of `MODES`."""
    name, mode, (recipe, search_recipe, _) = NAMES[network], MODES[network], subject.recipes
    family = {"qarepvgg": "repvgg", "one-run": "target"}.get(name, name)  # of the recipes at full scale
    found = Training(
        f"{name}{subject.suffix}",
        f"{subject.model}-{mode}",
        f"configs/{recipe.format(name=family)}.yaml",
        subject.kind,
        dict(subject.settings),
        base=training(subject.base, network) if subject.base else None,
        gpus=subject.gpus,
        once=subject.once,
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
        gpus=subject.gpus if search_recipe == recipe else 1,
        once=True,
    )
    return found.but(found.name, scales=search)


@functools.cache
def quantization(subject: Subject, network: str, name: str) -> Training:
    """Return the quantizations of a network of `MODES`: after training ("compare"), or by one of `QATS`."""
    base, cfg = training(subject, network), f"configs/{subject.recipes[2]}.yaml"
    found = Training(f"{name}-{base.name}", "", cfg, COMPARE, base=base, once=subject.once)
    if name not in QATS:
        return found
    return replace(found, kind=QAT, settings=QATS[name], gpus=subject.gpus, once=True)


def table(full: bool) -> Experiment:
    """Return the table: images and ways to INT8 by networks."""
    rows = []
    for images, subject in subjects(full).items():
        measure, title = subject.measure

        def row(
            label: str,
            name: str,
            form: str,
            images: str = f"{images}, {title} (%)",
            subject: Subject = subject,
            measure: str = measure,
        ) -> Row:
            cells = {}
            for network in MODES:
                run = quantization(subject, network, name)
                cells[network] = quantized(run, form, measure)
                cells[f"{network} (dB)"] = quantized(run, form, "signal_to_noise")._replace(decimals=1)
            return Row((images, label), cells)

        rows += [row(form, "compare", form) for form in ("fp32", *WAYS)]
        rows += [row("QAT", "qat", "INT8"), row("QAT, distilled", "qat-distilled", "INT8")]
    notes = (
        "What torch computes. Multi-branch networks are folded before; dB: of the outputs above the noise of "
        "quantization, on the calibration images (of a detector's outputs the one with the most noise).",
        "QARepVGG is trained at half the learning rate of the others, at which it learns digits. QAT is of one seed."
        + ("" if full else " Glyphs: half the epochs of the recipe, and one seed."),
    )
    return Experiment("What INT8 costs", notes, rows=rows, label_names=("images", "INT8 by"))
