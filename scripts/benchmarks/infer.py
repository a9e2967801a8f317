"""Images per second of what is deployed: the trained target network, its batch norms folded, compiled, and the baseline
before and after its branches are folded; on CPUs also the folded target network in onnxruntime and in OpenVINO, in fp32
and in INT8. The same of a detector, FCOS.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

import repopt
from benchmarks.arguments import add_rounds, positive, rounds_of
from benchmarks.report import Row, Table
from benchmarks.timing import Rounds, interleave, peak_extra
from benchmarks.training_step import memory_format_on, precision_on, to_device
from repopt import detection
from repopt.errors import UserError, one_line, unknown
from repopt.layers import MODES
from repopt.models import list_archs

Outputs = Tensor | Mapping[str, Tensor]

DETECTOR = "RepOpt-VGG-B1"
ARCHS = ("RepOpt-VGG-B1", "RepOpt-VGG-B2", "RepOpt-VGG-L1", "RepOpt-VGG-L2", "RepOpt-GhostNet-0.5x")
TRAINED = "target, trained"
TORCH, ONNXRUNTIME, OPENVINO = "torch", "onnxruntime", "OpenVINO"


class Contender(NamedTuple):
    """A form of a network: its forward pass on the images, the form whose outputs it should have, and what runs it.

    Of INT8 also how many of its convolutions are computed with integers, in words.
    """

    forward: Callable[[], Outputs]
    source: str | None
    runtime: str = TORCH
    integers: str | None = None


class InRuntime(NamedTuple):
    """A network in fp32 and in INT8, and how many convolutions of the second are computed with integers."""

    fp32: nn.Module
    int8: nn.Module
    integers: int


class Subject(NamedTuple):
    """A network: its name, what makes it in a mode, its baseline's mode, and its images."""

    name: str
    create: Callable[[str], nn.Module]
    baseline: str
    images: Tensor


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this subject's arguments."""
    parser.add_argument("--arch", nargs="+", help=f"models (default: {' '.join(ARCHS)}, unless --detector is given)")
    parser.add_argument("--batch-size", type=positive, help="default: 128 on GPUs, 8 on CPUs")
    parser.add_argument("--image-size", type=positive, default=224, help="default: %(default)s")
    parser.add_argument(
        "--detector",
        nargs="+",
        help=f"backbones of FCOS, up to its raw predictions (default: {DETECTOR}, unless --arch is given)",
    )
    parser.add_argument("--detector-batch-size", type=positive, default=1, help="default: %(default)s")
    parser.add_argument("--detector-image-size", type=positive, default=640, help="default: %(default)s")
    add_rounds(parser, 10)


def run(arguments: argparse.Namespace, device: torch.device) -> Iterator[Table]:
    """Yield a table after each of its networks; the forms of each take turns on the same random images."""
    everything = arguments.arch is None and arguments.detector is None
    archs, detectors = arguments.arch or (), arguments.detector or ()
    if everything:
        archs, detectors = ARCHS, (DETECTOR,)
    baselines = {name: baseline_mode(name) for name in (*archs, *detectors)}

    def random_images(count: int, size: int) -> Tensor:
        images = torch.randn(count, 3, size, size, device=device)
        return images.contiguous(memory_format=memory_format_on(device))

    def classifier(name: str) -> Subject:
        images = random_images(arguments.batch_size or (128 if device.type == "cuda" else 8), arguments.image_size)
        return Subject(name, lambda mode: repopt.create_model(name, mode=mode), baselines[name], images)

    def detector(name: str) -> Subject:
        images = random_images(arguments.detector_batch_size, arguments.detector_image_size)
        return Subject(f"FCOS, {name}", lambda mode: fcos_predictor(name, mode), baselines[name], images)

    detected = "Inference of a detector, up to its raw predictions"
    for title, make, names in (("Inference", classifier, archs), (detected, detector, detectors)):
        rows: list[Row] = []
        for subject in map(make, names):
            rows += measure(subject, rounds_of(arguments))
            count, _, height, width = subject.images.shape
            yield f"{title}, batches of {count} images of {height} x {width}", rows


def measure(subject: Subject, rounds: Rounds) -> Iterator[Row]:
    """Yield the rows of a network's forms."""
    images = subject.images
    contenders = dict(_contenders(subject))
    outputs = {form: contender.forward() for form, contender in contenders.items()}
    forwards = {form: contender.forward for form, contender in contenders.items()}
    seconds = interleave(forwards, images.device, rounds=rounds)
    for form, (forward, source, runtime, integers) in contenders.items():
        in_torch = runtime == TORCH  # which does not see the memory of others
        yield {
            "arch": subject.name,
            "form": form,
            "images/s": len(images) / seconds[form],
            "ms per image": 1e3 * seconds[form] / len(images),
            "speed / trained target": seconds[TRAINED] / seconds[form],
            "speed / onnxruntime fp32": None if in_torch else seconds[fp32_in(ONNXRUNTIME)] / seconds[form],
            "INT8 / fp32": integers and seconds[fp32_in(runtime)] / seconds[form],
            "peak extra MB per image": peak_extra(forward, images.device) / len(images) / 1e6 if in_torch else None,
            "difference of outputs": source and difference(outputs[form], outputs[source]),
            "integer convolutions": integers,
        }


def fcos_predictor(backbone: str, mode: str) -> nn.Module:
    """Return FCOS for the classes of COCO up to its raw predictions."""
    images: dict[str, Any] = {"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD}
    return detection.create_detector(backbone, mode=mode, num_classes=80, head=detection.FCOS, **images).predictor


def fp32_in(runtime: str) -> str:
    """Return the name of the form that onnxruntime or OpenVINO runs in fp32."""
    return f"target, {runtime}"


def baseline_mode(model: str) -> str:
    """Return the mode of a model's first baseline: "repvgg" or "rep"."""
    if model not in repopt.list_models():
        raise unknown("model", model, repopt.list_models())
    return next(a.mode for name, a in list_archs().items() if name == f"{model}-{a.mode}" and a.mode not in MODES)


def _contenders(subject: Subject) -> Iterator[tuple[str, Contender]]:
    """Yield the forms of a network with their names, in the order of the table."""
    name, create, baseline, images = subject
    precision = precision_on(images.device)
    converted = images.to(precision.dtype or images.dtype)  # autocast would convert the weights in every pass

    def forward_of(model: Callable[[Tensor], Outputs], inputs: Tensor = converted) -> Callable[[], Outputs]:
        def forward() -> Outputs:
            with torch.inference_mode(), precision.autocast():
                return model(inputs)

        return forward

    for mode in ("target", baseline):
        model = as_if_trained(create(mode), images)
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
            warnings.warn(f"{name}: not compiled, so that row is left out: {one_line(error)}", stacklevel=1)
        else:
            yield "target, deployed, compiled", Contender(compiled, TRAINED)
        if images.device.type == "cpu":
            convolutions = sum(isinstance(module, nn.Conv2d) for module in deployed.modules())
            for runtime, (fp32, int8, integers) in in_runtimes(name, model, images):
                yield fp32_in(runtime), Contender(forward_of(fp32), TRAINED, runtime)
                words = f"{integers} of {convolutions}"
                yield f"{fp32_in(runtime)} INT8", Contender(forward_of(int8), TRAINED, runtime, words)


def in_runtimes(name: str, model: nn.Module, images: Tensor) -> Iterator[tuple[str, InRuntime]]:
    """Yield by name what runs ONNX files, with the network in it.

    What is not installed, or cannot run the network, is left out with a warning.

    Args:
        name: of the network, for messages.
        model: the network, trained; it stays as it is.
        images: (N, C, H, W), on which INT8 is calibrated and the files are checked.
    """
    with tempfile.TemporaryDirectory() as folder:
        fp32, int8 = Path(folder, f"{name}-fp32.onnx"), Path(folder, f"{name}-int8.onnx")
        try:
            write_files(model, images, fp32, int8)
        except UserError as error:  # without the name: that an extra is missing is then said once
            warnings.warn(f"rows of onnxruntime and OpenVINO are left out: {one_line(error)}", stacklevel=1)
            return
        for runtime, load in ((ONNXRUNTIME, in_onnxruntime), (OPENVINO, in_openvino)):
            try:
                networks = load(fp32, int8)
            except UserError as error:
                warnings.warn(f"rows of {runtime} are left out: {one_line(error)}", stacklevel=1)
            else:
                yield runtime, networks


def write_files(model: nn.Module, images: Tensor, fp32: Path, int8: Path) -> None:
    """Write a network as ONNX.

    Raises:
        UserError: the extra is not installed; the network cannot be exported; onnxruntime computes something else.
    """
    from repopt import export, quantization  # an extra

    observed = quantization.prepare(model, images, "ptq", "default")
    quantization.calibrate(observed, [images])
    export.write_onnx(repopt.deploy(model), images, fp32)
    export.write_onnx(quantization.convert(observed), images, int8)


def in_onnxruntime(fp32: Path, int8: Path) -> InRuntime:
    """Return two files' networks in onnxruntime."""
    from repopt import export

    return InRuntime(export.OnnxNetwork(fp32), export.OnnxNetwork(int8), export.operations(int8)["QLinearConv"])


def in_openvino(fp32: Path, int8: Path) -> InRuntime:
    """Return two files' networks in OpenVINO."""
    from repopt.openvino import OpenVinoNetwork  # an extra

    network = OpenVinoNetwork(int8)
    return InRuntime(OpenVinoNetwork(fp32), network, network.count_integer_convolutions())


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


def difference(outputs: Outputs, reference: Outputs) -> float:
    """Return the largest difference, relative to the reference's largest number; of several outputs the largest one."""
    if isinstance(outputs, Mapping) and isinstance(reference, Mapping):
        return max(difference(outputs[name], reference[name]) for name in reference)
    assert isinstance(outputs, Tensor) and isinstance(reference, Tensor)
    return ((outputs.float() - reference.float()).abs().max() / reference.float().abs().max()).item()
