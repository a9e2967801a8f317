"""ONNX files in OpenVINO on the CPU, a second runtime beside onnxruntime (`repopt.export.OnnxNetwork`).

Needs the extra openvino.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from typing_extensions import override

from repopt.errors import UserError, one_line
from repopt.runtime import FileNetwork

try:
    import openvino
    from openvino.frontend import FrontEndManager
except ImportError as error:
    raise UserError(f"OpenVINO is not installed (pip install 'repopt[openvino]'): {one_line(error)}") from None


class OpenVinoNetwork(FileNetwork):
    """A `FileNetwork` of an ONNX file, which OpenVINO runs.

    What is not integers is float32; by itself OpenVINO would take bfloat16 on CPUs that have it.

    Args:
        path: path of the file.
        threads: threads of OpenVINO; None = as many as torch uses.

    Raises:
        UserError: no such file, or no network of images that OpenVINO can run; one of integers, where the CPU has no
            VNNI: its sums of products of 8 bits would overflow.
    """

    def __init__(self, path: str | os.PathLike[str], threads: int | None = None) -> None:
        model = _read(Path(path))
        settings = {
            "INFERENCE_PRECISION_HINT": "f32",
            "INFERENCE_NUM_THREADS": threads or torch.get_num_threads(),
            "ENABLE_CPU_PINNING": False,  # processes would pin their threads to the same cores
        }
        try:
            compiled = openvino.Core().compile_model(model, "CPU", settings)
        except Exception as error:  # of many kinds, as an unknown operation
            raise _cannot_run(path, error) from None
        metadata = dict(model.get_rt_info()).get("framework", {})
        super().__init__(
            (size.get_length() if size.is_static else None for size in [*model.input().partial_shape][1:]),
            (output.any_name for output in model.outputs),
            {name: value.astype(str) for name, value in metadata.items()},
        )
        self._compiled = compiled

    @override
    def compute(self, images: Any) -> Iterable[Any]:
        return self._compiled(images).to_tuple()

    def count_integer_convolutions(self) -> int:
        """Count the convolutions that OpenVINO really computes with integers on this CPU."""
        nodes = [node.get_rt_info() for node in self._compiled.get_runtime_model().get_ops()]
        kinds = [(node["layerType"].astype(str), node["runtimePrecision"].astype(str)) for node in nodes]
        return sum(kind == "Convolution" and precision in ("i8", "u8") for kind, precision in kinds)


def _read(path: Path) -> openvino.Model:
    if not path.is_file():
        raise UserError(f"there is no file {str(path)!r}")
    frontend = FrontEndManager().load_by_framework("onnx")  # `openvino.Core` would try other formats, too, aloud
    try:
        model = frontend.convert(frontend.load(str(path)))
    except Exception as error:
        raise _cannot_run(path, error) from None
    shapes = [value.partial_shape for value in model.inputs]
    if len(shapes) != 1 or shapes[0].rank.is_dynamic or len(shapes[0]) != 4:
        raise UserError(f"OpenVINO cannot run {str(path)!r}: (N, C, H, W) is expected as its one input")
    if not torch.cpu._is_vnni_supported() and any(node.get_type_name() == "FakeQuantize" for node in model.get_ops()):
        raise UserError(f"OpenVINO would compute {str(path)!r} wrong: integers of 8 bits overflow on CPUs without VNNI")
    return model


def _cannot_run(path: str | os.PathLike[str], error: Exception) -> UserError:
    """Return the error that says why, without the lines of OpenVINO's own source that it lists first."""
    lines = [line for line in str(error).splitlines() if not line.startswith(("Exception from", "Check '"))]
    return UserError(f"OpenVINO cannot run {os.fspath(path)!r}: {one_line(RuntimeError(' '.join(lines)))}")
