"""The way to INT8: prepare, calibrate (and train), convert."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim
from torchao.quantization import pt2e
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e, prepare_qat_pt2e
from typing_extensions import override

from repopt.blocks import declared_blocks
from repopt.checkpoint import load_weights
from repopt.deploy import deploy
from repopt.errors import UserError, one_line, unknown
from repopt.layers import ModuleWrapper
from repopt.quantization import graph as graphs
from repopt.quantization.calibrators import check_calibrator
from repopt.quantization.presets import AVERAGED_BATCHES, FakeQuantizedActivation, find_preset

MAX_SIDE = 8192  # pixels of an image, of an exported network that takes many sizes
MAX_BATCH = 65_535  # images in a batch of an exported network: with more, a GPU computes batch norms in another way
_METHODS = ("ptq", "qat")


class PreparedModel(ModuleWrapper):
    """A network exported for quantization, (N, C, H, W) -> (N, num_classes), H and W fixed; its ranges are observed.

    With `fake` it computes as the INT8 network will, and is trained (QAT): its parameters are those of
    `wrapped_module`, and in training mode it observes activations, while an evaluation leaves their ranges as they are.
    Without, it computes in float and observes all that it sees (PTQ).

    Args:
        graph: prepared by torchao.
        wrapped_module: the network that was exported.
        example: an input, (1, C, H, W).
        fake: whether it is for QAT.
    """

    def __init__(self, graph: fx.GraphModule, wrapped_module: nn.Module, example: Tensor, *, fake: bool) -> None:
        super().__init__(wrapped_module)
        own = dict(graph.named_parameters())
        if fake:
            assert all(own[name] is param for name, param in wrapped_module.named_parameters()), (
                "torchao copied parameters"
            )
        self.network, self.fake = graph, fake
        example = torch.zeros_like(example, memory_format=torch.contiguous_format)
        self.register_buffer("example", example, persistent=False)
        # torchao's observers replace it when they load a state dict.
        self._smallest_steps = {name: value.clone() for name, value in graph.named_buffers() if name.endswith(".eps")}
        self.register_load_state_dict_post_hook(PreparedModel._restore_smallest_steps)

    @override
    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)

    @override
    def train(self, mode: bool = True) -> PreparedModel:
        """Set whether batch norms take their statistics from the batch, and activations are observed.

        The ranges of weights are always those of the present weights.
        """
        self._switch(mode)
        for observer in self._activation_quantizers():
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
            self(self.example)  # torchao's fake quantizers compute scales from ranges in a forward pass only

    def _restore_smallest_steps(self, _: object) -> None:
        for name, value in self._smallest_steps.items():
            self.network.get_buffer(name).copy_(value)

    def _switch(self, training: bool) -> None:
        self.training = training
        graphs.switch_training(self.network, training)

    def average_over(self, batches: float) -> None:
        """Let the next batch count as one of so many in the ranges of activations, where they are averages."""
        for observer in self._activation_quantizers():
            observer.activation_post_process.averaging_constant = 1 / batches

    def _activation_quantizers(self) -> Iterator[Any]:
        yield from (module for module in self.network.modules() if isinstance(module, FakeQuantizedActivation))


class Int8(nn.Module):
    """A quantized network as torch computes it: in float, with all that is rounded where the integers are.

    Args:
        graph: converted by torchao.
    """

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__()
        self.network = graph
        self.training = False

    @override
    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)

    @override
    def train(self, mode: bool = True) -> Int8:
        assert not mode, "an INT8 network is not trained"
        return self


def prepare(
    model: nn.Module,
    images: Tensor,
    method: str,
    preset: str,
    calibrator: str | None = None,
    float_layers: Collection[str] = (),
) -> PreparedModel:
    """Return a copy of a model whose ranges are observed, for `calibrate` and `convert`.

    With "qat" it is to be trained between the two, as the INT8 network that it will be. A target network keeps its
    batch norms then, and its optimizer is built as always, of what this returns (``build_optimizer(name, prepared,
    scales)``). In any other mode, and with "ptq", the branches are folded first, and their batch norms with them.

    Args:
        model: any of ours, or any that torch.export takes; it stays as it is.
        images: (N, C, H, W), whose height and width the network will take.
        method: "ptq" (after training) or "qat" (by training on).
        preset: one of `PRESETS`.
        calibrator: how "ptq" chooses the ranges of activations, one of `CALIBRATORS`; None = as the preset says.
        float_layers: paths of modules that stay in float, beside the small ones, as `signal_to_noise` has them.

    Raises:
        UserError: the method, the preset, the calibrator or a layer is unknown, or the model cannot be exported.
    """
    if method not in _METHODS:
        raise unknown("quantization method", method, _METHODS)
    fake, numbers = method == "qat", find_preset(preset)
    if calibrator is not None:
        check_calibrator(calibrator)
        if fake:
            raise UserError("training for INT8 averages the ranges of its batches, and takes no calibrator")
        numbers = dataclasses.replace(numbers, calibrator=calibrator)
    if not fake:
        network = deploy(model)
    elif {block.mode for _, block in declared_blocks(model)} == {"target"}:
        network = copy.deepcopy(model).train()  # it keeps its batch norms
    else:
        network = deploy(model).requires_grad_().train()
    graph = export_program(network, images).module()
    float_layers = {*float_layers, *graphs.small_layers(graph, numbers.smallest)}
    quantizer = graphs.ConvBnReluQuantizer(numbers, float_layers, fake=fake)
    if not fake:
        graphs.part_biases(graph)
        return PreparedModel(prepare_pt2e(graph, quantizer), network, images[:1], fake=False)
    graphs.drop_batch_counts(graph, network)
    settings = graphs.norm_settings(graph)
    graphs.part_norms(graph, float_layers)
    graph = prepare_qat_pt2e(graph, quantizer)
    graphs.join_norms(graph, float_layers)
    graphs.restore_norm_settings(graph, settings)
    return PreparedModel(graph, network, images[:1], fake=True)


@torch.no_grad()
def calibrate(prepared: PreparedModel, batches: Iterable[Tensor]) -> None:
    """Let a network observe images, (N, C, H, W) each.

    Raises:
        UserError: there are none.
    """
    seen = 0
    with prepared.calibrating():
        for number, images in enumerate(batches, start=1):
            prepared.average_over(number)
            prepared(images)
            seen += len(images)
        prepared.average_over(AVERAGED_BATCHES)
    if not seen:
        raise UserError("there are no images to calibrate with")


@torch.no_grad()
def load(prepared: PreparedModel, state: Mapping[str, Tensor], whole: nn.Module | None = None) -> None:
    """Load the state dict of a network that was prepared alike, whose ranges are known.

    Args:
        prepared: gets the weights and ranges.
        state: its own; or that of `whole`.
        whole: of which the prepared network is a part.

    Raises:
        UserError: it is another's.
    """
    with prepared.calibrating():
        prepared(prepared.example)  # torchao's observers give their buffers a shape in a forward pass only
    load_weights(prepared if whole is None else whole, state)


@torch.no_grad()
def convert(prepared: PreparedModel) -> Int8:
    """Return the INT8 network of a calibrated or trained one, which stays as it is."""
    prepared = copy.deepcopy(prepared).eval()
    if prepared.fake:
        prepared(prepared.example)  # for the ranges of the last weights, and the scales of ranges that were averaged
    with graphs.two_dimensional_folding():
        graph = convert_pt2e(prepared.network)
    graphs.finish_conversion(graph)
    return Int8(graph)


def export_program(model: nn.Module, images: Tensor, multiple: int | None = None) -> torch.export.ExportedProgram:
    """Return a model's operations, for batches of up to `MAX_BATCH` images.

    Args:
        model: of which the operations are.
        images: (N, C, H, W), of which height and width are.
        multiple: of which height and width may be any multiples from the second on, up to `MAX_SIDE`; None = they are
            those of `images`.

    Raises:
        UserError: there is an operation that cannot be exported.
    """
    pair = torch.cat([images[:1], images[:1]])  # torch.export takes a batch of one for a constant
    shapes: dict[int, Any] = {0: Dim("batch", max=MAX_BATCH)}
    if multiple is not None:
        shapes |= {axis: multiple * Dim(name, max=MAX_SIDE // multiple) for axis, name in ((2, "rows"), (3, "columns"))}
    try:
        return torch.export.export(model, (pair,), dynamic_shapes=(shapes,))
    except Exception as error:  # of many kinds, with the tracer's own words
        raise UserError(f"{type(model).__name__} cannot be exported: {one_line(error)}") from error
