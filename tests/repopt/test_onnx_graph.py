"""What is made of exported graphs for onnxruntime: the numbers stay, and what runs is what should."""

import pytest
import torch
from torch import nn

import repopt
from repopt import quantization

onnx = pytest.importorskip("onnx")
export = pytest.importorskip("repopt.export", exc_type=repopt.UserError)
onnx_graph = pytest.importorskip("repopt.onnx_graph")

IMAGES = (4, 3, 12, 12)


class Gated(nn.Module):
    """Depthwise convolutions with a shortcut around, and a gate behind."""

    def __init__(self, channels):
        super().__init__()
        self.stem, self.wide = nn.Conv2d(3, channels, 3), nn.Conv2d(channels, 44, 1)
        self.deep, self.far = nn.Conv2d(44, 44, 3, padding=1, groups=44), nn.Conv2d(44, 44, 5, padding=2, groups=44)
        self.gate, self.last = nn.Conv2d(44, 44, 1), nn.Conv2d(44, 48, 1)
        self.classifier = nn.Linear(48, 5)

    def features(self, x):
        x = self.wide(self.stem(x).relu())
        x = self.far(x) + self.deep(x).relu()
        return x * nn.functional.hardsigmoid(self.gate(x.mean((2, 3), keepdim=True)))

    def forward(self, x):
        return self.classifier(self.last(self.features(x)).relu().mean((2, 3)))


def int8_of(model, preset="per_tensor", **settings):
    """Its INT8 network and images; under "per_tensor" no layer stays in float by itself."""
    images = torch.randn(IMAGES)
    prepared = quantization.prepare(model.eval(), images, "ptq", preset, **settings)
    quantization.calibrate(prepared, [images])
    return quantization.convert(prepared), images


def kernels(path):
    """The shapes of its convolutions' kernels."""
    return [list(tensor.dims) for tensor in onnx.load(path).graph.initializer if len(tensor.dims) == 4]


@pytest.mark.parametrize("preset", ["per_tensor", "default"])
@pytest.mark.parametrize("float_layers", [[], ["wide", "deep"]])
def test_padded_channels_change_nothing(tmp_path, monkeypatch, preset, float_layers):
    torch.manual_seed(0)
    int8, images = int8_of(Gated(20), preset, float_layers=float_layers)
    padded, plain = tmp_path / "padded.onnx", tmp_path / "plain.onnx"
    export.write_onnx(int8, images, padded)
    monkeypatch.setattr(onnx_graph, "LANES", 1)
    export.write_onnx(int8, images, plain)
    assert kernels(plain) != kernels(padded)
    assert kernels(padded) == [
        [-(-out // 16) * 16, width if width in (1, 3) else -(-width // 16) * 16, *sides]
        for out, width, *sides in kernels(plain)
    ]
    onnx.checker.check_model(onnx.load(padded), full_check=True)
    expected = export.OnnxNetwork(plain)(images)
    assert expected.std() > 1e-3
    torch.testing.assert_close(export.OnnxNetwork(padded)(images), expected, rtol=1e-5, atol=1e-6)


def test_channels_that_others_see_are_not_padded(tmp_path):
    """The network's own outputs, of 44 channels; a linear layer; pairs of channels."""
    features = Gated(20)
    features.forward = features.features
    shuffled = nn.Sequential(nn.Conv2d(3, 20, 3), nn.PixelShuffle(2), nn.Conv2d(5, 16, 1))
    linear = nn.Sequential(nn.Conv2d(3, 20, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(20, 5))
    grouped = nn.Sequential(nn.Conv2d(3, 20, 3), nn.Conv2d(20, 20, 3, groups=5), nn.Conv2d(20, 16, 1))
    for number, model in enumerate((features, shuffled, linear, grouped)):
        int8, images = int8_of(model)
        export.write_onnx(int8, images, tmp_path / f"{number}.onnx")
        shapes = [list(value.shape) for value in int8.state_dict().values() if value.dim() == 4]
        assert sorted(kernels(tmp_path / f"{number}.onnx")) == sorted(shapes)


class Scaled(nn.Module):
    """Convolutions whose channels are scaled between, by constants."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 24, 3), nn.Conv2d(24, 48, 1)
        self.scale = nn.Parameter(torch.linspace(0.5, 2, 24).view(24, 1, 1))

    def forward(self, x):
        return self.last(self.first(x) * self.scale)


@pytest.mark.parametrize(
    "model", [Scaled(), nn.Sequential(nn.Conv2d(3, 24, 3), nn.Conv2d(24, 8, 3, groups=8), nn.Conv2d(8, 48, 1))]
)
def test_constants_by_channel_and_groups_of_channels_are_not_padded(tmp_path, model):
    int8, images = int8_of(model)
    assert export.write_onnx(int8, images, tmp_path / "int8.onnx") < 0.05
    assert {shape[0] for shape in kernels(tmp_path / "int8.onnx")} <= {8, 24, 48}


def test_the_linear_layer_runs_on_integers(tmp_path):
    int8, images = int8_of(Gated(20))
    export.write_onnx(int8, images, tmp_path / "int8.onnx")
    runs = export.operations(tmp_path / "int8.onnx")
    assert (runs["QGemm"], runs["Gemm"]) == (1, 0)


def test_small_layers_stay_in_float_with_those_that_only_they_read(tmp_path):
    """By the presets of which onnxruntime has integer kernels; a depthwise convolution of 44 channels pays."""
    model = nn.Sequential(
        nn.Conv2d(3, 20, 3),  # 27 products, but read by small ones alone
        nn.Conv2d(20, 20, 1),
        nn.Conv2d(20, 20, 5, groups=20),
        nn.Conv2d(20, 44, 1),
        nn.Conv2d(44, 44, 3, groups=44),
        nn.Conv2d(44, 20, 1),
    )
    for preset, small in (("default", {"0", "1", "2"}), ("fbgemm", {"0", "1", "2"}), ("tensorrt", set())):
        int8, _ = int8_of(model, preset)
        in_float = {name for name, value in int8.state_dict().items() if value.dim() == 4 and value.is_floating_point()}
        assert in_float == {f"network.{name}.weight" for name in small}
