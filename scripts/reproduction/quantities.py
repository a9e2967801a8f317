"""What a cell of a table shows: numbers that runs have left behind, and numbers counted from networks."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from typing import Any

import analyse_kernels
import torch
from runs import epochs_of
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import repopt
from repopt.models import parse_arch
from repopt.models.network import Network
from reproduction.experiment import Cell
from reproduction.run import ExperimentRun, Training
from train import config, trained
from train.files import CONFIG


def score(training: Training, name: str = "top1") -> Cell:
    """Return a cell with a number of the last evaluation, in percent."""
    return Cell(training, lambda run: epochs_of(run.folder)[-1]["val"][name])


def quantized(training: Training, network: str, name: str = "top1") -> Cell:
    """Return a cell with a number of a quantized network ("fp32", "INT8" or "INT8, onnxruntime"), in percent."""
    return Cell(training, lambda run: json.loads(run.result.read_text())[network][name])


def throughput(training: Training) -> Cell:
    """Return a cell with the images per second of the deployed network."""
    return Cell(training, lambda run: json.loads(run.result.read_text())["images_per_second"], decimals=0)


def training_speed(training: Training, of: str, column: str) -> Cell:
    """Return a cell with a column of what benchmark.py has measured of "RepOpt" or "RepVGG"."""

    def value(run: ExperimentRun) -> Any:
        rows = next(iter(json.loads(run.result.read_text())["tables"].values()))
        (found,) = (row[column] for row in rows if row["training"] == of)
        return found

    return Cell(training, value, decimals=0)


def kernel_std(training: Training, form: str, part: str) -> Cell:
    """Return a cell with the standard deviation of the paper's layer: "std", "central" or "surrounding"."""

    def value(run: ExperimentRun) -> float | None:
        layer, forms = kernels(run)
        return analyse_kernels.statistics(forms[layer][form])[part]

    return Cell(training, value, decimals=4)


@functools.lru_cache(maxsize=8)
def kernels(run: ExperimentRun) -> tuple[str, Mapping[str, Mapping[str, Tensor]]]:
    """Return the layer that the paper shows, and all kernels of a trained network by layer and form."""
    model = trained.read(run.folder / "latest.pth", run.arch).network()
    forms = analyse_kernels.forms_of(model)
    return analyse_kernels.papers_layer(model, list(forms)), forms


def setting(training: Training, key: str) -> Cell:
    """Return what the run is configured with; what follows from the data set is known once it has begun."""

    def value(run: ExperimentRun) -> Any:
        path = run.folder / CONFIG
        return config.lookup(json.loads(path.read_text()) if path.is_file() else run.cfg, key)

    return Cell(training, value, decimals=0, ordered=False)


def counted(arch: str, count: Callable[[str], Any], decimals: int = 1) -> Cell:
    """Return a cell of what is counted of an architecture: nothing is run."""
    return Cell(arch, count, decimals, ordered=False)


@functools.cache
def network(arch: str, classes: int = 1000) -> torch.nn.Module:
    """Return an architecture without numbers in it, in eval mode."""
    model, mode, _ = parse_arch(arch)
    with torch.device("meta"):
        return repopt.create_model(model, mode=mode, num_classes=classes).eval()


def parameters(arch: str) -> float:
    """Return how many there are with 1000 classes, in millions."""
    return sum(param.numel() for param in network(arch).parameters()) / 1e6


def deployed_parameters(arch: str) -> float:
    """Return how many there are after `repopt.deploy`, in millions."""
    return sum(param.numel() for param in repopt.deploy(network(arch)).parameters()) / 1e6


@functools.cache
def multiply_adds(arch: str, size: int = 224, classes: int = 1000) -> float:
    """Return those of convolutions and matrix products for one image of `size` pixels, in billions."""
    images = torch.zeros(1, 3, size, size, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(arch, classes)(images)
    return counter.get_total_flops() / 2 / 1e9


def layers(arch: str) -> list[int]:
    """Return how many the stages behind the stem have."""
    model = network(arch)
    assert isinstance(model, Network)
    return [sum(1 for _ in model.get_submodule(name).children()) for name in model.stage_names[1:]]


def channels(arch: str) -> list[int]:
    """Return how many the stages behind the stem have."""
    model = network(arch)
    assert isinstance(model, Network)
    return [feature["num_chs"] for feature in model.feature_info[1:]]
