"""ONNX graphs: what torch's exporter writes, as onnxruntime computes it best.

Needs the extra deploy.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from onnxscript import ir

BATCH = "batch"
# Channels that onnxruntime's integer depthwise convolutions compute at once.
LANES = 16
# What computes every channel from the same one of all that it takes.
_BY_CHANNEL = {
    "QuantizeLinear",
    "DequantizeLinear",
    "Relu",
    "Clip",
    "Add",
    "Mul",
    "HardSigmoid",
    "Sigmoid",
    "ReduceMean",
}


def name_batches(graph: ir.Graph) -> None:
    """Call the axis of the images of a batch what it is; torch has a number for it."""
    (images,) = graph.inputs
    assert images.shape is not None
    axis = images.shape[0]
    for value in (*graph.inputs, *(output for node in graph for output in node.outputs)):
        if value.shape is not None:
            value.shape = ir.Shape([BATCH if size == axis else size for size in value.shape])


def separate_zero_points(graph: ir.Graph) -> None:
    """Give every kernel's DequantizeLinear zero points of its own.

    On CPUs without VNNI onnxruntime makes other integers of kernels and of their zero points, each once.
    """
    for node in graph:
        if node.op_type == "DequantizeLinear" and node.inputs[0] and node.inputs[0].is_initializer():
            kernel: Any = node.inputs[0]
            zero_points: Any = node.inputs[2]
            own = ir.Value(name=f"{kernel.name}_zero_point", const_value=zero_points.const_value)
            own.shape, own.type = zero_points.shape, zero_points.type
            graph.register_initializer(own)
            node.replace_input_with(2, own)


def keep_float(graph: ir.Graph) -> None:
    """Give layers with float kernels inputs of one scale per channel, all equal.

    Of layers between integers onnxruntime would make integers of the kernels, too, where the input has a single scale.
    """
    for node in [*graph]:
        if node.op_type not in ("Conv", "Gemm"):
            continue
        image, kernel = node.inputs[:2]
        source = image.producer() if image is not None else None
        if source is None or source.op_type != "DequantizeLinear" or kernel is None or not kernel.is_initializer():
            continue
        assert image is not None and image.shape is not None
        channels, own = image.shape[1], [source.inputs[0]]
        for value in source.inputs[1:]:
            assert value is not None and value.const_value is not None
            numbers = value.const_value.numpy().reshape(-1).repeat(channels)
            same = ir.Value(name=f"{node.name}_{value.name}", const_value=ir.tensor(numbers))
            same.shape, same.dtype = ir.Shape([channels]), value.dtype
            graph.register_initializer(same)
            own.append(same)
        by_channel = ir.node("DequantizeLinear", own, {"axis": 1})
        by_channel.outputs[0].shape, by_channel.outputs[0].type = image.shape, image.type
        graph.insert_before(node, by_channel)
        node.replace_input_with(0, by_channel.outputs[0])
        if not image.uses() and not image.is_graph_output():
            graph.remove(source, safe=True)


def pad_channels(graph: ir.Graph) -> None:
    """Pad the channels between convolutions with ones of zeros, to multiples of `LANES`.

    The channels that are left over onnxruntime's integer depthwise convolutions compute one by one, which takes several
    times as long. What it gives stays the same: the weights of padded channels are zeros, both where they are computed
    and where they are read. Where anything but convolutions would see them, all stays as it is.
    """
    padded: set[Any] = set()
    convolutions: list[tuple[Any, tuple[int, ...]]] = []
    for node in graph:
        read = [value for value in node.inputs if value in padded]
        if node.op_type == "Conv":
            outputs, groups = _shape(node.inputs[1])[0], node.attributes.get_int("group", 1)
            depthwise = groups == outputs and _shape(node.inputs[1])[1] == 1
            if groups > 1 and not (depthwise and bool(read) == bool(outputs % LANES)):
                return
            if any(value.const_value is None for value in _kernel(node)):
                return
            convolutions.append((node, (0, 1) if read and groups == 1 else (0,)))
            if outputs % LANES:
                padded.add(node.outputs[0])
        elif read:
            varying = [value for value in node.inputs if value is not None and value.const_value is None]
            sizes = {_shape(value)[:2] for value in (*varying, *node.outputs)}
            constants: list[Any] = [value.const_value for value in node.inputs if value and value not in varying]
            if node.op_type not in _BY_CHANNEL or read != varying or len(sizes) > 1:
                return
            if node.op_type != "ReduceMean" and any(constant.size > 1 for constant in constants):
                return
            padded.update(node.outputs)
    if padded.intersection(graph.outputs):
        return
    for node, axes in convolutions:
        kernel, *numbers = _kernel(node)
        _pad(kernel, axes)
        for value, fill in zip(numbers, (1, 0), strict=False):  # scales and zero points
            _pad(value, (0,), fill)
        for value in node.inputs[2:]:
            _pad(value, (0,))
        node.inputs[1].shape = kernel.shape
        if node.attributes.get_int("group", 1) > 1:
            node.attributes["group"] = ir.AttrInt64("group", _shape(kernel)[0])
    for value in padded:
        batch, channels, *sides = _shape(value)
        value.shape = ir.Shape([batch, channels + -channels % LANES, *sides])


def round_biases(graph: ir.Graph) -> None:
    """Write the biases of quantized linear layers as integers.

    Without, onnxruntime computes in float a layer whose output is: with kernels that it dequantizes for every batch.
    """
    for node in [*graph]:
        if node.op_type != "Gemm" or len(node.inputs) < 3:
            continue
        inputs: list[Any] = [*node.inputs]
        image, kernel, bias = inputs[0].producer(), inputs[1].producer(), inputs[2]
        if not all(source and source.op_type == "DequantizeLinear" for source in (image, kernel)):
            continue
        step = image.inputs[1].const_value.numpy() * kernel.inputs[1].const_value.numpy()
        integers = (bias.const_value.numpy() / step).round().astype(np.int32)
        constants = {"": integers, "_scale": step, "_zero_point": np.zeros(step.shape, np.int32)}
        own = [_constant(graph, f"{bias.name}_integers{name}", numbers) for name, numbers in constants.items()]
        exact = ir.node("DequantizeLinear", own, {"axis": 0})
        exact.outputs[0].shape, exact.outputs[0].type = bias.shape, bias.type
        graph.insert_before(node, exact)
        node.replace_input_with(2, exact.outputs[0])


def _kernel(convolution: ir.Node) -> list[Any]:
    """Return a kernel; where it is quantized, its integers, scales and zero points."""
    kernel: Any = convolution.inputs[1]
    return [kernel] if kernel.producer() is None else [*kernel.producer().inputs]


def _shape(value: Any) -> tuple[Any, ...]:
    return tuple(value.shape)


def _constant(graph: ir.Graph, name: str, numbers: np.ndarray) -> ir.Value:
    value = ir.Value(name=name, const_value=ir.tensor(numbers))
    value.shape, value.dtype = ir.Shape(numbers.shape), ir.DataType.from_numpy(numbers.dtype)
    graph.register_initializer(value)
    return value


def _pad(value: Any, axes: tuple[int, ...], fill: int = 0) -> None:
    """Pad these axes of a constant to multiples of `LANES`; a number stays one."""
    numbers = value.const_value.numpy()
    widths = [(0, -size % LANES if axis in axes else 0) for axis, size in enumerate(numbers.shape)]
    if widths:
        value.const_value = ir.tensor(np.pad(numbers, widths, constant_values=fill))
        value.shape = value.const_value.shape
