"""A network as files that other software runs: ONNX, safetensors, torch.export packages.

Needs the extra deploy.
"""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from repopt.detection import EndToEnd
from repopt.detection.end_to_end import difference_of_objects
from repopt.errors import UserError, one_line
from repopt.quantization import Int8, export_program
from repopt.runtime import FileNetwork

try:
    import onnx
    import onnxruntime
    from onnxscript import opset20 as op
    from safetensors.torch import save as as_safetensors

    from repopt import onnx_graph
except ImportError as error:
    raise UserError(f"exporting needs more (pip install 'repopt[deploy]'): {one_line(error)}") from None

logger = logging.getLogger("repopt")

Metadata = Mapping[str, str]
Outputs = Tensor | list[Tensor] | Mapping[str, Tensor]

OPSET = 20
MAX_OBJECTS = 1000  # of a class in an image, where a file ends with non-maximum suppression
INPUT, OUTPUT = "images", "logits"  # of several outputs, those of a dict have its keys as names
# Between torch's and onnxruntime's outputs. Where a number is about halfway between two integers, float and integer
# arithmetic round it to different ones.
MAX_DIFFERENCE, MAX_DIFFERENCE_INT8 = 1e-3, 0.1


@torch.no_grad()
def write_onnx(
    model: nn.Module,
    images: Tensor,
    path: Path,
    metadata: Metadata = MappingProxyType({}),
    multiple: int | None = None,
    reference: nn.Module | None = None,
    difference: Callable[[Any, Any], float] | None = None,
) -> float:
    """Write a network as ONNX for batches of up to `quantization.MAX_BATCH` images, and check it with onnxruntime.

    Args:
        model: a deployed network, or `Int8`, whose integers are QuantizeLinear and DequantizeLinear pairs.
        images: (N, C, H, W), on which both are compared.
        path: path of the file; there is none yet.
        metadata: what the file says of itself.
        multiple: see `quantization.export_program`: by default height and width are fixed.
        reference: what it is compared with; None = the model.
        difference: of outputs and those of the reference; None = `relative_difference`.

    Returns:
        The difference of the outputs.

    Raises:
        UserError: the file exists, an operation cannot be exported, or onnxruntime computes something else.
    """
    with new_file(path) as temporary:
        exported = export_program(model, images, multiple)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of torch, about itself
                program = torch.onnx.export(
                    exported,
                    dynamo=True,
                    opset_version=OPSET,
                    input_names=[INPUT],
                    output_names=_output_names(exported),
                    custom_translation_table=_TRANSLATIONS,
                    verbose=False,
                )
        except Exception as error:  # of many kinds, with the exporter's own words
            raise UserError(f"{type(model).__name__} cannot be exported to ONNX: {_cause(error)}") from error
        assert program is not None
        program.model.graph.metadata_props.clear()
        for node in program.model.graph:
            node.metadata_props.clear()  # where in our code it was traced
        onnx_graph.name_batches(program.model.graph)
        if any(isinstance(module, Int8) for module in model.modules()):
            onnx_graph.separate_zero_points(program.model.graph)
            onnx_graph.pad_channels(program.model.graph)
            onnx_graph.round_biases(program.model.graph)
            onnx_graph.keep_float(program.model.graph)
        program.model.metadata_props.update(metadata)
        program.save(temporary)
        expected = (model if reference is None else reference)(images)
        found = (difference or relative_difference)(OnnxNetwork(temporary)(images), expected)
        if not found <= (MAX_DIFFERENCE_INT8 if isinstance(model, Int8) else MAX_DIFFERENCE):
            raise UserError(f"onnxruntime's outputs differ from torch's by {found:.2g}: {path.name} is not written")
    return found


def write_end_to_end(
    model: EndToEnd, images: Tensor, path: Path, metadata: Metadata = MappingProxyType({}), raw: Path | None = None
) -> float:
    """Write a detector as ONNX up to its objects, and compare these with what torch makes of the predictor's ONNX.

    Like that, numbers that integers round otherwise in torch do not count: they would change the order of objects. The
    predictor by itself is compared with torch's, as by `write_onnx`, whose result and errors these are.

    Args:
        model, images, path, metadata: see `write_onnx`.
        raw: the predictor's file; None = it is written, and not kept.
    """
    if raw is None:
        with tempfile.TemporaryDirectory() as folder:
            raw = Path(folder, path.name)
            write_onnx(model.predictor, images, raw)
            return write_end_to_end(model, images, path, metadata, raw)
    reference = model.on(OnnxNetwork(raw))
    if not (reference(images)["scores"] > 0).any():
        logger.warning("%s is checked on images in which nothing is found", path.name)
    return write_onnx(model, images, path, metadata, reference=reference, difference=difference_of_objects)


def _output_names(exported: torch.export.ExportedProgram) -> list[str]:
    outputs = exported.call_spec.out_spec
    if outputs is not None and outputs.type is dict:
        return list(outputs.context)
    count = len(exported.graph_signature.user_outputs)
    return [OUTPUT] if count == 1 else [f"features_{number}" for number in range(count)]


class OnnxNetwork(FileNetwork):
    """A `FileNetwork` of an ONNX file, which onnxruntime runs.

    Args:
        path: path of the file.
        threads: threads of onnxruntime; None = as many as torch uses.

    Raises:
        UserError: no such file, or no network that onnxruntime can run.
    """

    def __init__(self, path: str | os.PathLike[str], threads: int | None = None) -> None:
        session = _session(Path(path), threads=threads or torch.get_num_threads())
        shapes = [value.shape for value in session.get_inputs()]
        if len(shapes) != 1 or len(shapes[0]) != 4:
            raise UserError(f"{os.fspath(path)!r} takes something else than images (N, C, H, W)")
        super().__init__(
            (size if isinstance(size, int) else None for size in shapes[0][1:]),
            (output.name for output in session.get_outputs()),
            session.get_modelmeta().custom_metadata_map,
        )
        self._session = session

    @override
    def compute(self, images: Any) -> Iterable[Any]:
        return self._session.run(None, {self._session.get_inputs()[0].name: images})


def operations(path: str | os.PathLike[str]) -> Counter[str]:
    """Count what onnxruntime really runs of an ONNX file on this CPU: ``QLinearConv`` is a convolution of integers."""
    with tempfile.TemporaryDirectory() as folder:
        optimized = Path(folder, "optimized.onnx")
        _session(Path(path), threads=1, optimized=optimized)
        return Counter(node.op_type for node in onnx.load(optimized, load_external_data=False).graph.node)


def write_safetensors(model: nn.Module, path: Path, metadata: Metadata = MappingProxyType({})) -> None:
    """Write the weights of a network by name.

    Raises:
        UserError: the file exists.
    """
    with new_file(path) as temporary:
        weights = {name: value.contiguous() for name, value in model.state_dict().items()}
        temporary.write_bytes(as_safetensors(weights, dict(metadata)))


def write_program(
    model: nn.Module,
    images: Tensor,
    path: Path,
    metadata: Metadata = MappingProxyType({}),
    multiple: int | None = None,
) -> None:
    """Write a network as a torch.export program (``.pt2``), which `torch.export.load` reads.

    It takes batches of up to `quantization.MAX_BATCH` images. The metadata are extra files.

    Raises:
        UserError: the file exists; an operation cannot be exported.
    """
    with new_file(path) as temporary:
        torch.export.save(export_program(model, images, multiple), temporary, extra_files=dict(metadata))


def write_compiled(
    model: nn.Module,
    images: Tensor,
    path: Path,
    metadata: Metadata = MappingProxyType({}),
    multiple: int | None = None,
) -> None:
    """Compile a network ahead of time for this machine's kind (AOTInductor, ``.pt2``).

    C++ runs it without Python; in Python `torch._inductor.aoti_load_package` loads it.

    Raises:
        UserError: the file exists; it cannot be exported or compiled.
    """
    program = export_program(model, images, multiple)
    settings = {"freezing": True, "aot_inductor.metadata": dict(metadata)}
    with new_file(path) as temporary, torch._inductor.config.patch(settings):
        try:
            torch._inductor.aoti_compile_and_package(program, package_path=str(temporary))
        except Exception as error:  # whatever a missing or broken compiler makes of it
            raise UserError(f"{type(model).__name__} cannot be compiled: {_cause(error)}") from error


def relative_difference(outputs: Outputs, reference: Outputs) -> float:
    """Return the root of the mean square of the difference, relative to the reference's; of several, the largest.

    Not a number where an output is not, or is not zero like the reference.
    """
    if isinstance(outputs, Mapping) and isinstance(reference, Mapping):
        outputs, reference = [outputs[name] for name in reference], [*reference.values()]
    elif isinstance(outputs, Mapping):  # of a file, whose outputs have names, and of a network that gives a list
        outputs = [*outputs.values()]
    if isinstance(outputs, Tensor) and isinstance(reference, Tensor):
        outputs, reference = [outputs], [reference]
    powers = [
        ((found - own).square().mean(), own.square().mean()) for found, own in zip(outputs, reference, strict=True)
    ]
    return torch.stack([wrong if wrong == 0 else wrong / own for wrong, own in powers]).max().sqrt().item()


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Give a name beside `path` to write to; the file becomes `path` if all goes well.

    Raises:
        UserError: there is such a file.
    """
    refuse_existing(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_stem(f"{path.stem}.writing")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def refuse_existing(path: Path) -> None:
    """Refuse to write over what is there.

    Raises:
        UserError: there is such a file or folder.
    """
    if path.exists():
        raise UserError(f"{str(path)!r} exists, and is not written over: move it away, or write elsewhere")


def _session(path: Path, *, threads: int, optimized: Path | None = None) -> onnxruntime.InferenceSession:
    if not path.is_file():
        raise UserError(f"there is no file {str(path)!r}")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # errors
    # Without VNNI, CPUs add products of 8 bits in 16 bits, which overflow: then it is to take a slower way. It is not
    # asked to with VNNI, since on some of those CPUs it would, too.
    if not torch.cpu._is_vnni_supported():
        options.add_session_config_entry("session.x64quantprecision", "1")
    if optimized:
        options.optimized_model_filepath = str(optimized)
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its own kinds, which have no common base
        raise UserError(f"onnxruntime cannot run {str(path)!r}: {one_line(error)}") from None


def _cause(error: BaseException) -> str:
    """Return what is at the bottom of a chain of errors, on one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return one_line(error)


def _quantize_per_tensor(x: Any, scale: float, zero_point: int, quant_min: int, quant_max: int, dtype: Any) -> Any:
    """Translate torch's operation; the exporter's own function forgets a range that is not the type's whole one."""

    def constant(number: int) -> Any:
        return op.Cast(op.Constant(value_int=number), to=dtype)  # type: ignore[type-var]  # it takes any type's number

    quantized = op.QuantizeLinear(x, scale, constant(zero_point))
    if (quant_min, quant_max) in _WHOLE_RANGES:
        return quantized
    return op.Clip(quantized, constant(quant_min), constant(quant_max))


def _suppressed(boxes: Any, scores: Any, iou: float, threshold: float) -> Any:
    """Translate `repopt.nms.suppressed`."""
    limits: Any = [op.Constant(value_ints=[MAX_OBJECTS]), *(op.Constant(value_floats=[x]) for x in (iou, threshold))]
    kept = op.NonMaxSuppression(boxes, scores, *limits)
    return op.ScatterND(op.Mul(scores, op.Constant(value_float=0.0)), kept, op.GatherND(scores, kept))


_WHOLE_RANGES = {(0, 255), (-128, 127)}
_TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.quantized_decomposed.quantize_per_tensor.default: _quantize_per_tensor,
    torch.ops.repopt.suppressed.default: _suppressed,
}
