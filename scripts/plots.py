"""Pictures of runs, scales and kernels as files; the suffix of a path is the picture's format."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor, nn

import repopt
from repopt.blocks import key_of


class Range(NamedTuple):
    """The lowest, the median and the highest of many numbers."""

    lowest: float
    median: float
    highest: float


def _subplots(rows: int, columns: int, size: tuple[float, float], **options: Any) -> tuple[Figure, np.ndarray]:
    """Return a figure of `size` inches, which no window shows, and its axes (rows, columns), all with a grid."""
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, **options)
    for axes in panels.flat:
        axes.grid(alpha=0.3)
    return figure, panels


def _name_blocks(axes: Axes, names: Sequence[str]) -> None:
    """Label the x axis with the names of blocks by depth."""
    axes.set(xlim=(-0.7, len(names) - 0.3))
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=8)


def _series(index: int) -> dict[str, str]:
    """Return the colour and the line style of the n-th of many lines; after ten colours the style changes."""
    return {"color": f"C{index % 10}", "linestyle": ("-", "--", ":", "-.")[index // 10 % 4]}


def plot_scores(curves: Mapping[str, Sequence[Mapping[int, float]]], path: Path, *, measure: str) -> None:
    """Draw a score (percent) by epoch: the mean over a setup's runs, and the band between its worst and best.

    Args:
        curves: by name of the setup, one {epoch: score} per run.
        path: of the picture.
        measure: the score's name.
    """
    figure, ((axes,),) = _subplots(1, 1, (7, 4.2))
    for index, (name, runs) in enumerate(curves.items()):
        epochs = sorted(set.intersection(*(set(run) for run in runs)))
        values = np.array([[run[epoch] for epoch in epochs] for run in runs])
        (line,) = axes.plot(epochs, values.mean(0), **_series(index), label=f"{name} ({values.mean(0)[-1]:.1f} %)")
        axes.fill_between(epochs, values.min(0), values.max(0), color=line.get_color(), alpha=0.15, linewidth=0)
    axes.set(xlabel="epoch", ylabel=f"{measure} (%)", ylim=(0, 100))
    if len(curves) <= 4:
        axes.legend(loc="lower right")
    else:  # it would hide the curves
        figure.legend(loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(path, dpi=150)


def plot_values(values: Mapping[str, Sequence[float]], path: Path, *, measure: str) -> None:
    """Draw what several runs of each setup gave, a dot each, and their mean as a line across.

    Args:
        values: by name of the setup.
        path: of the picture.
        measure: what they are.
    """
    figure, ((axes,),) = _subplots(1, 1, (7, 0.8 + 0.32 * len(values)))
    for place, numbers in enumerate(values.values()):
        axes.plot(numbers, [place] * len(numbers), "o", color="C0", alpha=0.5)
        axes.plot([np.mean(numbers)] * 2, [place - 0.35, place + 0.35], color="C1", linewidth=2)
    axes.set(xlabel=measure)
    axes.set_yticks(range(len(values)), [*values])
    axes.invert_yaxis()
    figure.savefig(path, dpi=150)


def plot_lines(panels: Mapping[str, Mapping[str, Mapping[int, float | None]]], path: Path, *, x: str) -> None:
    """Draw curves over steps, epochs or the like: a panel per quantity, one below the other.

    Args:
        panels: by quantity and name of the line, {place: number}; None is a gap. A line without a name is not in the
            legend.
        path: of the picture.
        x: what the places are.
    """
    figure, column = _subplots(len(panels), 1, (7, 1.6 + 2.1 * len(panels)), sharex=True)
    named: dict[str, Line2D] = {}
    for axes, (quantity, curves) in zip(column[:, 0], panels.items(), strict=True):
        for index, (name, curve) in enumerate(curves.items()):
            values = np.array([*curve.values()], dtype=float)
            (line,) = axes.plot([*curve], values, **_series(index), marker="." if len(curve) == 1 else None)
            if name:
                named.setdefault(name, line)
        axes.set(ylabel=quantity)
    column[-1, 0].set(xlabel=x)
    figure.align_ylabels()
    if named:
        figure.legend([*named.values()], [*named], loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(path, dpi=150)


def plot_by_rate(panels: Mapping[tuple[str, str], Mapping[str, Mapping[float, Sequence[float]]]], path: Path) -> None:
    """Draw the top-1 accuracy by learning rate: a line of means for each way of training, and a dot for each run.

    Args:
        panels: by row and column; the runs of each way and rate, in percent.
        path: of the picture.
    """
    rows, columns = ([*dict.fromkeys(names)] for names in zip(*panels, strict=True))
    size = (0.6 + 2.4 * len(columns), 0.8 + 2.2 * len(rows))
    figure, grid = _subplots(len(rows), len(columns), size, sharex=True, sharey="row")
    lines: dict[str, Line2D] = {}
    for (row, column), ways in panels.items():
        axes = grid[rows.index(row), columns.index(column)]
        rates = sorted(set().union(*ways.values()))
        for index, (way, runs) in enumerate(ways.items()):
            (lines[way],) = axes.plot(sorted(runs), [np.mean(runs[rate]) for rate in sorted(runs)], **_series(index))
            for rate in runs:
                axes.plot([rate] * len(runs[rate]), runs[rate], ".", color=_series(index)["color"], alpha=0.5)
        axes.set(xscale="log", xticks=rates, xticklabels=[f"{rate:g}" for rate in rates])
        axes.minorticks_off()
        if row == rows[0]:
            axes.set_title(column, fontsize="medium")
        if row == rows[-1]:
            axes.set(xlabel="learning rate")
        if column == columns[0]:
            axes.set(ylabel=f"top-1 on {row} (%)")
    figure.legend([*lines.values()], [*lines], loc="outside lower center", ncols=len(lines), frameon=False)
    figure.savefig(path, dpi=150)


def plot_scales_by_epoch(curves: Mapping[str, Mapping[str, Mapping[int, float]]], path: Path) -> None:
    """Draw how the mean scale of every block moved away from what was first recorded.

    Args:
        curves: by branch (a panel) and block (a line, the deeper the stronger), the mean scale by epoch.
        path: of the picture.
    """
    figure, panels = _subplots(1, len(curves), (8.4, 3), sharey=True)
    for index, (axes, (branch, blocks)) in enumerate(zip(panels[0], curves.items(), strict=True)):
        for depth, curve in enumerate(blocks.values(), start=1):
            first = next(iter(curve.values()), 0)
            moved = [value - first for value in curve.values()]
            axes.plot([*curve], moved, color=f"C{index}", alpha=0.15 + 0.85 * depth / len(blocks), linewidth=1)
        axes.axhline(0, color="black", linewidth=0.5)
        axes.set_title(branch, fontsize="medium")
        axes.set(xlabel="epoch")
    panels[0, 0].set(ylabel="change of the mean scale")
    figure.savefig(path, dpi=150)


def plot_scales(
    model: nn.Module,
    scales: Mapping[str, Tensor],
    path: Path,
    *,
    start: Mapping[str, Tensor] | None = None,
    mults: Mapping[str, Sequence[Range]] | None = None,
    title: str = "",
) -> None:
    """Draw searched scales by depth: mean and standard deviation over a block's channels, a line per branch.

    Args:
        model: that the scales belong to, in any mode of declared blocks.
        scales: (O,) each, by name, as `repopt.load_scales` gives them.
        path: of the picture.
        start: (O,) each, by name, where the search began: dotted lines.
        mults: by the name of an update rule, the range of every block's Grad Mult in the order of the blocks: a panel
            per rule below the scales.
        title: above the panels.
    """
    scales, start, mults = repopt.bind(model, scales).scales, start or {}, mults or {}
    modules = dict(repopt.declared_blocks(model))
    size = (max(6.0, 0.3 * len(modules)), 4.2 + 2.6 * len(mults))
    figure, panels = _subplots(1 + len(mults), 1, size, sharex=True)
    top, *below = panels[:, 0]
    for branch in dict.fromkeys(branch.searched_name for m in modules.values() for branch in m.block.branches):
        gap = torch.tensor([torch.nan])
        values, began = ([of.get(key_of(block, branch), gap) for block in modules] for of in (scales, start))
        means, deviations = np.array([(float(v.mean()), float(v.std(correction=0))) for v in values]).T
        (line,) = top.plot(means, label=branch, marker="o", markersize=4, linewidth=1)
        top.plot([float(v.mean()) for v in began], color=line.get_color(), linestyle=":", linewidth=1)
        band = (means - deviations, means + deviations)
        top.fill_between(range(len(modules)), *band, color=line.get_color(), alpha=0.15, linewidth=0)
        top.vlines(range(len(modules)), *band, color=line.get_color(), alpha=0.4, linewidth=1)  # a block by itself too
    top.axhline(0, color="black", linewidth=0.5)
    top.set(ylabel="searched scale, mean ± std" + ("\n(dotted: the start)" if start else ""))
    for axes, (rule, ranges) in zip(below, mults.items(), strict=True):
        _draw_ranges(axes, ranges)
        axes.set(ylabel=f"Grad Mult, {rule}")
    for axes in panels[:, 0]:
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=3, frameon=False)  # above, where it hides nothing
    figure.suptitle(title, fontsize=11)
    _name_blocks(panels[-1, 0], [*modules])
    figure.savefig(path, dpi=150)


def _draw_ranges(axes: Axes, ranges: Sequence[Range]) -> None:
    """Draw lines from the lowest to the highest entry, the medians on them, on a log scale.

    The scale does not follow the lowest entries: a few scales next to zero would take most of the height. Their lines
    leave the panel at an arrow.
    """
    lowest, medians, highest = np.array(ranges).T
    floor = max(lowest.min() / 1.5, 10.0 ** np.floor(np.log10(max(medians.min(), 1e-12)) - 1))
    places = np.arange(len(ranges))
    axes.vlines(places, np.maximum(lowest, floor), highest, color="tab:gray", linewidth=2, label="min to max")
    axes.plot(places, medians, "o", color="black", markersize=4, label="median")
    off = lowest < floor
    if off.any():
        axes.plot(places[off], np.full(off.sum(), floor * 1.2), "v", color="tab:gray", label=f"min below {floor:g}")
    axes.set(yscale="log", ylim=(floor, None))


def plot_weights(weights: Mapping[str, Mapping[str, Mapping[str, Tensor]]], path: Path, *, title: str = "") -> None:
    """Draw histograms of a kernel's weights, counts on a log scale, over the range of one INT8 scale per tensor.

    Args:
        weights: by network (a row of panels) and form of the kernel (a panel), the parts of the kernel by name: tensors
            of any shape, drawn over each other.
        path: of the picture.
        title: above the panels.
    """
    columns = max(map(len, weights.values()))
    size = (max(6.0, 3.4 * columns), 0.9 + 2.5 * len(weights))
    figure, panels = _subplots(len(weights), columns, size, sharey=True)
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
        for axes in row[len(forms) :]:
            axes.set_axis_off()
    handles, names = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(names), frameon=False)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=150)


def plot_by_depth(
    panels: Mapping[str, Mapping[str, Mapping[str, Sequence[float | None]]]],
    layers: Sequence[str],
    path: Path,
    *,
    log: Container[str] = (),
) -> None:
    """Draw numbers of every layer, a panel per quantity: a colour per network, and a solid line for its last form.

    Args:
        panels: by quantity, network and form of the kernel, a number per layer. None, infinities, and what has
            no place on a log scale are gaps.
        layers: names, in their order.
        path: of the picture.
        log: quantities that have a log scale.
    """
    figure, column = _subplots(len(panels), 1, (max(8.0, 0.3 * len(layers)), 1.6 + 2.1 * len(panels)), sharex=True)
    for axes, (quantity, networks) in zip(column[:, 0], panels.items(), strict=True):
        for index, (network, forms) in enumerate(networks.items()):
            styles = ["-", "--", ":", "-."][: len(forms)][::-1]
            for style, (form, values) in zip(styles, forms.items(), strict=True):
                numbers = np.array(values, dtype=float)
                numbers[np.isinf(numbers) | ((quantity in log) & (numbers <= 0))] = np.nan
                axes.plot(numbers, style, color=f"C{index}", marker="o", markersize=3, label=f"{network}: {form}")
        axes.set(ylabel=quantity)
        if quantity in log and np.isfinite(axes.dataLim.intervaly).all():  # nothing drawn has no log scale
            axes.set(yscale="log")
    figure.legend(*column[0, 0].get_legend_handles_labels(), loc="outside upper center", frameon=False)
    _name_blocks(column[-1, 0], layers)
    figure.savefig(path, dpi=150)
