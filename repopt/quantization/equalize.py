"""Cross-layer equalization and bias correction of folded networks (Nagel et al. 2019, arXiv 1906.04721)."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from repopt.deploy import deploy
from repopt.quantization import graph as graphs
from repopt.quantization.flow import PreparedModel, convert, export_program
from repopt.quantization.noise import layer_outputs, run

# Of the largest in its layer, what the weights of a channel have to reach to be equalized: its bias grows as they do.
_NEGLIGIBLE = 1e-4
_TOLERANCE, _MAX_ROUNDS = 1e-3, 100


@torch.no_grad()
def equalize(model: nn.Module, images: Tensor) -> nn.Module:
    """Return a deployed copy, the same function, whose consecutive layers have weights of like ranges by channel.

    Where a layer, a ReLU or nothing, and a layer follow one another alone, channel i between them is divided by
    ``sqrt(r1_i / r2_i)`` and multiplied by it again; r1 and r2 are the largest weights that make and that take it. That
    goes on until nothing changes any more.

    Args:
        model: any of ours, or any that torch.export takes; it stays as it is.
        images: (N, C, H, W), of the height and width that it takes.

    Raises:
        UserError: it cannot be exported.
    """
    deployed = deploy(model)
    graph = export_program(deployed, images).module()
    pairs = [*_pairs(graph)]
    for _ in range(_MAX_ROUNDS):
        changes = [_equalize_pair(graph, *pair) for pair in pairs]
        if all(change < _TOLERANCE for change in changes):
            break
    return deployed


@torch.no_grad()
def correct_biases(prepared: PreparedModel, batches: Iterable[Tensor]) -> PreparedModel:
    """Return a copy whose INT8 layers give on average, by channel, what those of the float network give.

    The error of every layer is measured with those before it corrected. The images are seen once, for all layers; a
    layer without a bias stays as it is.

    Args:
        prepared: a calibrated network for "ptq"; it stays as it is.
        batches: images, (N, C, H, W) each, N large enough for means.
    """
    prepared, int8 = copy.deepcopy(prepared), convert(prepared)
    own, integers = ({n: graphs.path_of(n) for n in _with_bias(g)} for g in (prepared.network, int8.network))
    errors: dict[str, Tensor] = {}
    seen = 0
    for images in batches:
        signals = layer_outputs(prepared.network, images, own)

        def correct(
            path: str, output: Tensor, count: int = len(images), signals: Mapping[str, Tensor] = signals
        ) -> Any:
            channels = 1 if output.dim() == 4 else output.dim() - 1
            error = (output - signals[path]).mean([axis for axis in range(output.dim()) if axis != channels])
            errors[path] = errors.get(path, 0) + count * error
            return output - error.view(-1, *[1] * (output.dim() - 1 - channels))

        run(int8.network, images, integers, correct)
        seen += len(images)
    for node, path in own.items():
        graphs.value_of(prepared.network, graphs.argument(node, "bias")).sub_(errors[path] / seen)
    return prepared


def _with_bias(graph: fx.GraphModule) -> Iterator[fx.Node]:
    return (node for node in graphs.layers(graph) if graphs.argument(node, "bias") is not None)


def _pairs(graph: fx.GraphModule) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Yield layers that follow one another alone, with a ReLU or nothing between, of whose weights is no other use."""
    layers = [*graphs.layers(graph)]
    uses = Counter(graphs.argument(node, "weight").target for node in layers)

    def is_plain(node: fx.Node) -> bool:
        kernel = graphs.argument(node, "weight")
        return kernel.op == "get_attr" and uses[kernel.target] == 1

    for node in filter(is_plain, layers):
        end = graphs.sole_user_in(node, graphs.RELUS)
        taker = graphs.sole_user_in(end, graphs.LAYERS)
        if taker is not end and is_plain(taker) and graphs.argument(taker, "input") is end:
            yield node, taker


def _equalize_pair(graph: fx.GraphModule, maker: fx.Node, taker: fx.Node) -> float:
    """Equalize what makes and what takes the channels between two layers; return the largest change, as a logarithm."""
    first, bias, second = (
        graphs.value_of(graph, graphs.argument(node, name))
        for node, name in ((maker, "weight"), (maker, "bias"), (taker, "weight"))
    )
    groups = graphs.argument(taker, "groups") if taker.target is graphs.LAYERS[0] else 1
    by_group = second.view(groups, second.shape[0] // groups, second.shape[1], -1)
    made, taken = first.abs().flatten(1).amax(1), by_group.abs().amax((1, 3)).flatten()
    both = (made > _NEGLIGIBLE * made.max()) & (taken > _NEGLIGIBLE * taken.max())
    scale = torch.where(both, made / taken, 1).sqrt()
    first.div_(scale.view(-1, *[1] * (first.dim() - 1)))
    if bias is not None:
        bias.div_(scale)
    by_group.mul_(scale.view(groups, 1, -1, 1))
    return scale.log().abs().max().item()
