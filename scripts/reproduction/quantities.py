"""What a cell of a table shows: numbers that runs have left behind, and numbers counted from networks."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import analyse_kernels
import torch
from runs import epochs_of
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import repopt
from repopt.models import parse_arch
from repopt.models.network import Network
from reproduction.run import Run
from train import config, trained
from train.files import CONFIG


class Quantity(NamedTuple):
    """A number by its name in the YAML files.

    Attributes:
        decimals: that are shown.
        of: of a run.
        counted: instead, of an architecture: nothing is run.
        ordered: whether it says which row is better or worse.
    """

    decimals: int
    of: Callable[..., Any] | None = None
    counted: Callable[[str], Any] | None = None
    ordered: bool = True


def score(run: Run, name: str) -> float:
    """A number of the last evaluation, in percent."""
    return epochs_of(run.folder)[-1]["val"][name]


def quantized(run: Run, network: str, name: str) -> float:
    """A number of a network of a quantization ("fp32", "INT8" or "INT8, onnxruntime"), in percent."""
    return json.loads((run.folder / run.kind.left(run)).read_text())[network][name]


def throughput(run: Run) -> float:
    """Images per second of the deployed network."""
    return json.loads((run.folder / run.kind.left(run)).read_text())["images_per_second"]


def training_speed(run: Run, training: str, column: str) -> float:
    """Of what benchmark.py has measured of RepOpt or RepVGG, a column."""
    tables = json.loads((run.folder / run.kind.left(run)).read_text())["tables"]
    (found,) = (row[column] for row in next(iter(tables.values())) if row["training"] == training)
    return found


@functools.lru_cache(maxsize=8)
def kernels(run: Run) -> tuple[str, Mapping[str, Mapping[str, Tensor]]]:
    """The layer that the paper shows, and all kernels of a trained network by layer and form."""
    model = trained.read(run.folder / "latest.pth", run.arch).network()
    forms = analyse_kernels.forms_of(model)
    return analyse_kernels.papers_layer(model, list(forms)), forms


def kernel_std(run: Run, form: str, part: str) -> float:
    """The standard deviation of the weights of the paper's layer: "std", "central" or "surrounding"."""
    layer, forms = kernels(run)
    return analyse_kernels.statistics(forms[layer][form])[part]


def setting(run: Run, key: str) -> Any:
    """What the run is configured with; what follows from the data set is known once it has begun."""
    path = run.folder / CONFIG
    return config.lookup(json.loads(path.read_text()) if path.is_file() else run.cfg, key)


@functools.cache
def network(arch: str, classes: int = 1000) -> torch.nn.Module:
    """An architecture without numbers in it, in eval mode."""
    model, mode, _ = parse_arch(arch)
    with torch.device("meta"):
        return repopt.create_model(model, mode=mode, num_classes=classes).eval()


def parameters(arch: str) -> float:
    """In millions, with 1000 classes."""
    return sum(param.numel() for param in network(arch).parameters()) / 1e6


def deployed_parameters(arch: str) -> float:
    """Of the network after `repopt.deploy`, in millions."""
    return sum(param.numel() for param in repopt.deploy(network(arch)).parameters()) / 1e6


@functools.cache
def multiply_adds(arch: str, size: int = 224, classes: int = 1000) -> float:
    """Of convolutions and matrix products for one image of `size` pixels, in billions."""
    images = torch.zeros(1, 3, size, size, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(arch, classes)(images)
    return counter.get_total_flops() / 2 / 1e9


def layers(arch: str) -> list[int]:
    """Of the stages behind the stem."""
    return [len(model_stage) for model_stage in _stages(network(arch))]


def channels(arch: str) -> list[int]:
    """Of the stages behind the stem."""
    return [feature["num_chs"] for feature in network(arch).feature_info[1:]]


def _stages(model: torch.nn.Module) -> list[torch.nn.Module]:
    assert isinstance(model, Network)
    return [model.get_submodule(name) for name in model.stage_names[1:]]


QUANTITIES: dict[str, Quantity] = {
    "top1": Quantity(2, partial(score, name="top1")),
    "box mAP": Quantity(2, partial(score, name="box_map")),
    "mask mAP": Quantity(2, partial(score, name="mask_map")),
    "mIoU": Quantity(2, partial(score, name="miou")),
    "quantized top1": Quantity(2, partial(quantized, name="top1")),
    "quantized mIoU": Quantity(2, partial(quantized, name="miou")),
    "kernel std": Quantity(4, kernel_std),
    "throughput": Quantity(0, throughput),
    "training speed": Quantity(0, training_speed),
    "setting": Quantity(0, setting, ordered=False),
    "parameters": Quantity(1, counted=parameters, ordered=False),
    "deployed parameters": Quantity(1, counted=deployed_parameters, ordered=False),
    "multiply-adds": Quantity(1, counted=multiply_adds, ordered=False),
    "layers": Quantity(0, counted=layers, ordered=False),
    "channels": Quantity(0, counted=channels, ordered=False),
}
