"""Our own questions, asked in the form of the paper's tables, on images that come with scikit-learn or are drawn."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from plots import plot_values

from reproduction.experiment import Experiment, Row, quantized, score
from reproduction.run import PTQ, Training
from train import config

SHARES = {"5 %": 0.05, "10 %": 0.1, "25 %": 0.25, "50 %": 0.5, "100 %": 1.0}  # of the epochs that are the search
NETWORKS = {"nano": ("RepOpt-VGG-nano", "repvgg"), "ghost": ("ghost", "rep")}  # and the mode of its baseline
IMAGES = {"digits": ("digits", {}), "patches": ("digits", {"DATA.DATASET": "patches"}), "glyphs": ("glyphs", {})}


def one_run(network: str, images: str) -> Experiment:
    """Return the study of a search within the training: when it ends, beside two runs, and beside none."""
    (model, baseline), (recipes, settings) = NETWORKS[network], IMAGES[images]

    def training(name: str, mode: str = "target", **keys: Any) -> Training:
        own = {f"TRAIN.{key}": value for key, value in keys.items()}
        return Training(f"{name}-{images}", f"{model}-{mode}", f"configs/{recipes}/train.yaml", settings=settings | own)

    epochs = config.parse(["--cfg", f"configs/{recipes}/train.yaml"]).cfg.TRAIN.EPOCHS
    search = replace(training("search", "hs"), cfg=f"configs/{recipes}/search.yaml")
    trainings = {
        "two runs": replace(training("two"), scales=search),
        "one run without a search": training("none", CONSTANTS="initial"),
        **{
            f"one run, searching for {share}": training(f"share{number}", SEARCH_EPOCHS=max(1, round(part * epochs)))
            for number, (share, part) in enumerate(SHARES.items())
        },
        "one run, auto": training("auto", SEARCH_EPOCHS="auto"),
        "the baseline": training("baseline", baseline),
        "plain SGD": training("plain", "target-norepopt"),
    }
    rows = []
    for label, own in trainings.items():
        shown = {"DATA.DATASET": images}
        int8 = Training(f"int8-{own.name}", cfg="configs/digits/quantize.yaml", kind=PTQ, base=own, settings=shown)
        cells = {"top1": score(own), "INT8 top1": quantized(int8, "INT8")}
        rows.append(Row((label,), cells))
    return Experiment(
        f"One run: {model} on {images}",
        ("What it costs is measured by scripts/benchmark.py one-run.",),
        rows=rows,
        label_names=("training",),
        draw_rows=_draw,
    )


def _draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    plot_values({row["labels"][0]: row["cells"][0]["values"] for row in rows}, path, measure="top1 (%)")


STUDIES: dict[str, Callable[[], Experiment]] = {
    f"study one-run-{network}-{images}": functools.partial(one_run, network, images)
    for network in NETWORKS
    for images in IMAGES
}
