"""What OpenVINO makes of the files of repopt.export."""

import importlib
import sys

import onnx
import pytest
import torch
from test_quantize import images, network, outputs, quantized
from torch import nn

import repopt
from repopt import export, quantization
from repopt.errors import UserError

pytest.importorskip("openvino")
from repopt.openvino import OpenVinoNetwork

needs_vnni = pytest.mark.skipif(not torch.cpu._is_vnni_supported(), reason="OpenVINO's integers need VNNI")


def written(model, x, path, **metadata):
    export.write_onnx(model, x, path, metadata)
    return OpenVinoNetwork(path)


def test_float(tmp_path):
    deployed, x = repopt.deploy(network()), images()
    found = written(deployed, x, tmp_path / "fp32.onnx")
    for batch in (16, 3, 1):  # in bfloat16, which OpenVINO takes by itself on some CPUs, numbers have 8 bits
        assert export.relative_difference(found(x[:batch]), outputs(deployed, x[:batch])) < 1e-5
    assert found.count_integer_convolutions() == 0


@needs_vnni
@pytest.mark.parametrize("preset", quantization.PRESETS)
def test_int8_is_what_torch_computes_and_runs_on_integers(tmp_path, preset):
    """That of TensorRT, too, which onnxruntime computes in float; and what leaves the range is cut alike."""
    model, x = network(), images()
    _, int8 = quantized(model, preset=preset, x=0.3 * x)
    found = written(int8, x, tmp_path / "int8.onnx")
    assert found.count_integer_convolutions() == 6
    assert export.relative_difference(outputs(int8, x), outputs(model, x)) > 0.1
    assert export.relative_difference(found(x), outputs(int8, x)) < 0.05
    assert export.relative_difference(found(x[:5]), found(x)[:5]) < 0.05


class Block(nn.Module):
    """A depthwise convolution, an addition and a gate."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3)
        self.depthwise = nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.gate, self.head = nn.Conv2d(32, 32, 1), nn.Conv2d(32, 10, 3)

    def forward(self, x):
        x = self.stem(x).relu()
        x = x + self.depthwise(x).relu()
        return self.head(x * self.gate(x.mean((2, 3), keepdim=True)).sigmoid()).mean((2, 3))


@needs_vnni
def test_additions_and_gates_are_no_less_exact_than_in_torch(tmp_path):
    """OpenVINO does not round all that torch rounds: another network, as near to the float one."""
    model, x = Block().eval(), images()
    _, int8 = quantized(model, x=x)
    found = written(int8, x, tmp_path / "int8.onnx")
    assert found.count_integer_convolutions() == 4
    noise = export.relative_difference(outputs(int8, x), outputs(model, x))
    assert 0 < export.relative_difference(found(x), outputs(model, x)) < 1.2 * noise


@needs_vnni
def test_float_layers(tmp_path):
    model, x = network(), images()
    observed = quantization.prepare(model, x, "ptq", "default", None, ["stage1.0.conv"])
    quantization.calibrate(observed, [x])
    int8 = quantization.convert(observed)
    found = written(int8, x, tmp_path / "int8.onnx")
    assert found.count_integer_convolutions() == 5
    assert export.relative_difference(found(x), outputs(int8, x)) < 0.05


class TwoOutputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return {"mean": self.conv(x).mean((2, 3)), "map": self.conv(x)}


@pytest.mark.parametrize("multiple", [None, 32])
def test_says_what_onnxruntime_says_of_a_file(tmp_path, multiple):
    path = tmp_path / "two.onnx"
    export.write_onnx(TwoOutputs().eval(), images(2, 64), path, {"task": "both"}, multiple)
    found, expected = OpenVinoNetwork(path), export.OnnxNetwork(path)
    assert found.output_names == ("mean", "map")
    for name in ("input_shape", "output_names", "metadata", "training"):
        assert getattr(found, name) == getattr(expected, name), name
    x = images(3, 96 if multiple else 64).transpose(2, 3)  # not contiguous, and of another size where that will do
    torch.testing.assert_close(found(x), expected(x))


def test_no_network(tmp_path, capfd):
    path = tmp_path / "bad.onnx"
    with pytest.raises(UserError, match="there is no file"):
        OpenVinoNetwork(path)
    for content in (b"", b"not one"):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"OpenVINO cannot run '.*bad\.onnx': ") as error:
            OpenVinoNetwork(path)
        assert "\n" not in str(error.value)
    assert capfd.readouterr() == ("", "")
    export.write_onnx(nn.Conv2d(3, 4, 3).eval(), images(2), tmp_path / "a.onnx")
    model = onnx.load(tmp_path / "a.onnx")
    model.graph.node[0].op_type = "Convolve"
    onnx.save(model, path)
    with pytest.raises(UserError, match=r"cannot run .*bad\.onnx.*Convolve"):
        OpenVinoNetwork(path)


def test_integers_that_would_overflow_are_refused(tmp_path, monkeypatch):
    model, x = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 4, 1)).eval(), images(2)
    _, int8 = quantized(model, x=x)
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    assert written(model, x, tmp_path / "fp32.onnx")(x).shape == (2, 4, 30, 30)
    with pytest.raises(UserError, match="without VNNI"):
        written(int8, x, tmp_path / "int8.onnx")


def test_without_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    monkeypatch.delitem(sys.modules, "repopt.openvino")
    with pytest.raises(UserError, match=r"not installed \(pip install 'repopt\[openvino\]'\)"):
        importlib.import_module("repopt.openvino")
