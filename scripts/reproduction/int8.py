"""What INT8 costs every network under every method: a table of ours, "table int8"."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from reproduction.experiment import Cell, Experiment, Row, quantized
from reproduction.run import COMPARE, DETECT, QAT, SEGMENT, TRAIN, Kind, Training
from train import config
from train.keys import AUTO
from train.ways import WAYS

QATS: Mapping[str, Mapping[str, Any]] = {"qat": {}, "qat-distilled": {"QUANT.DISTILL": 1.0}}
QAT_NAMES = {"QAT": "qat", "QAT, distilled": "qat-distilled"}


class Trained(NamedTuple):
    """How a network is trained: in which mode, and what its runs are called."""

    mode: str
    name: str


NETWORKS = {
    "RepVGG": Trained("repvgg", "repvgg"),
    "QARepVGG": Trained("qarepvgg", "qarepvgg"),
    "RepOpt, two runs": Trained("target", "target"),
    "RepOpt, one run": Trained("target", "one-run"),
    "plain SGD": Trained("target-norepopt", "plain"),
}


class Subject(NamedTuple):
    """Images, and what is trained on them and quantized.

    Attributes:
        model: name of the network, or of its backbone.
        recipe, search, quantize: of a training, a search and a quantization, in configs/.
        measure: what is shown of an evaluation.
        title: what that is called.
        search_epochs: of a training that searches, too.
        kind: of a training.
        base: where the backbone begins with a classifier's weights, whose.
        suffix: of the names of runs.
        epochs: of a training; None = as the recipe says.
        gpus: of a training and of a quantization by training.
        once: whether there is one seed.
    """

    model: str
    recipe: str
    search: str
    quantize: str
    measure: str
    title: str
    search_epochs: int | str
    kind: Kind = TRAIN
    base: Subject | None = None
    suffix: str = ""
    epochs: int | None = None
    gpus: int = 1
    once: bool = False


def subjects(full: bool) -> Mapping[str, Subject]:
    """Return what the table is of, by the name of the images."""
    top1, box_map, miou = ("top1", "top-1"), ("box_map", "box mAP"), ("miou", "mIoU")
    if full:
        model, fcos = "RepOpt-VGG-B1", ("coco/fcos", "coco/fcos", "coco/quantize")
        imagenet = ("imagenet/b1_{name}", "hyper_search/b1", "imagenet/quantize")
        return {
            "ImageNet": Subject(model, *imagenet, *top1, AUTO, gpus=8),
            "COCO (FCOS)": Subject(model, *fcos, *box_map, AUTO, DETECT, suffix="-fcos", gpus=8),
        }
    model, fcos = "RepOpt-VGG-nano", ("scenes/fcos", "scenes/fcos", "scenes/quantize_fcos")
    digits = Subject(model, "digits/train", "digits/search", "digits/quantize", *top1, 8)
    glyphs = ("glyphs/train", "glyphs/search", "glyphs/quantize")
    segment = ("scenes/segment", "", "scenes/quantize")
    return {
        "digits": digits,
        "glyphs": Subject(model, *glyphs, *top1, 1, suffix="-short-glyphs", epochs=4, once=True),
        "scenes (FCOS)": Subject(model, *fcos, *box_map, 4, DETECT, suffix="-fcos"),
        "scenes (UPerNet)": Subject(model, *segment, *miou, 4, SEGMENT, digits, suffix="-segment"),
    }


@functools.cache
def training(subject: Subject, network: str) -> Training:
    """Return the training of one of `NETWORKS`."""
    mode, name = NETWORKS[network]
    family = {"qarepvgg": "repvgg", "one-run": "target"}.get(name, name)  # of the recipes at full scale
    settings = {} if subject.epochs is None else {"TRAIN.EPOCHS": subject.epochs}
    found = Training(
        f"{name}{subject.suffix}",
        f"{subject.model}-{mode}",
        f"configs/{subject.recipe.format(name=family)}.yaml",
        subject.kind,
        settings,
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
    gpus = subject.gpus if subject.search == subject.recipe else 1
    arch, cfg = f"{subject.model}-hs", f"configs/{subject.search}.yaml"
    search = Training(f"search{subject.suffix}", arch, cfg, subject.kind, settings, gpus=gpus, once=True)
    return found.but(found.name, scales=search)


@functools.cache
def quantization(subject: Subject, network: str, name: str) -> Training:
    """Return the quantizations of one of `NETWORKS`: after training ("compare"), or by one of `QATS`."""
    base, cfg = training(subject, network), f"configs/{subject.quantize}.yaml"
    found = Training(f"{name}-{base.name}", "", cfg, COMPARE, base=base, once=subject.once)
    if name not in QATS:
        return found
    return replace(found, kind=QAT, settings=QATS[name], gpus=subject.gpus, once=True)


def table(full: bool) -> Experiment:
    """Return the table: images and ways to INT8 by networks."""
    rows = []
    for images, subject in subjects(full).items():
        own = f"{images}, {subject.title} (%)"
        rows += [Row((own, form), cells_of(subject, "compare", form)) for form in ("fp32", *WAYS)]
        rows += [Row((own, label), cells_of(subject, name, "INT8")) for label, name in QAT_NAMES.items()]
    notes = (
        "What torch computes. Multi-branch networks are folded before; dB: of the outputs above the noise of "
        "quantization, on the calibration images (of a detector's outputs the one with the most noise).",
        "QARepVGG is trained at half the learning rate of the others, at which it learns digits. QAT is of one seed."
        + ("" if full else " Glyphs: half the epochs of the recipe, and one seed."),
    )
    return Experiment("What INT8 costs", notes, rows=rows, label_names=("images", "INT8 by"))


def cells_of(subject: Subject, name: str, form: str) -> dict[str, Cell]:
    """Return the cells of a row: of every network what a form of it has, and how far its noise is below its outputs."""
    cells = {}
    for network in NETWORKS:
        run = quantization(subject, network, name)
        cells[network] = quantized(run, form, subject.measure)
        cells[f"{network} (dB)"] = quantized(run, form, "signal_to_noise")._replace(decimals=1)
    return cells
