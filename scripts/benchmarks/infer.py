"""Images per second of what is deployed: the trained target network, its batch norms folded, compiled, and the baseline
before and after its branches are folded; on CPUs also the folded target network in onnxruntime, in fp32 and in INT8.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

import repopt
from benchmarks.arguments import add_rounds, positive, rounds_of
from benchmarks.report import Row, Table
from benchmarks.timing import interleave, peak_extra
from benchmarks.training_step import memory_format_on, precision_on, to_device
from repopt.errors import UserError, one_line, unknown
from repopt.layers import MODES
from repopt.models import list_archs

ARCHS = ("RepOpt-VGG-B1", "RepOpt-VGG-B2", "RepOpt-VGG-L1", "RepOpt-VGG-L2", "RepOpt-GhostNet-0.5x")
TRAINED = "target, trained"
FP32, INT8 = "target, onnxruntime", "target, onnxruntime INT8"


class Contender(NamedTuple):
    """A form of a network: its forward pass on the images, and the form whose outputs it should have.

    Of INT8 also how many of its convolutions are computed with integers, in words.
    """

    forward: Callable[[], Tensor]
    source: str | None
    integers: str | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this subject's arguments."""
    parser.add_argument("--arch", nargs="+", default=list(ARCHS), help="models (default: %(default)s)")
    parser.add_argument("--batch-size", type=positive, help="default: 128 on GPUs, 8 on CPUs")
    parser.add_argument("--image-size", type=positive, default=224, help="default: %(default)s")
    add_rounds(parser, 10)


def run(arguments: argparse.Namespace, device: torch.device) -> Iterator[Table]:
    """Yield the table after each architecture; the forms of each take turns on the same random images."""
    baselines = {arch: baseline_mode(arch) for arch in arguments.arch}
    batch_size = arguments.batch_size or (128 if device.type == "cuda" else 8)
    size = arguments.image_size
    rows: list[Row] = []
    for arch, baseline in baselines.items():
        images = torch.randn(batch_size, 3, size, size, device=device)
        images = images.contiguous(memory_format=memory_format_on(device))
        contenders = dict(_contenders(arch, baseline, images))
        outputs = {form: contender.forward().float() for form, contender in contenders.items()}
        forwards = {form: contender.forward for form, contender in contenders.items()}
        seconds = interleave(forwards, device, rounds=rounds_of(arguments))
        for form, (forward, source, integers) in contenders.items():
            in_torch = form not in (FP32, INT8)  # torch does not see the memory of onnxruntime
            row = {
                "arch": arch,
                "form": form,
                "images/s": batch_size / seconds[form],
                "ms per image": 1e3 * seconds[form] / batch_size,
                "speed / trained target": seconds[TRAINED] / seconds[form],
                "speed / onnxruntime fp32": None if in_torch else seconds[FP32] / seconds[form],
                "peak extra MB per image": peak_extra(forward, device) / batch_size / 1e6 if in_torch else None,
                "difference of outputs": source and difference(outputs[form], outputs[source]),
                "integer convolutions": integers,
            }
            rows.append(row)
        yield f"Inference, batches of {batch_size} images of {size} x {size}", rows


def baseline_mode(model: str) -> str:
    """Return the mode of a model's first baseline: "repvgg" or "rep"."""
    if model not in repopt.list_models():
        raise unknown("model", model, repopt.list_models())
    return next(a.mode for name, a in list_archs().items() if name == f"{model}-{a.mode}" and a.mode not in MODES)


def _contenders(arch: str, baseline: str, images: Tensor) -> Iterator[tuple[str, Contender]]:
    """Yield the forms of a network with their names, in the order of the table."""
    precision = precision_on(images.device)
    converted = images.to(precision.dtype or images.dtype)  # autocast would convert the weights in every pass

    def forward_of(model: Callable[[Tensor], Tensor], inputs: Tensor = converted) -> Callable[[], Tensor]:
        def forward() -> Tensor:
            with torch.inference_mode(), precision.autocast():
                return model(inputs)

        return forward

    for mode in ("target", baseline):
        model = as_if_trained(repopt.create_model(arch, mode=mode), images)
        deployed = repopt.deploy(model).to(converted.dtype)
        yield f"{mode}, trained", Contender(forward_of(model, images), None)
        yield f"{mode}, deployed", Contender(forward_of(deployed), f"{mode}, trained")
        if mode == baseline:
            return
        torch.compiler.reset()  # there is a limit to how many programs it keeps
        compiled = forward_of(torch.compile(deployed))
        try:
            compiled()
        except RuntimeError as error:  # all of torch.compile's are
            warnings.warn(f"{arch}: not compiled, so that row is left out: {one_line(error)}", stacklevel=1)
        else:
            yield "target, deployed, compiled", Contender(compiled, TRAINED)
        if images.device.type == "cpu":
            try:
                fp32, int8, integers = in_onnxruntime(arch, model, images)
            except UserError as error:  # without the arch: that the extra is missing is then said once
                warnings.warn(f"rows of onnxruntime are left out: {one_line(error)}", stacklevel=1)
            else:
                yield FP32, Contender(forward_of(fp32), TRAINED)
                yield INT8, Contender(forward_of(int8), TRAINED, integers)


def in_onnxruntime(arch: str, model: nn.Module, images: Tensor) -> tuple[nn.Module, nn.Module, str]:
    """Return a network in onnxruntime, in fp32 and in INT8, and how many convolutions of INT8 are integer ones.

    Args:
        arch: its name, for messages.
        model: the network, trained; it stays as it is.
        images: (N, C, H, W), on which INT8 is calibrated and both are checked.

    Raises:
        UserError: the extra is not installed; the network cannot be exported; onnxruntime computes something else.
    """
    from repopt import export, quantization  # an extra

    deployed = repopt.deploy(model)
    observed = quantization.prepare(model, images, "ptq", "default")
    quantization.calibrate(observed, [images])
    with tempfile.TemporaryDirectory() as folder:
        fp32, int8 = Path(folder, f"{arch}-fp32.onnx"), Path(folder, f"{arch}-int8.onnx")
        export.write_onnx(deployed, images, fp32)
        export.write_onnx(quantization.convert(observed), images, int8)
        convolutions = sum(isinstance(module, nn.Conv2d) for module in deployed.modules())
        integers = f"{export.operations(int8)['QLinearConv']} of {convolutions}"
        return export.OnnxNetwork(fp32), export.OnnxNetwork(int8), integers


@torch.no_grad()
def as_if_trained(model: nn.Module, images: Tensor) -> nn.Module:
    """Return the model in eval mode on the images' device and in their format, with batch norms that do something.

    Their weights and biases are random, and their statistics those of the images: the activations of a fresh network
    fade from layer to layer, down to numbers with which CPUs are slow. Biases are around 1: around 0 every ReLU would
    enlarge small differences, and through tens of layers a single number that is rounded otherwise would change an
    INT8 network's outputs, unlike those of a trained one.
    """
    to_device(model, images.device).train()
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, mean=1.0, std=0.1)
        norm.momentum = 1.0
    model(images)
    return model.eval()


def difference(outputs: Tensor, reference: Tensor) -> float:
    """Return the largest difference, relative to the largest number of the reference."""
    return ((outputs - reference).abs().max() / reference.abs().max()).item()
