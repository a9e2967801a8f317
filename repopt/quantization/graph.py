"""Exported graphs: which operations become integers, and what torchao's graphs are mended in."""

from __future__ import annotations

import math
import operator
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torchao.quantization.pt2e import qat_utils
from torchao.quantization.pt2e import quantizer as ao
from torchao.quantization.pt2e.quantizer.quantizer import Q_ANNOTATION_KEY
from torchao.quantization.pt2e.utils import fold_bn_weights_into_conv_node
from typing_extensions import override

from repopt.errors import unknown
from repopt.quantization.presets import Preset, specs_of

_aten = torch.ops.aten
LAYERS = (_aten.conv2d.default, _aten.linear.default)
_NORMS = (_aten.batch_norm.default,)
RELUS = (_aten.relu.default, _aten.relu_.default)
# What is quantized where all that it takes is: sums with shortcuts, squeeze-and-excitation's gates and products.
_BETWEEN = (_aten.add.Tensor, _aten.add_.Tensor, _aten.mul.Tensor, _aten.hardsigmoid.default, _aten.sigmoid.default)
_TRAINING_FLAGS = {_aten.dropout.default: "train", _aten.batch_norm.default: "training"}
# In QAT torchao multiplies a kernel by the scale of its batch norm, and divides the layer's output by it again.
_QAT_RESCALE_OPS = (_aten.div.Tensor,)
# What a kernel's dequantization takes, per tensor or per channel, and how it is called below the layer's name.
_INTEGERS = {
    "input": "weight",
    "scale": "weight_scale",
    "scales": "weight_scale",
    "zero_point": "weight_zero_point",
    "zero_points": "weight_zero_point",
}


class ConvBnReluQuantizer(ao.Quantizer):
    """Marks what becomes integers: convolutions and linear layers, each with the batch norm and ReLU behind it.

    Their inputs, weights and outputs are quantized, and so are sums, products and gates of such outputs. Biases, and
    all else between, stay as they are, and so does what no layer comes after: what the network gives.

    Args:
        preset: the integers.
        float_layers: paths of layers that stay in float.
        fake: whether it is for QAT.

    Raises:
        UserError: in `annotate`; there is no such layer.
    """

    def __init__(self, preset: Preset, float_layers: Collection[str], *, fake: bool) -> None:
        super().__init__()
        self._activations, self._weights = specs_of(preset, fake=fake)
        self._float_layers = float_layers

    @override
    def annotate(self, model: fx.GraphModule) -> fx.GraphModule:
        paths = {node: path_of(node) for node in layers(model)}
        for path in self._float_layers:
            if path not in paths.values():
                raise unknown("layer", path, paths.values())
        for node in model.graph.nodes:
            if node in paths and paths[node] not in self._float_layers:
                inputs = {argument(node, "input"): self._activations, argument(node, "weight"): self._weights}
                node.meta[Q_ANNOTATION_KEY] = ao.QuantizationAnnotation(input_qspec_map=inputs, _annotated=True)
            elif not (node.target in _BETWEEN and all(map(_is_rounded, node.all_input_nodes))):
                continue
            end = pattern_end(node)
            if _leads_to_layer(end):
                annotation = end.meta.setdefault(Q_ANNOTATION_KEY, ao.QuantizationAnnotation(_annotated=True))
                annotation.output_qspec = self._activations
        return model

    @override
    def validate(self, model: fx.GraphModule) -> None:
        pass  # nothing is left to check


def _leads_to_layer(node: fx.Node) -> bool:
    """Return whether a layer takes what a node gives, or what comes of it."""
    after, seen = [*node.users], set[fx.Node]()
    while after:
        user = after.pop()
        if user.target in LAYERS:
            return True
        if user not in seen:
            seen.add(user)
            after += user.users
    return False


def _is_rounded(node: fx.Node) -> bool:
    """Return whether what a node gives is annotated to be rounded."""
    annotation = node.meta.get(Q_ANNOTATION_KEY)
    return annotation is not None and annotation.output_qspec is not None


def layers(graph: fx.GraphModule) -> Iterator[fx.Node]:
    """Yield the nodes of convolutions and linear layers."""
    yield from (node for node in graph.graph.nodes if node.target in LAYERS)


def small_layers(graph: fx.GraphModule, size: int) -> Iterator[str]:
    """Yield the paths of small layers, and of layers that are read by layers, all of them small.

    Small ones have fewer output channels than `size`, and fewer products per output: depthwise convolutions, whatever
    their channels, and others with few input channels.
    """

    def small(layer: fx.Node) -> bool:
        outputs, *products = argument(layer, "weight").meta["val"].shape
        return max(outputs, math.prod(products)) < size

    for node in layers(graph):
        readers = [user for user in pattern_end(node).users if user.target in LAYERS]
        if small(node) or (readers and all(map(small, readers))):
            yield path_of(node)


def path_of(node: fx.Node) -> str:
    """Return the path of the module whose operation a node is; of one that is used again with "@1", "@2" behind it."""
    *_, (key, (path, _)) = node.meta["nn_module_stack"].items()
    _, at, use = key.partition("@")
    return f"{path}{at}{use}"


def output_of(layer: fx.Node) -> fx.Node:
    """Return the end of what is computed together with a layer in a converted network, before it is rounded."""
    return pattern_end(sole_user_in(layer, _QAT_RESCALE_OPS))


def pattern_end(layer: fx.Node) -> fx.Node:
    """Return the end of the chain of layer, batch norm and ReLU, where the latter are there."""
    return sole_user_in(sole_user_in(layer, _NORMS), RELUS)


def sole_user_in(node: fx.Node, operations: tuple[Any, ...]) -> fx.Node:
    """Return the only user of a node, where it is one of these operations; else the node itself."""
    user = next(iter(node.users)) if len(node.users) == 1 else node
    return user if user.target in operations else node


def argument(node: fx.Node, name: str) -> Any:
    """Return an argument of an operation by its name in the schema."""
    index, default = _declared(node)[name]
    return node.args[index] if index < len(node.args) else node.kwargs.get(name, default)


def set_argument(node: fx.Node, name: str, value: Any) -> None:
    """Set an argument of an operation by its name in the schema."""
    index, _ = _declared(node)[name]
    if index < len(node.args):
        node.update_arg(index, value)
    else:
        node.update_kwarg(name, value)


def _declared(node: fx.Node) -> dict[str, tuple[int, Any]]:
    """Return the index and the default value of an operation's arguments by name."""
    declared = node.target._schema.arguments  # type: ignore[union-attr]  # of an operation it is an OpOverload
    return {item.name: (index, item.default_value) for index, item in enumerate(declared)}


def value_of(graph: fx.GraphModule, value: Any) -> Any:
    """Return a number as it is, and of a node the tensor that it stands for."""
    return operator.attrgetter(str(value.target))(graph) if isinstance(value, fx.Node) else value


def switch_training(graph: fx.GraphModule, training: bool) -> None:
    """Let dropout and batch norms do as in training, or not.

    torchao's own function for it (move_exported_model_to_eval) replaces them by ones of torch's default probability,
    momentum and epsilon.
    """
    for node in graph.graph.nodes:
        if flag := _TRAINING_FLAGS.get(node.target):
            set_argument(node, flag, training)
    graph.recompile()


def drop_batch_counts(graph: fx.GraphModule, model: nn.Module) -> None:
    """Remove the counters of batch norms: torch.export traces them to count in evaluations too, and none is read."""
    norms = [path for path, module in model.named_modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    counts = {f"{path}.num_batches_tracked" for path in norms}
    for node in graph.graph.nodes:
        if node.target is _aten.add_.Tensor and argument(node, "self").target in counts:
            graph.graph.erase_node(node)


def norm_settings(graph: fx.GraphModule) -> dict[Any, tuple[float, float]]:
    """Return momentum and epsilon of every batch norm, by the name of its running variance."""
    return {
        argument(node, "running_var").target: (argument(node, "momentum"), argument(node, "eps"))
        for node in graph.graph.nodes
        if node.target in _NORMS
    }


def restore_norm_settings(graph: fx.GraphModule, settings: dict[Any, tuple[float, float]]) -> None:
    """Undo that torchao's QAT fusion puts torch's default momentum and epsilon into batch norms."""
    for node in graph.graph.nodes:
        if node.target in _NORMS:
            momentum, epsilon = settings[argument(node, "running_var").target]
            set_argument(node, "momentum", momentum)
            set_argument(node, "eps", epsilon)
        elif node.target is _aten.add.Tensor:
            variance = getattr(argument(node, "self"), "target", None)
            if variance in settings:  # where a kernel is scaled
                set_argument(node, "other", settings[variance][1])
    graph.recompile()


@contextmanager
def two_dimensional_folding() -> Iterator[None]:
    """Let torchao fold batch norms into convolutions of two dimensions alone: here there are no others.

    It traces patterns for every kind of convolutions, for seconds, whether they occur or not.
    """
    every = qat_utils._fold_conv_bn_qat_helper

    def fold(graph: fx.GraphModule, kind: Any, *arguments: Any, **settings: Any) -> fx.GraphModule:
        return every(graph, kind, *arguments, **settings) if kind is F.conv2d else graph

    with mock.patch.object(qat_utils, "_fold_conv_bn_qat_helper", fold):
        yield


def part_norms(graph: fx.GraphModule, float_layers: Collection[str]) -> None:
    """Part batch norms from convolutions that stay in float: torchao's QAT fusion takes them for quantized ones."""
    for node in layers(graph):
        if path_of(node) in float_layers and (norm := sole_user_in(node, _NORMS)) is not node:
            with graph.graph.inserting_after(node):
                norm.replace_input_with(node, graph.graph.call_function(_aten.alias.default, (node,)))
    graph.recompile()


def join_norms(graph: fx.GraphModule, float_layers: Collection[str]) -> None:
    """Undo `part_norms`."""
    for node in layers(graph):
        if path_of(node) in float_layers and (between := sole_user_in(node, (_aten.alias.default,))) is not node:
            between.replace_all_uses_with(node)
            graph.graph.erase_node(between)
    graph.recompile()


def part_biases(graph: fx.GraphModule) -> None:
    """Give layers of one module, which is used repeatedly, biases of their own, which each changes otherwise."""
    for node in layers(graph):
        path, _, use = path_of(node).partition("@")
        bias = argument(node, "bias")
        if not use or bias is None or bias.target.endswith(f"@{use}"):
            continue
        name = f"bias@{use}"
        graph.get_submodule(path).register_buffer(name, value_of(graph, bias).detach().clone())
        with graph.graph.inserting_before(node):
            set_argument(node, "bias", graph.graph.get_attr(f"{path}.{name}"))
    graph.recompile()


def finish_conversion(graph: fx.GraphModule) -> None:
    """Round biases, drop the float kernels that torchao leaves behind, and give the integers the layers' names.

    Batch norms of layers that stay in float are folded, as torchao folds the others.
    """
    part_biases(graph)
    for node in layers(graph):
        kernel, bias = argument(node, "weight"), argument(node, "bias")
        if not _has_integers(node):
            if node.target is _aten.conv2d.default and (norm := sole_user_in(node, _NORMS)) is not node:
                fold_bn_weights_into_conv_node(node, kernel, bias, norm, graph)
        elif bias is not None:
            widen_steps(graph, node)
            round_bias(graph, node)
    graph.graph.eliminate_dead_code()
    used = {node.target for node in graph.graph.nodes if node.op == "get_attr"}
    for name in [name for name in graph.state_dict() if name not in used]:
        _delete(graph, name)
    for node in filter(_has_integers, layers(graph)):
        kernel = argument(node, "weight")
        path, at, use = path_of(node).partition("@")
        for name in _declared(kernel):
            source = argument(kernel, name)
            if name in _INTEGERS and isinstance(source, fx.Node):  # else it is a number
                value, own = value_of(graph, source), f"{_INTEGERS[name]}{at}{use}"
                _delete(graph, str(source.target))
                graph.get_submodule(path).register_buffer(own, value)
                source.target = f"{path}.{own}"
    graph.delete_all_unused_submodules()
    graph.recompile()


def _has_integers(layer: fx.Node) -> bool:
    """Return whether a converted layer's weights are integers."""
    kernel = argument(layer, "weight")
    return kernel.op == "call_function" and "quant_min" in _declared(kernel)


def widen_steps(graph: fx.GraphModule, layer: fx.Node) -> None:
    """Let the steps of a kernel (almost) without weights be such that its bias is an integer of 32 bits of them."""
    kernel, bias = argument(layer, "weight"), value_of(graph, argument(layer, "bias"))
    growth = (bias / _bias_step(graph, layer)).abs().div(2**30).clamp(min=1)
    integers, (name, scale) = value_of(graph, argument(kernel, "input")), _scale_of(graph, kernel)
    if isinstance(scale, Tensor):  # by channel
        scale.mul_(growth)
        growth = growth.view(-1, *[1] * (integers.dim() - 1))
    else:
        growth = growth.max()
        set_argument(kernel, name, scale * growth.item())
    integers.copy_((integers / growth).round())


def round_bias(graph: fx.GraphModule, layer: fx.Node) -> None:
    """Let a bias be what integer arithmetic makes of it, a multiple of an input's scale times a weight's.

    torchao leaves it in float; onnxruntime and TensorRT add it to the sums of products as an integer of 32 bits.
    """
    bias, step = value_of(graph, argument(layer, "bias")), _bias_step(graph, layer)
    bias.copy_((bias / step).round() * step)


def _bias_step(graph: fx.GraphModule, layer: fx.Node) -> Any:
    """Return what the integers of a layer's sums of products stand for."""
    _, scale = _scale_of(graph, argument(layer, "weight"))
    return argument(argument(layer, "input"), "scale") * scale


def _scale_of(graph: fx.GraphModule, kernel: fx.Node) -> tuple[str, Any]:
    """Return what a kernel's scale is called, and the scale: a number, or one per channel."""
    name = "scales" if "scales" in _declared(kernel) else "scale"
    return name, value_of(graph, argument(kernel, name))


def _delete(graph: fx.GraphModule, name: str) -> None:
    path, _, leaf = name.rpartition(".")
    delattr(graph.get_submodule(path), leaf)
