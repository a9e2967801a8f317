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

_PROJECTIONS = 8  # of every output for every image: over 300 digits the error of layers' ratios is about 0.4 dB


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
    signals, noisy = (layer_outputs(graph, images, ends_of(graph)) for graph in (_in_float(prepared), int8.network))
    return {
        path: _decibels(_relative(_power(noisy[path] - signal), _power(signal))) for path, signal in signals.items()
    }


@torch.no_grad()
def outputs_signal_to_noise(prepared: PreparedModel, int8: Int8, batches: Iterable[Tensor]) -> float:
    """Return how far the noise of quantization is below the network's output, in dB; of several the one with the most.

    Args:
        prepared: what was converted; the signals are its own in float.
        int8: what `convert` made of it.
        batches: images, (N, C, H, W) each.
    """
    networks = _in_float(prepared), int8.network
    by_batch = []
    for images in batches:
        pairs = zip(*(run(network, images, {}, lambda _, output: output) for network in networks), strict=True)
        by_batch.append(torch.stack([torch.stack([_power(signal), _power(noisy - signal)]) for signal, noisy in pairs]))
    return min(_decibels(_relative(noise, signal)) for signal, noise in torch.stack(by_batch).sum(0))


@torch.no_grad()
def sensitivity(prepared: PreparedModel, int8: Int8, batches: Iterable[Tensor]) -> dict[str, float]:
    """Return how far the noise because of each layer alone is below the network's outputs, in dB, by its module's path.

    A layer's own noise e is what INT8 adds to its output where its input is the float network's. With the derivative J
    of an output of the network by the layer's, the noise there is J e to first order. Its power |J e|^2 is the mean of
    <J^T r, e>^2 over random signs r, for each of which one backward pass does for all layers. Of several outputs (a
    tuple, a dict) the noises, each relative to the power of its output, are averaged.

    Args:
        prepared: what was converted; the signals are its own in float.
        int8: what `convert` made of it.
        batches: images, (N, C, H, W) each, none of which changes what the network makes of another; seen once.
    """
    graph, random = _in_float(prepared), torch.Generator().manual_seed(0)
    by_batch = [_noise_of_layers(graph, int8.network, images, random) for images in batches]
    signal, noise = (torch.stack(powers).sum(0) for powers in zip(*by_batch, strict=True))
    relative = _relative(noise, signal).mean(1)
    return dict(zip(ends_of(graph).values(), map(_decibels, relative), strict=True))


def choose_float_layers(
    calibrated: Callable[[Sequence[str]], PreparedModel], batches: Iterable[Tensor], decibels: float
) -> list[str]:
    """Return as few of the most sensitive layers as it takes to have the network's outputs so far above their noise.

    Their number is found by bisection, of networks that are quantized with so many layers in float.

    Args:
        calibrated: makes a calibrated network of which these layers stay in float.
        batches: images, which are iterated over repeatedly.
        decibels: of the output, over these images; of several that of the one with the most noise.
    """

    def of_outputs(prepared: PreparedModel) -> float:
        return outputs_signal_to_noise(prepared, convert(prepared), batches)

    without = calibrated([])
    if of_outputs(without) >= decibels:
        return []
    layers = most_sensitive(without, batches)
    counts = range(1, len(layers))
    return layers[: 1 + bisect.bisect_left(counts, decibels, key=lambda count: of_outputs(calibrated(layers[:count])))]


def most_sensitive(prepared: PreparedModel, batches: Iterable[Tensor]) -> list[str]:
    """Return the paths of all layers, the one whose own noise does most to the network's outputs first."""
    ratios = sensitivity(prepared, convert(prepared), batches)
    return sorted(ratios, key=ratios.__getitem__)


def _noise_of_layers(
    graph: fx.GraphModule, int8: fx.GraphModule, images: Tensor, random: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Return the powers of the network's outputs, (outputs), and of layers' noises in them, (layers, outputs)."""
    signals: dict[str, Tensor] = {}
    noises: dict[str, Tensor] = {}

    def keep(path: str, output: Tensor) -> Tensor:
        signals[path] = output.requires_grad_()
        return output.clone()  # ReLUs may overwrite it

    def compare(path: str, output: Tensor) -> Tensor:
        noises[path] = output - signals[path]
        return signals[path].clone()

    with torch.enable_grad():
        outputs = [output for output in run(graph, images, ends_of(graph), keep) if output.requires_grad]
    run(int8, images, ends_of(int8), compare)

    def project(output: Tensor) -> Tensor:
        signs = torch.randint(2, output.shape, generator=random).to(output) * 2 - 1
        gradients = torch.autograd.grad(output, [*signals.values()], signs, retain_graph=True, materialize_grads=True)
        by_layer = zip(gradients, (noises[path] for path in signals), strict=True)
        return torch.stack([_power((gradient * noise).reshape(len(images), -1).sum(1)) for gradient, noise in by_layer])

    found = [torch.stack([project(output) for _ in range(_PROJECTIONS)]).mean(0) for output in outputs]
    return torch.stack([_power(output) for output in outputs]), torch.stack(found, 1)


def _in_float(prepared: PreparedModel) -> fx.GraphModule:
    """Return the graph of a copy as it evaluates, for `run`."""
    return copy.deepcopy(prepared).eval().network


def _power(values: Tensor) -> Tensor:
    return values.square().sum().double()


def _relative(noise: Tensor, signal: Tensor) -> Tensor:
    """Return the power of noise relative to that of its signal, 0 where there is neither."""
    return (noise / signal).nan_to_num(posinf=math.inf)


def _decibels(relative: Tensor) -> float:
    """Return how far noise is below its signal, in dB."""
    return -10 * relative.log10().item()


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


def run(
    graph: fx.GraphModule, images: Tensor, layers: Layers, see: Callable[[str, Tensor], Tensor]
) -> Sequence[Tensor]:
    """Run a prepared network in float, or one that is converted, and go on with what `see` makes of layers' outputs.

    Returns what the network gives, the tensors of a tuple or a dict one after another.
    """

    class Seeing(fx.Interpreter):
        @override
        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            return see(layers[n], result) if n in layers else result

        @override
        def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return args[0]  # they observe, or round as the INT8 network will

    return Seeing(graph).run(images, enable_io_processing=False)
