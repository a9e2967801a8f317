"""A table or figure of the paper: what is trained for it, and the numbers of runs and networks that it shows."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import analyse_kernels
import torch
from runs import epochs_of
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import repopt
from repopt.models import parse_arch
from repopt.models.network import Network
from reproduction.paper import PaperTable
from reproduction.run import ExperimentRun, Training
from train import config, trained
from train.file_names import CONFIG


class Cell(NamedTuple):
    """A number of a table.

    Attributes:
        subject: the training whose runs have it, or an architecture of which it is counted.
        value: returns it for a run of the training, or for the architecture; None where it is not known.
        decimals: that are shown.
        ordered: whether it says which row is better or worse.
    """

    subject: Training | str
    value: Callable[[Any], Any]
    decimals: int = 2
    ordered: bool = True


class Row(NamedTuple):
    """A row of a table: the labels by which the paper's row is found, and cells by the paper's column."""

    labels: tuple[Any, ...]
    cells: Mapping[str, Cell]


@dataclass(frozen=True)
class Experiment:
    """A table or figure at one scale.

    Attributes:
        title, notes: for its readers.
        table: the paper's table.
        rows: of a table.
        ours: labels and columns of rows that the paper has not.
        draw: draws a figure into a file, from the first seed's runs of what it shows.
        shown: trainings that a figure shows, by what they are called there.
        label_names: columns that say what a row is, where there is no table of the paper.
        draw_rows: draws the rows, as a result holds them, into a file.
    """

    title: str
    notes: Sequence[str] = ()
    table: PaperTable | None = None
    rows: Sequence[Row] = ()
    ours: Sequence[str] = ()
    draw: Callable[[Mapping[str, ExperimentRun], Path], None] | None = None
    shown: Mapping[str, Training] = field(default_factory=dict)
    label_names: Sequence[str] = ()
    draw_rows: Callable[[Sequence[Mapping[str, Any]], Path], None] | None = None

    @property
    def trainings(self) -> list[Training]:
        """The trainings whose runs are shown, each once."""
        subjects = [cell.subject for row in self.rows for cell in row.cells.values()]
        return list(dict.fromkeys([*self.shown.values(), *(s for s in subjects if isinstance(s, Training))]))

    @property
    def labels(self) -> list[str]:
        """Columns that say what a row is."""
        return list(self.table.columns[: len(self.rows[0].labels)]) if self.table else [*self.label_names]

    def of_paper(self, row: Row, column: str) -> Any:
        """Return what the paper has in a cell; None where it has none."""
        if self.table is None or any(name in self.ours for name in (column, *row.labels)):
            return None
        return self.table.row(row.labels)[column]


# --- numbers of runs


def score(training: Training, name: str = "top1") -> Cell:
    """Return a cell with a number of the last evaluation, in percent."""
    return Cell(training, lambda run: epochs_of(run.folder)[-1]["val"][name])


def quantized(training: Training, network: str, name: str = "top1") -> Cell:
    """Return a cell with a number of a form of a network: "fp32", "INT8" or "INT8, onnxruntime"; None of another."""
    return Cell(training, lambda run: json.loads(run.result.read_text())[network].get(name))


def throughput(training: Training) -> Cell:
    """Return a cell with the images per second of the deployed network."""
    return Cell(training, lambda run: json.loads(run.result.read_text())["images_per_second"], decimals=0)


def training_speed(training: Training, method: str, column: str) -> Cell:
    """Return a cell with a column of what benchmark.py has measured of "RepOpt" or "RepVGG"."""

    def value(run: ExperimentRun) -> Any:
        rows = next(iter(json.loads(run.result.read_text())["tables"].values()))
        (found,) = (row[column] for row in rows if row["training"] == method)
        return found

    return Cell(training, value, decimals=0)


def setting(training: Training, key: str) -> Cell:
    """Return what the run is configured with; what follows from the data set is known once it has begun."""

    def value(run: ExperimentRun) -> Any:
        path = run.folder / CONFIG
        return config.lookup(json.loads(path.read_text()) if path.is_file() else run.cfg, key)

    return Cell(training, value, decimals=0, ordered=False)


def kernel_std(training: Training, form: str, part: str) -> Cell:
    """Return a cell with the standard deviation of the paper's layer: "std", "central" or "surrounding"."""

    def value(run: ExperimentRun) -> float | None:
        return analyse_kernels.statistics(kernels(run)[form])[part]

    return Cell(training, value, decimals=4)


@functools.lru_cache(maxsize=8)
def kernels(run: ExperimentRun) -> Mapping[str, Tensor]:
    """Return the kernels of a trained network, by form, in the layer that the paper shows."""
    model = trained.read(run.folder / "latest.pth", run.arch).network()
    forms = analyse_kernels.forms_of(model)
    return forms[analyse_kernels.papers_layer(model, list(forms))]


# --- numbers of architectures: nothing is run


def counted(arch: str, count: Callable[[str], Any], decimals: int = 1) -> Cell:
    """Return a cell with what is counted of an architecture."""
    return Cell(arch, count, decimals, ordered=False)


@functools.cache
def network(arch: str) -> torch.nn.Module:
    """Return an architecture with 1000 classes and without numbers in it, in eval mode."""
    model, mode, _ = parse_arch(arch)
    with torch.device("meta"):
        return repopt.create_model(model, mode=mode, num_classes=1000).eval()


def parameters(arch: str) -> float:
    """Return the number of parameters with 1000 classes, in millions."""
    return sum(param.numel() for param in network(arch).parameters()) / 1e6


def deployed_parameters(arch: str) -> float:
    """Return the number of parameters after `repopt.deploy`, in millions."""
    return sum(param.numel() for param in repopt.deploy(network(arch)).parameters()) / 1e6


@functools.cache
def multiply_adds(arch: str, size: int = 224) -> float:
    """Return those of convolutions and matrix products for one image of `size` pixels, in billions."""
    images = torch.zeros(1, 3, size, size, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(arch)(images)
    return counter.get_total_flops() / 2 / 1e9


def layers(arch: str) -> list[int]:
    """Return the number of layers of every stage behind the stem."""
    model = network(arch)
    assert isinstance(model, Network)
    return [sum(1 for _ in model.get_submodule(name).children()) for name in model.stage_names[1:]]


def channels(arch: str) -> list[int]:
    """Return the number of channels of every stage behind the stem."""
    model = network(arch)
    assert isinstance(model, Network)
    return [feature["num_chs"] for feature in model.feature_info[1:]]
