"""Pictures of runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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


class Range(NamedTuple):
    """Of many numbers."""

    lowest: float
    median: float
    highest: float


def plot_accuracy(curves: Mapping[str, Curves], path: Path) -> None:
    """Top-1 (percent) by epoch: the mean over a setup's runs, and the band between its worst and best.

    Args:
        curves: by name of the setup, one {epoch: accuracy} per run.
        path: of the PNG.
    """
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for name, runs in curves.items():
        epochs = sorted(set.intersection(*(set(run) for run in runs)))
        values = np.array([[run[epoch] for epoch in epochs] for run in runs])
        (line,) = axes.plot(epochs, values.mean(0), label=f"{name} ({values.mean(0)[-1]:.1f} %)")
        axes.fill_between(epochs, values.min(0), values.max(0), color=line.get_color(), alpha=0.15, linewidth=0)
    axes.set(xlabel="epoch", ylabel="top-1 (%)", ylim=(0, 100))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
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
        path: of the PNG.
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
    top.axhline(0, color="black", linewidth=0.5)
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
    axes.plot(places, medians, "o", color="black", markersize=4, label="median")
    off = lowest < floor
    if off.any():
        axes.plot(places[off], np.full(off.sum(), floor * 1.2), "v", color="tab:gray", label=f"min below {floor:g}")
    axes.set(yscale="log", ylim=(floor, None))
