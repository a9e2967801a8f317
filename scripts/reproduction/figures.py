"""The paper's figures, drawn from runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import torch
import torchvision
from analyse_kernels import split
from plots import plot_by_depth, plot_lines, plot_weights
from runs import epochs_of
from torch import Tensor, nn

import repopt
from repopt.layers import RepConv2d
from repopt.models import parse_arch
from repopt.reparam import key_of
from reproduction.experiment import kernels
from reproduction.run import ExperimentRun

First = Mapping[str, ExperimentRun]
"""The first seed's run of what is shown, by what it is called."""

IMAGES, SIZE = 16, 224  # of the identity's share


def deployed_kernels(runs: First, path: Path) -> None:
    """Draw histograms of the kernels of the paper's layer as they are deployed (figure 3)."""
    layers = {name: dict([[*forms.items()][-1]]) for name, forms in _layers(runs).items()}
    title = "Weights of the layer that the paper shows, as deployed; a panel is as wide as the range of INT8"
    plot_weights(layers, path, title=title)


def kernels_on_their_way(runs: First, path: Path) -> None:
    """Draw the same in every form from the training to the deployment (figure 5)."""
    title = "Weights of the layer that the paper shows; a panel is as wide as the range of INT8"
    plot_weights(_layers(runs), path, title=title)


def _layers(runs: First) -> dict[str, dict[str, dict[str, Tensor]]]:
    """The weights of the paper's layer by run, form and place."""
    found = {name: kernels(run) for name, run in runs.items()}
    return {name: {form: split(k) for form, k in forms[layer].items()} for name, (layer, forms) in found.items()}


def identity_share(runs: First, path: Path) -> None:
    """The share of the identity branch in the variance of a layer, in fresh networks on normal noise (figure 4)."""
    torch.manual_seed(0)
    images = torch.randn(IMAGES, 3, SIZE, SIZE)
    model, _, _ = parse_arch("RepOpt-VGG-B1-hs")
    networks = {
        "ResNet-50": torchvision.models.resnet50(),
        "search model, scales begin at 1": repopt.create_model(model, mode="hs", initial_scales="one"),
        "search model, scales begin by depth": repopt.create_model(model, mode="hs"),
    }
    shares = {name: [*identity_shares(network, images)] for name, network in networks.items()}
    curves = {name: dict(enumerate(values, start=1)) for name, values in shares.items()}
    plot_lines({"share of the identity in the variance": curves}, path, x="layers with an identity branch, by depth")


def identity_shares(model: nn.Module, images: Tensor) -> Iterator[float]:
    """Yield the share of every layer of a ResNet or a search model that has an identity branch, by depth.

    Args:
        model: in training mode, so that its batch norms use the statistics of the images.
        images: (N, 3, H, W).
    """
    inputs, sums, block_of = dict[nn.Module, Tensor](), dict[nn.Module, Tensor](), dict[nn.Module, nn.Module]()

    def keep_input(block: nn.Module, arguments: tuple[Any, ...]) -> None:
        inputs[block] = arguments[0]

    def keep_sum(norm: nn.Module, arguments: tuple[Any, ...]) -> None:
        sums[block_of[norm]] = arguments[0]

    def add_identity(norm: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
        sums[block_of[norm]] = output + inputs[block_of[norm]]

    with ExitStack() as hooks, torch.no_grad():
        for block in model.modules():
            if isinstance(block, torchvision.models.resnet.Bottleneck) and block.downsample is None:
                norm, hook = block.bn3, block.bn3.register_forward_hook(add_identity)
            elif isinstance(block, RepConv2d) and any(branch.scale is None for branch in block.block.branches):
                norm = cast(nn.Module, block.bn)
                hook = norm.register_forward_pre_hook(keep_sum)
            else:
                continue
            block_of[norm] = block
            hooks.enter_context(hook)
            hooks.enter_context(block.register_forward_pre_hook(keep_input))
        model(images)
    for block, total in sums.items():
        yield float(_identity(block, inputs[block]).var() / total.var())


def _identity(block: nn.Module, x: Tensor) -> Tensor:
    if not isinstance(block, RepConv2d):
        return x
    (branch,) = (branch for branch in block.block.branches if branch.scale is None)
    return x * block.values(branch.kernel).detach().view(-1, 1, 1)


STAGE = "stage3"  # whose last block the paper shows


def scales_by_epoch(runs: First, path: Path) -> None:
    """The mean of the scales in the last block of the third stage, epoch by epoch (figure 6)."""
    panels: dict[str, dict[str, dict[int, float]]] = {}
    for name, run in runs.items():
        model = _search_model(run)
        block = [path for path, _ in repopt.declared_blocks(model) if path.startswith(f"{STAGE}.")][-1]
        for branch in dict(repopt.declared_blocks(model))[block].block.branches:
            key = key_of(block, branch.searched)
            curve = {epoch["epoch"]: epoch["scales"][key] for epoch in epochs_of(run.folder)}
            panels.setdefault(f"mean of {branch.searched}", {})[name] = curve
    plot_lines(panels, path, x="epoch")


def scales_by_depth(runs: First, path: Path) -> None:
    """The mean of the scales that searches ended with, block by block (figure 7)."""
    panels: dict[str, dict[str, dict[str, Sequence[float | None]]]] = {}
    layers: list[str] = []
    for name, run in runs.items():
        blocks = dict(repopt.declared_blocks(_search_model(run)))
        layers, scales = [*blocks], repopt.load_scales(run.folder / "scales.pth")
        for searched in dict.fromkeys(branch.searched for m in blocks.values() for branch in m.block.branches):
            found = [scales.get(key_of(block, searched)) for block in blocks]
            means = [None if values is None else float(values.mean()) for values in found]
            panels.setdefault(f"mean of {searched}", {})[name] = {"searched": means}
    plot_by_depth(panels, layers, path)


def _search_model(run: ExperimentRun) -> nn.Module:
    model, mode, _ = parse_arch(run.arch)
    with torch.device("meta"):
        return repopt.create_model(model, mode=mode)
