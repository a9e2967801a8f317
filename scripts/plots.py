"""Pictures of runs, as files or as a part of a page."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")  # files, no windows
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from torch import Tensor, nn

import repopt
from repopt.reparam import key_of

Curves = Sequence[Mapping[int, float]]
Size = tuple[float, float]


class Range(NamedTuple):
    """Of many numbers."""

    lowest: float
    median: float
    highest: float


def plot_scores(curves: Mapping[str, Curves], path: Path, *, measure: str, size: Size = (7, 4.2)) -> None:
    """A score (percent) by epoch: the mean over a setup's runs, and the band between its worst and best.

    Args:
        curves: by name of the setup, one {epoch: score} per run.
        measure: the score's name.
        path: of the picture, whose suffix is its format.
        size: in inches.
    """
    figure, axes = plt.subplots(figsize=size, layout="constrained")
    for index, (name, runs) in enumerate(curves.items()):
        epochs = sorted(set.intersection(*(set(run) for run in runs)))
        values = np.array([[run[epoch] for epoch in epochs] for run in runs])
        color, style = _series(index)
        axes.plot(epochs, values.mean(0), style, color=color, label=f"{name} ({values.mean(0)[-1]:.1f} %)")
        axes.fill_between(epochs, values.min(0), values.max(0), color=color, alpha=0.15, linewidth=0)
    axes.set(xlabel="epoch", ylabel=f"{measure} (%)", ylim=(0, 100))
    axes.grid(alpha=0.3)
    if len(curves) <= 4:
        axes.legend(loc="lower right")
    else:  # it would hide the curves
        figure.legend(loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _series(index: int) -> tuple[str, str]:
    """The colour and the line of the n-th of many series; the colours come again, with other lines."""
    return f"C{index % 10}", ("-", "--", ":", "-.")[index // 10 % 4]


def plot_lines(
    panels: Mapping[str, Mapping[str, Mapping[int, float | None]]], path: Path, *, x: str, size: Size | None = None
) -> None:
    """Curves over steps, epochs or the like: a panel per quantity, one below the other.

    Args:
        panels: by quantity and name of the line, {place: number}; None is a gap. A line without a name is not in the
            legend.
        path: of the picture, whose suffix is its format.
        x: what the places are.
        size: in inches.
    """
    size = size or (7, 1.6 + 2.1 * len(panels))
    figure, column = plt.subplots(len(panels), figsize=size, layout="constrained", sharex=True, squeeze=False)
    named = {}
    for axes, (quantity, curves) in zip(column[:, 0], panels.items(), strict=True):
        for index, (name, curve) in enumerate(curves.items()):
            color, style = _series(index)
            mark = "." if len(curve) == 1 else None
            (line,) = axes.plot([*curve], np.array([*curve.values()], dtype=float), style, color=color, marker=mark)
            if name:
                named.setdefault(name, line)
        axes.set(ylabel=quantity)
        axes.grid(alpha=0.3)
    column[-1, 0].set(xlabel=x)
    figure.align_ylabels()
    if named:
        figure.legend(named.values(), named, loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_scales_by_epoch(
    curves: Mapping[str, Mapping[str, Mapping[int, float]]], path: Path, *, size: Size = (7, 4.2)
) -> None:
    """How the mean scale of every block moved away from what was first recorded: a panel per branch, a line per block.

    Args:
        curves: by branch and block, in the order of depth, {epoch: mean over the channels}.
        path: of the picture, whose suffix is its format.
        size: in inches.
    """
    figure, panels = plt.subplots(
        1, len(curves), figsize=size, layout="constrained", sharex=True, sharey=True, squeeze=False
    )
    for index, (axes, (branch, blocks)) in enumerate(zip(panels[0], curves.items(), strict=True)):
        for depth, curve in enumerate(blocks.values(), start=1):
            first = next(iter(curve.values()), 0)
            moved = [value - first for value in curve.values()]
            axes.plot([*curve], moved, color=f"C{index}", alpha=0.15 + 0.85 * depth / len(blocks), linewidth=1)
        axes.axhline(0, color=plt.rcParams["text.color"], linewidth=0.5)
        axes.set_title(branch, fontsize="medium")
        axes.set(xlabel="epoch")
        axes.grid(alpha=0.3)
    panels[0, 0].set(ylabel="change of the mean scale")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_scales(
    model: nn.Module,
    scales: Mapping[str, Tensor],
    path: Path,
    *,
    mults: Mapping[str, Sequence[Range]] | None = None,
    title: str = "",
) -> None:
    """Searched scales by depth: mean and standard deviation over the channels of every block, a line per branch.

    Args:
        model: that the scales belong to, in any mode of declared blocks.
        scales: (O,) each, by name, as `repopt.load_scales` gives them.
        path: of the picture, whose suffix is its format.
        mults: by the name of an update rule, the range of every block's Grad Mult in the order of the blocks: a panel
            per rule below the scales.
        title: above the panels.
    """
    scales, mults = repopt.fit_scales(model, scales), mults or {}
    modules = dict(repopt.declared_blocks(model))
    size = (max(6.0, 0.3 * len(modules)), 4.2 + 2.6 * len(mults))
    figure, panels = plt.subplots(1 + len(mults), figsize=size, layout="constrained", sharex=True, squeeze=False)
    top, *below = panels[:, 0]
    for branch in dict.fromkeys(branch.searched for m in modules.values() for branch in m.block.branches):
        values = [scales.get(key_of(block, branch), torch.tensor([torch.nan])) for block in modules]  # nan: a gap
        means, deviations = np.array([(float(v.mean()), float(v.std(correction=0))) for v in values]).T
        (line,) = top.plot(means, label=branch, marker="o", markersize=4, linewidth=1)
        band = (means - deviations, means + deviations)
        top.fill_between(range(len(modules)), *band, color=line.get_color(), alpha=0.15, linewidth=0)
        top.vlines(range(len(modules)), *band, color=line.get_color(), alpha=0.4, linewidth=1)  # a block by itself too
    top.axhline(0, color=plt.rcParams["text.color"], linewidth=0.5)
    top.set(ylabel="searched scale, mean ± std", xlim=(-0.7, len(modules) - 0.3))
    for axes, (rule, ranges) in zip(below, mults.items(), strict=True):
        _draw_ranges(axes, ranges)
        axes.set(ylabel=f"Grad Mult, {rule}")
    for axes in panels[:, 0]:
        axes.grid(alpha=0.3)
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=3, frameon=False)  # above, where it hides nothing
    figure.suptitle(title, fontsize=11)
    panels[-1, 0].set_xticks(range(len(modules)), modules, rotation=90, fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _draw_ranges(axes: Axes, ranges: Sequence[Range]) -> None:
    """From the lowest to the highest entry with the median between, on a log scale that does not follow the lowest.

    A few scales next to zero would take most of the height; their lines leave the panel at an arrow.
    """
    lowest, medians, highest = np.array(ranges).T
    floor = max(lowest.min() / 1.5, 10.0 ** np.floor(np.log10(max(medians.min(), 1e-12)) - 1))
    places = np.arange(len(ranges))
    axes.vlines(places, np.maximum(lowest, floor), highest, color="tab:gray", linewidth=2, label="min to max")
    axes.plot(places, medians, "o", color=plt.rcParams["text.color"], markersize=4, label="median")
    off = lowest < floor
    if off.any():
        axes.plot(places[off], np.full(off.sum(), floor * 1.2), "v", color="tab:gray", label=f"min below {floor:g}")
    axes.set(yscale="log", ylim=(floor, None))


def plot_weights(weights: Mapping[str, Mapping[str, Mapping[str, Tensor]]], path: Path, *, title: str = "") -> None:
    """Histograms of a kernel's weights, counts on a log scale, over the range that one INT8 scale per tensor covers.

    Args:
        weights: by network (a row of panels) and form of the kernel (a panel), the parts of the kernel by name: tensors
            of any shape, drawn over each other.
        path: of the picture, whose suffix is its format.
        title: above the panels.
    """
    columns = max(map(len, weights.values()))
    size = (max(6.0, 3.4 * columns), 0.9 + 2.5 * len(weights))
    figure, panels = plt.subplots(len(weights), columns, figsize=size, layout="constrained", sharey=True, squeeze=False)
    for row, (network, forms) in zip(panels, weights.items(), strict=True):
        row[0].set(ylabel=f"{network}\nnumber of weights")
        for axes, (form, parts) in zip(row, forms.items(), strict=False):
            highest = max(float(part.abs().max()) for part in parts.values()) or 1.0
            bins = np.linspace(-highest, highest, 52)  # an odd number of bins: one around zero
            for name, part in parts.items():
                axes.hist(part.flatten().numpy(), bins=bins, histtype="stepfilled", alpha=0.55, label=name)
            axes.set(yscale="log", xlim=(-highest, highest))
            axes.set_title(form, fontsize=10)
            axes.tick_params(labelsize=8)
            axes.locator_params(axis="x", nbins=5)
            axes.grid(alpha=0.3)
        for axes in row[len(forms) :]:
            axes.set_axis_off()
    handles, names = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(names), frameon=False)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_by_depth(
    panels: Mapping[str, Mapping[str, Mapping[str, Sequence[float | None]]]],
    layers: Sequence[str],
    path: Path,
    *,
    log: Container[str] = (),
) -> None:
    """Numbers of every layer, a panel per quantity: a colour per network, and a solid line for its last form.

    Args:
        panels: by quantity, network and form of the kernel, a number per layer. None, infinities, and what has
            no place on a log scale are gaps.
        layers: names, in their order.
        path: of the picture, whose suffix is its format.
        log: quantities that have a log scale.
    """
    size = (max(8.0, 0.3 * len(layers)), 1.6 + 2.1 * len(panels))
    figure, column = plt.subplots(len(panels), 1, figsize=size, layout="constrained", sharex=True, squeeze=False)
    for axes, (quantity, networks) in zip(column[:, 0], panels.items(), strict=True):
        for index, (network, forms) in enumerate(networks.items()):
            styles = ["-", "--", ":", "-."][: len(forms)][::-1]
            for style, (form, values) in zip(styles, forms.items(), strict=True):
                numbers = np.array(values, dtype=float)
                numbers[np.isinf(numbers) | ((quantity in log) & (numbers <= 0))] = np.nan
                axes.plot(numbers, style, color=f"C{index}", marker="o", markersize=3, label=f"{network}: {form}")
        axes.set(ylabel=quantity, xlim=(-0.7, len(layers) - 0.3))
        if quantity in log and np.isfinite(axes.dataLim.intervaly).all():  # nothing drawn has no log scale
            axes.set(yscale="log")
        axes.grid(alpha=0.3)
    figure.legend(*column[0, 0].get_legend_handles_labels(), loc="outside upper center", frameon=False)
    column[-1, 0].set_xticks(range(len(layers)), layers, rotation=90, fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)
