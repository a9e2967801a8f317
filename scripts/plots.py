"""Pictures of runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # files, no windows
import matplotlib.pyplot as plt
import numpy as np
from torch import Tensor, nn

import repopt

Curves = Sequence[Mapping[int, float]]


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


def plot_scales(model: nn.Module, scales: Mapping[str, Tensor], path: Path) -> None:
    """Searched scales by depth: mean and standard deviation over the channels of every block, a line per branch.

    Args:
        model: that the scales belong to, in any mode of declared blocks.
        scales: (O,) each, by name, as `repopt.load_scales` gives them.
        path: of the PNG.
    """
    scales = repopt.fit_scales(model, scales)
    blocks, by_branch = [], {}
    for place, (block, module) in enumerate(repopt.declared_blocks(model)):
        blocks.append(block)
        for branch in module.block.branches:
            by_branch.setdefault(branch.searched, {})[place] = scales[f"{block}.{branch.searched}.weight"]
    figure, axes = plt.subplots(figsize=(max(6.0, 0.32 * len(blocks)), 4.2), layout="constrained")
    for branch, here in by_branch.items():
        means = [float(values.mean()) for values in here.values()]
        deviations = [float(values.std()) for values in here.values()]
        axes.errorbar(list(here), means, deviations, label=branch, marker="o", markersize=4, capsize=2, linewidth=1)
    axes.axhline(0, color="black", linewidth=0.5)
    axes.set(ylabel="searched scale (mean ± std over channels)")
    axes.set_xticks(range(len(blocks)), blocks, rotation=90, fontsize=8)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)
