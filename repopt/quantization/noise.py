"""How much noise quantization brings, and which layers stay in float because of it."""

from __future__ import annotations

import bisect
import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from typing_extensions import override

from repopt.quantization import graph as graphs
from repopt.quantization.flow import Int8, PreparedModel, convert

Layers = Mapping[fx.Node, str]  # the ends of layers, and what they are called


@torch.no_grad()
def signal_to_noise(prepared: PreparedModel, int8: Int8, images: Tensor) -> dict[str, float]:
    """Return how far the noise of quantization is below every layer's output, in dB, by the path of its module.

    A layer is a convolution or linear layer with what `convert` computes together with it; its output has the noise of
    those before it, too. Infinite where there is no noise.

    Args:
        prepared: what was converted; the signals are its own in float.
        int8: what `convert` made of it.
        images: (N, C, H, W).
    """
    return _ratios(prepared, int8, [images], alone=False)


@torch.no_grad()
def sensitivity(prepared: PreparedModel, int8: Int8, batches: Iterable[Tensor]) -> dict[str, float]:
    """Return the same as `signal_to_noise` of every layer alone, with what the float network gives it: its own noise.

    The images are seen once, for all layers.
    """
    return _ratios(prepared, int8, batches, alone=True)


def choose_float_layers(
    calibrated: Callable[[Sequence[str]], PreparedModel], batches: Iterable[Tensor], decibels: float
) -> list[str]:
    """Return as few of the most sensitive layers as it takes to have the logits so far above their noise.

    Their number is found by bisection, of networks that are quantized with so many layers in float.

    Args:
        calibrated: makes a calibrated network of which these layers stay in float.
        batches: images, which are iterated over repeatedly.
        decibels: of the last layer's output, over these images.
    """
    layers = most_sensitive(calibrated([]), batches)

    def of_logits(count: int) -> float:
        prepared = calibrated(layers[:count])
        return [*_ratios(prepared, convert(prepared), batches, alone=False).values()][-1]

    return layers[: bisect.bisect_left(range(len(layers)), decibels, key=of_logits)]


def most_sensitive(prepared: PreparedModel, batches: Iterable[Tensor]) -> list[str]:
    """Return the paths of all layers, the one with the most noise of its own first."""
    ratios = sensitivity(prepared, convert(prepared), batches)
    return sorted(ratios, key=ratios.__getitem__)


@torch.no_grad()
def _ratios(prepared: PreparedModel, int8: Int8, batches: Iterable[Tensor], *, alone: bool) -> dict[str, float]:
    prepared = copy.deepcopy(prepared).eval()
    powers: dict[str, Tensor] = {}
    for images in batches:
        signals = layer_outputs(prepared.network, images, ends_of(prepared.network))

        def add(path: str, output: Tensor, signals: Mapping[str, Tensor] = signals) -> Tensor:
            signal = signals[path]
            found = torch.stack([signal.square().sum(), (output - signal).square().sum()]).double()
            powers[path] = powers.get(path, 0) + found
            return signal.clone() if alone else output  # ReLUs may overwrite it

        run(int8.network, images, ends_of(int8.network), add)
    ratios = {path: (signal / noise).item() for path, (signal, noise) in powers.items()}
    return {path: math.inf if math.isnan(ratio) else 10 * math.log10(ratio) for path, ratio in ratios.items()}


def ends_of(graph: fx.GraphModule) -> dict[fx.Node, str]:
    """Return where layers end, with what is computed together with them, and the paths of their modules."""
    return {graphs.output_of(node): graphs.path_of(node) for node in graphs.layers(graph)}


def layer_outputs(graph: fx.GraphModule, images: Tensor, layers: Layers) -> dict[str, Tensor]:
    """Return the outputs of layers, of a prepared network in float."""
    outputs = {}

    def keep(path: str, output: Tensor) -> Tensor:
        outputs[path] = output.clone()  # ReLUs may overwrite it
        return output

    run(graph, images, layers, keep)
    return outputs


def run(graph: fx.GraphModule, images: Tensor, layers: Layers, see: Callable[[str, Tensor], Tensor]) -> None:
    """Run a prepared network in float, or one that is converted, and go on with what `see` makes of layers' outputs."""

    class Seeing(fx.Interpreter):
        @override
        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            return see(layers[n], result) if n in layers else result

        @override
        def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return args[0]  # they observe, or round as the INT8 network will

    Seeing(graph).run(images)
