"""The paper's figures, drawn from runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torchvision
from analyse_kernels import split
from inspect_scales import search_model
from plots import plot_by_depth, plot_lines, plot_weights
from runs import epochs_of
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck

import repopt
from repopt.blocks import DeclaredBlock, key_of
from repopt.layers import RepConv2d
from repopt.models import parse_arch
from reproduction.experiment import kernels
from reproduction.run import ExperimentRun

First = Mapping[str, ExperimentRun]
"""The first seed's run of what is shown, by what it is called."""

LAYER, PANEL = "Weights of the layer that the paper shows", "a panel is as wide as the range of INT8"
IMAGES, SIZE = 16, 224  # of the identity's share
STAGE = "stage3"  # whose last block the paper shows


def deployed_kernels(runs: First, path: Path) -> None:
    """Draw histograms of the kernels of the paper's layer as they are deployed (figure 3)."""
    layers = {name: dict([[*forms.items()][-1]]) for name, forms in _layers(runs).items()}
    plot_weights(layers, path, title=f"{LAYER}, as deployed; {PANEL}")


def kernels_on_their_way(runs: First, path: Path) -> None:
    """Draw the same in every form from the training to the deployment (figure 5)."""
    plot_weights(_layers(runs), path, title=f"{LAYER}; {PANEL}")


def _layers(runs: First) -> dict[str, dict[str, dict[str, Tensor]]]:
    """Return the weights of the paper's layer by run, form and place."""
    return {name: {form: split(kernel) for form, kernel in kernels(run).items()} for name, run in runs.items()}


def identity_share(runs: First, path: Path) -> None:
    """Draw the identity branch's share in the variance of a layer, in fresh networks on normal noise (figure 4)."""
    torch.manual_seed(0)
    images = torch.randn(IMAGES, 3, SIZE, SIZE)
    model = parse_arch("RepOpt-VGG-B1-hs").model
    networks = {
        "ResNet-50": torchvision.models.resnet50(),
        "search model, scales begin at 1": repopt.create_model(model, mode="hs", initial_scales="one"),
        "search model, scales begin by depth": repopt.create_model(model, mode="hs"),
    }
    curves = {name: dict(enumerate(identity_shares(net, images), start=1)) for name, net in networks.items()}
    plot_lines({"share of the identity in the variance": curves}, path, x="layers with an identity branch, by depth")


def identity_shares(model: nn.Module, images: Tensor) -> list[float]:
    """Return the share of every layer of a ResNet or a search model that has an identity branch, by depth.

    Args:
        model: in training mode, so that its batch norms use the statistics of the images; it keeps hooks.
        images: (N, 3, H, W).
    """
    inputs, shares = dict[nn.Module, Tensor](), dict[nn.Module, float]()

    def watch(block: nn.Module, after_sum: nn.Module, scale: Tensor | float) -> None:
        def keep_input(block: nn.Module, arguments: tuple[Any, ...]) -> None:
            inputs[block] = arguments[0]

        def keep_share(_: nn.Module, arguments: tuple[Any, ...]) -> None:
            shares[block] = float((inputs[block] * scale).var() / arguments[0].var())

        block.register_forward_pre_hook(keep_input)
        after_sum.register_forward_pre_hook(keep_share)

    for block in model.modules():
        if isinstance(block, Bottleneck) and block.downsample is None:
            watch(block, block.relu, 1.0)  # its last call is that behind the sum
        elif isinstance(block, RepConv2d):
            for branch in block.block.branches:
                if branch.scale is None:  # the identity
                    assert isinstance(block.bn, nn.Module)
                    watch(block, block.bn, block.values(branch.kernel).view(-1, 1, 1))
    with torch.no_grad():
        model(images)
    return [*shares.values()]


def scales_by_epoch(runs: First, path: Path) -> None:
    """Draw the mean of the scales in the last block of the third stage, epoch by epoch (figure 6)."""
    panels: dict[str, dict[str, dict[int, float]]] = {}
    for name, run in runs.items():
        blocks = dict(repopt.declared_blocks(search_model(parse_arch(run.arch).model)))
        last = [block for block in blocks if block.startswith(f"{STAGE}.")][-1]
        for branch in blocks[last].block.branches:
            curve = {
                epoch["epoch"]: epoch["scales"][key_of(last, branch.searched_name)] for epoch in epochs_of(run.folder)
            }
            panels.setdefault(f"mean of {branch.searched_name}", {})[name] = curve
    plot_lines(panels, path, x="epoch")


def scales_by_depth(runs: First, path: Path) -> None:
    """Draw the mean of the scales that searches ended with, block by block (figure 7)."""
    panels: dict[str, dict[str, dict[str, Sequence[float | None]]]] = {}
    blocks: dict[str, DeclaredBlock] = {}
    for name, run in runs.items():
        blocks = dict(repopt.declared_blocks(search_model(parse_arch(run.arch).model)))
        scales = repopt.load_scales(run.folder / "scales.pth")
        for searched in dict.fromkeys(branch.searched_name for m in blocks.values() for branch in m.block.branches):
            found = [scales.get(key_of(block, searched)) for block in blocks]
            means = [None if values is None else float(values.mean()) for values in found]
            panels.setdefault(f"mean of {searched}", {})[name] = {"searched": means}
    plot_by_depth(panels, [*blocks], path)
