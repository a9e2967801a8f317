"""INT8 by torchao's PT2E flow: post-training quantization (PTQ) and quantization-aware training (QAT).

    observed = prepare(model, images, "ptq", "default")
    calibrate(observed, batches)  # and after "qat", train it
    int8 = convert(observed)

All that is known of torchao stands here. It is an extra: requirements-deploy.txt.
"""

from __future__ import annotations

import copy
import logging
import math
import operator
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim

from repopt.checkpoint import load_weights
from repopt.deploy import deploy
from repopt.errors import UserError, one_line, unknown
from repopt.layers import Around
from repopt.reparam import declared_blocks

try:
    _talkative = logging.getLogger("torch.utils._pytree")
    _level = _talkative.level
    _talkative.setLevel(logging.ERROR)  # at its import torchao registers an enum in a way that torch warns about
    from torchao.quantization import pt2e
    from torchao.quantization.pt2e import quantizer as ao
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e, prepare_qat_pt2e
    from torchao.quantization.pt2e.quantizer.quantizer import Q_ANNOTATION_KEY

    _talkative.setLevel(_level)
except ImportError as error:
    raise UserError(f"quantization needs torchao (pip install -r requirements-deploy.txt): {one_line(error)}") from None

_CALLS = (torch.ops.aten.conv2d.default, torch.ops.aten.linear.default)
_NORMS = (torch.ops.aten.batch_norm.default,)
_OF_TRAINING = {torch.ops.aten.dropout.default: 2, torch.ops.aten.batch_norm.default: 5}  # where they are told
_UNDOING = (torch.ops.aten.div.Tensor,)  # for QAT torchao scales a kernel as its batch norm will, and divides again
_AVERAGED_BATCHES = 100  # that count in the range of an activation, while training for INT8
MAX_BATCH = 65_535  # images in a batch of an exported network: with more, a GPU computes batch norms in another way
_SMALLEST_STEP = 1e-6  # of a weight: the bias of a channel without weights is an integer of 32 bits of such steps
_ACTIVATIONS = (torch.ops.aten.relu.default, torch.ops.aten.relu_.default)


@dataclass(frozen=True)
class Preset:
    """How numbers become integers.

    Attributes:
        meaning: in a line.
        activations, weights: ranges of the integers; a range around 0 is symmetric, one from 0 on is affine.
        per_channel: whether every output channel's weights have a scale of their own.
        histogram: whether PTQ chooses the activations' range by their histogram, instead of from smallest to largest.
    """

    meaning: str
    activations: tuple[int, int] = (0, 255)
    weights: tuple[int, int] = (-127, 127)
    per_channel: bool = True
    histogram: bool = True


PRESETS = {
    "default": Preset("8-bit weights per channel, 8-bit activations by histogram"),
    "fbgemm": Preset("8-bit weights per channel, 7-bit activations by histogram", (0, 127), (-128, 127)),
    "per_tensor": Preset(
        "8-bit weights per tensor, 8-bit activations from smallest to largest", per_channel=False, histogram=False
    ),
    "tensorrt": Preset(  # onnxruntime has no integer kernels for it on CPUs, and computes in float
        "8-bit weights per channel, 8-bit activations around 0 by histogram, for TensorRT", (-128, 127)
    ),
}


def find_preset(name: str) -> Preset:
    """A preset by name; UserError with the nearest one."""
    if name not in PRESETS:
        raise unknown("quantization preset", name, PRESETS)
    return PRESETS[name]


class Observed(Around):
    """A network exported for quantization, (N, C, H, W) -> (N, num_classes), H and W fixed; its ranges are observed.

    With `fake` it computes as the INT8 network will, and is trained (QAT): its parameters are those of `around`, and in
    training mode it observes activations, while an evaluation leaves their ranges as they are. Without, it computes in
    float and observes all that it sees (PTQ).

    Args:
        graph: prepared by torchao.
        around: the network that was exported.
        example: an input, (1, C, H, W).
        fake: whether it is for QAT.
    """

    def __init__(self, graph: fx.GraphModule, around: nn.Module, example: Tensor, *, fake: bool) -> None:
        super().__init__(around)
        own = dict(graph.named_parameters())
        if fake:
            assert all(own[name] is param for name, param in around.named_parameters()), "torchao copied parameters"
        self.network, self.fake = graph, fake
        example = torch.zeros_like(example, memory_format=torch.contiguous_format)
        self.register_buffer("example", example, persistent=False)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return self.network(x)

    def train(self, mode: bool = True) -> Observed:
        """Whether batch norms take their statistics from the batch, and activations are observed.

        The ranges of weights are always those of the present weights.
        """
        self._switch(mode)
        for observer in self._of_activations():
            (pt2e.enable_observer if mode else pt2e.disable_observer)(observer)
        return self

    @contextmanager
    def calibrating(self) -> Iterator[None]:
        """Observe without quantizing yet, as in an evaluation otherwise."""
        self._switch(training=False)
        self.network.apply(pt2e.enable_observer)
        self.network.apply(pt2e.disable_fake_quant)
        yield
        self.network.apply(pt2e.enable_fake_quant)
        self.eval()
        if self.fake:
            self(self.example)  # scales follow from ranges only then

    def _switch(self, training: bool) -> None:
        """Let dropout and batch norms do as in training, or not.

        torchao's own function for it would leave them with torch's default probability, momentum and epsilon.
        """
        self.training = training
        for node in self.network.graph.nodes:
            if node.target in _OF_TRAINING:
                index = _OF_TRAINING[node.target]
                node.args = (*node.args[:index], training, *node.args[index + 1 :])
        self.network.recompile()

    def average_over(self, batches: float) -> None:
        """Let the next batch count as one of so many in the ranges of activations, where they are averages."""
        for observer in self._of_activations():
            observer.activation_post_process.averaging_constant = 1 / batches

    def _of_activations(self) -> Iterator[_FakeActivation]:
        for module in self.network.modules():
            if isinstance(module, _FakeActivation):
                yield module


class Int8(nn.Module):
    """A quantized network as torch computes it: in float, with all that is rounded where the integers are.

    Args:
        graph: converted by torchao.
    """

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__()
        self.network = graph
        self.training = False

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return self.network(x)

    def train(self, mode: bool = True) -> Int8:
        """It stays as it is."""
        assert not mode, "an INT8 network is not trained"
        return self


def prepare(model: nn.Module, images: Tensor, method: str, preset: str) -> Observed:
    """`prepare_ptq` or `prepare_qat`, by the name of the method.

    Raises:
        UserError: an unknown method, and as they do.
    """
    methods = {"ptq": prepare_ptq, "qat": prepare_qat}
    if method not in methods:
        raise unknown("quantization method", method, methods)
    return methods[method](model, images, preset)


def prepare_ptq(model: nn.Module, images: Tensor, preset: str) -> Observed:
    """A deployed copy of a model whose ranges are observed, for `calibrate` and `convert`.

    Args:
        model: any of ours, or any that torch.export takes; it stays as it is.
        images: (N, C, H, W), whose height and width the network will take.
        preset: one of `PRESETS`.

    Raises:
        UserError: an unknown preset; a model that cannot be exported.
    """
    deployed = deploy(model)
    graph = prepare_pt2e(exported(deployed, images), _Chains(find_preset(preset), fake=False))
    return Observed(graph, deployed, images[:1], fake=False)


def prepare_qat(model: nn.Module, images: Tensor, preset: str) -> Observed:
    """A copy of a model to be trained as the INT8 network that it will be: `calibrate` it, train it, `convert` it.

    A target network keeps its batch norms, and its optimizer is built as always, of what this returns
    (``build_optimizer(name, observed, scales)``). In any other mode the branches are folded first, and their batch
    norms with them.

    Args, Raises: as of `prepare_ptq`.
    """
    keeps_norms = {block.mode for _, block in declared_blocks(model)} == {"target"}
    trained = (copy.deepcopy(model) if keeps_norms else deploy(model).requires_grad_()).train()
    graph = exported(trained, images)
    norms = [path for path, module in trained.named_modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    counts = {f"{path}.num_batches_tracked" for path in norms}
    settings = {}  # momentum and epsilon by the running variance, for torchao puts torch's defaults there
    for node in graph.graph.nodes:
        if node.target is torch.ops.aten.add_.Tensor and node.args[0].target in counts:
            graph.graph.erase_node(node)  # it would count on in evaluations, and nothing reads it
        elif node.target in _NORMS:
            settings[node.args[4].target] = node.args[6:8]
    graph = prepare_qat_pt2e(graph, _Chains(find_preset(preset), fake=True))
    for node in graph.graph.nodes:
        if node.target in _NORMS:
            node.args = (*node.args[:6], *settings[node.args[4].target], *node.args[8:])
        elif node.target is torch.ops.aten.add.Tensor and getattr(node.args[0], "target", None) in settings:
            node.args = (node.args[0], settings[node.args[0].target][1])
    graph.recompile()
    return Observed(graph, trained, images[:1], fake=True)


@torch.no_grad()
def calibrate(observed: Observed, batches: Iterable[Tensor]) -> None:
    """Let a network observe images, (N, C, H, W) each.

    Raises:
        UserError: there are none.
    """
    seen = 0
    with observed.calibrating():
        for number, images in enumerate(batches, start=1):
            observed.average_over(number)
            observed(images)
            seen += len(images)
        observed.average_over(_AVERAGED_BATCHES)
    if not seen:
        raise UserError("there are no images to calibrate with")


@torch.no_grad()
def load(observed: Observed, state: Mapping[str, Tensor]) -> None:
    """Take over the state dict of a network that was prepared alike, whose ranges are known.

    Raises:
        UserError: it is another's.
    """
    with observed.calibrating():
        observed(observed.example)  # only then has what observers keep its shape
    load_weights(observed, state)


@torch.no_grad()
def convert(observed: Observed) -> Int8:
    """The INT8 network of a calibrated or trained one, which stays as it is."""
    observed = copy.deepcopy(observed).eval()
    if observed.fake:
        observed(observed.example)  # for the ranges of the last weights, and the scales of ranges that were averaged
    graph = convert_pt2e(observed.network)
    for node in graph.graph.nodes:
        if node.target in _CALLS:
            _round_bias(graph, *node.args[:3])
    _forget_unused(graph)
    for node in graph.graph.nodes:
        if node.target in _CALLS:
            _name_integers(graph, _path(node), node.args[1])
    graph.recompile()
    return Int8(graph)


@torch.no_grad()
def signal_to_noise(observed: Observed, int8: Int8, images: Tensor) -> dict[str, float]:
    """How far the noise of quantization is below every layer's output, in dB, by the path of its module.

    A layer is a convolution or linear layer with what `convert` computes together with it; its output has the noise of
    those before it, too. Infinite where there is no noise.

    Args:
        observed: what was converted; the signals are its own in float.
        int8: what `convert` made of it.
        images: (N, C, H, W).
    """
    observed = copy.deepcopy(observed)
    with observed.calibrating():
        signals = _layer_outputs(observed.network, images)
    ratios = {}
    for path, output in _layer_outputs(int8.network, images).items():
        noise = (output - signals[path]).square().sum()
        ratios[path] = 10 * (signals[path].square().sum() / noise).log10().item() if noise else math.inf
    return ratios


def _layer_outputs(graph: fx.GraphModule, images: Tensor) -> dict[str, Tensor]:
    calls = [node for node in graph.graph.nodes if node.target in _CALLS]
    last = {_last(_behind(node, _UNDOING)): _path(node) for node in calls}
    outputs = {}

    class Record(fx.Interpreter):
        def run_node(self, node: fx.Node) -> Any:
            result = super().run_node(node)
            if node in last:
                outputs[last[node]] = result.clone()  # ReLUs may overwrite it
            return result

    Record(graph).run(images)
    return outputs


def _path(node: fx.Node) -> str:
    """Of the module whose operation a node is."""
    *_, (path, _) = node.meta["nn_module_stack"].values()
    return path


def exported(model: nn.Module, images: Tensor) -> fx.GraphModule:
    """The graph of a model's operations, for batches of up to `MAX_BATCH` images; Raises: as `export_program`."""
    return export_program(model, images).module()


def export_program(model: nn.Module, images: Tensor) -> torch.export.ExportedProgram:
    """A model's operations, for batches of up to `MAX_BATCH` images.

    Raises:
        UserError: there is an operation that cannot be exported.
    """
    pair = torch.cat([images[:1], images[:1]])  # a batch of one would be taken for a constant
    try:
        return torch.export.export(model, (pair,), dynamic_shapes=({0: Dim("batch", max=MAX_BATCH)},))
    except Exception as error:  # of many kinds, with the tracer's own words
        raise UserError(f"{type(model).__name__} cannot be exported: {one_line(error)}") from error


class _Chains(ao.Quantizer):
    """Marks what becomes integers: convolutions and linear layers, each with the batch norm and ReLU behind it.

    Their inputs, weights and outputs are quantized; biases, and all else between, stay as they are, and so does what
    the network gives.
    """

    def __init__(self, preset: Preset, *, fake: bool) -> None:
        super().__init__()
        self._activations, self._weights = _specs(preset, fake=fake)

    def annotate(self, model: fx.GraphModule) -> fx.GraphModule:
        """Mark the graph's nodes."""
        for node in model.graph.nodes:
            if node.target not in _CALLS:
                continue
            image, kernel = node.args[:2]
            last = _last(node)
            node.meta[Q_ANNOTATION_KEY] = ao.QuantizationAnnotation(
                input_qspec_map={image: self._activations, kernel: self._weights}, _annotated=True
            )
            if any(user.op != "output" for user in last.users):
                annotation = last.meta.setdefault(Q_ANNOTATION_KEY, ao.QuantizationAnnotation(_annotated=True))
                annotation.output_qspec = self._activations
        return model

    def validate(self, model: fx.GraphModule) -> None:
        """Nothing is left to check."""


def _round_bias(graph: fx.GraphModule, image: fx.Node, kernel: fx.Node, bias: fx.Node | None = None) -> None:
    """Let a bias be what integer arithmetic makes of it: so many times the scale of an input times that of a weight."""
    if bias is not None:
        step = image.args[1] * _value(graph, kernel.args[1])
        own = _value(graph, bias)
        own.copy_((own / step).round() * step)


def _forget_unused(graph: fx.GraphModule) -> None:
    """Keep the tensors that the graph uses: not the float weights that integers have replaced."""
    used = {node.target for node in graph.graph.nodes if node.op == "get_attr"}
    for name in [name for name in graph.state_dict() if name not in used]:
        path, _, leaf = name.rpartition(".")
        delattr(graph.get_submodule(path), leaf)
    graph.delete_all_unused_submodules()


def _name_integers(graph: fx.GraphModule, path: str, kernel: fx.Node) -> None:
    """Let the integers of a layer's kernel, their scale and their zero point go by its name."""
    for node, name in zip(kernel.args[:3], ("weight", "weight_scale", "weight_zero_point"), strict=True):
        if isinstance(node, fx.Node):  # else it is a number
            value = _value(graph, node)
            delattr(graph, node.target)
            graph.get_submodule(path).register_buffer(name, value)
            node.target = f"{path}.{name}"


def _value(graph: fx.GraphModule, argument: Any) -> Any:
    """A number, or the tensor that a node stands for."""
    return operator.attrgetter(argument.target)(graph) if isinstance(argument, fx.Node) else argument


def _last(node: fx.Node) -> fx.Node:
    """The end of the chain that a convolution or linear layer begins."""
    return _behind(_behind(node, _NORMS), _ACTIVATIONS)


def _behind(node: fx.Node, operations: tuple[Any, ...]) -> fx.Node:
    """The only user of a node, where it is one of these operations; else the node itself."""
    user = next(iter(node.users)) if len(node.users) == 1 else node
    return user if user.target in operations else node


def _specs(preset: Preset, *, fake: bool) -> tuple[ao.QuantizationSpec, ao.QuantizationSpec]:
    """Of activations and weights, as torchao takes them."""
    if fake:
        per_tensor, per_channel = pt2e.MovingAverageMinMaxObserver, pt2e.MovingAveragePerChannelMinMaxObserver
        activations = _FakeActivation.with_args(observer=per_tensor, averaging_constant=1 / _AVERAGED_BATCHES)
        weights = _FakeQuantize.with_args(
            observer=per_channel if preset.per_channel else per_tensor,
            averaging_constant=1.0,  # those of the last step alone
        )
    else:
        activations = pt2e.HistogramObserver if preset.histogram else pt2e.MinMaxObserver
        weights = pt2e.PerChannelMinMaxObserver if preset.per_channel else pt2e.MinMaxObserver
        weights = weights.with_args(eps=_SMALLEST_STEP)
    symmetric = preset.activations[0] < 0
    return (
        ao.QuantizationSpec(
            torch.int8 if symmetric else torch.uint8,
            activations,
            *preset.activations,
            qscheme=torch.per_tensor_symmetric if symmetric else torch.per_tensor_affine,
        ),
        ao.QuantizationSpec(
            torch.int8,
            weights,
            *preset.weights,
            qscheme=torch.per_channel_symmetric if preset.per_channel else torch.per_tensor_symmetric,
            ch_axis=0 if preset.per_channel else None,
        ),
    )


class _FakeQuantize(pt2e.FusedMovingAvgObsFakeQuantize):
    """One whose scale is in INT8 what it was in training; torchao's observers compute it by another formula."""

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        return self.scale, self.zero_point


class _FakeActivation(_FakeQuantize):
    """One of activations, whose ranges an evaluation leaves as they are."""
