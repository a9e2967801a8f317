"""Layers that stay in float, and how they are chosen."""

import math

import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from repopt import export, quantization
from repopt.errors import UserError


def images(count=32):
    return torch.randn(count, 3, 10, 10)


@pytest.fixture(scope="module")
def network():
    """Of four convolutions, the third of which loses most in INT8: a few of its weights are much larger."""
    torch.manual_seed(0)
    convs = [nn.Conv2d(3, 8, 3, padding=1), *(nn.Conv2d(8, 8, 3, padding=1) for _ in range(3))]
    with torch.no_grad():
        convs[2].weight[:, 0, 0, 0] *= 100
    layers = [part for conv in convs for part in (conv, nn.ReLU())]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    return model.eval().requires_grad_(requires_grad=False)


WORST = "4"


def calibrated(model, x, float_layers=(), method="ptq"):
    prepared = quantization.prepare(model, x, method, "per_tensor", None, float_layers)
    quantization.calibrate(prepared, [x])
    return prepared


def noise_of_logits(model, x, float_layers=()):
    prepared = calibrated(model, x, float_layers)
    return [*quantization.signal_to_noise(prepared, quantization.convert(prepared), x).values()][-1]


def rounded(x, low, high, *, symmetric):
    smallest, largest = min(0.0, x.min().item()), max(0.0, x.max().item())
    scale = (max(-smallest, largest) * 2 if symmetric else largest - smallest) / (high - low)
    zero_point = 0 if symmetric else low - round(smallest / scale)
    return ((x / scale).round() + zero_point).clamp(low, high).sub(zero_point) * scale


def test_the_noise_of_a_layer_alone(network):
    """By hand: its input and weights rounded, which are those of the float network; in parts as in one."""
    x = images()
    expected, signal = {}, x
    for path in ("0", "2", "4", "6"):
        conv = network[int(path)]
        image = rounded(signal, 0, 255, symmetric=False)
        kernel = rounded(conv.weight, -127, 127, symmetric=True)
        noisy, signal = F.relu(F.conv2d(image, kernel, conv.bias, padding=1)), F.relu(conv(signal))
        expected[path] = 10 * math.log10(signal.square().sum() / (noisy - signal).square().sum())
    prepared = calibrated(network, x)
    int8 = quantization.convert(prepared)
    found = quantization.sensitivity(prepared, int8, [x])
    assert [*found] == [*expected, "10"]
    assert {path: found[path] for path in expected} == pytest.approx(expected, abs=0.1)
    assert quantization.sensitivity(prepared, int8, x.split(10)) == pytest.approx(found, abs=1e-3)
    assert quantization.most_sensitive(prepared, [x])[0] == WORST == min(expected, key=expected.__getitem__)


def test_the_network_passes_on_what_a_layer_alone_does_not(network):
    x = images()
    prepared = calibrated(network, x)
    int8 = quantization.convert(prepared)
    alone, after = quantization.sensitivity(prepared, int8, [x]), quantization.signal_to_noise(prepared, int8, x)
    assert after["0"] == pytest.approx(alone["0"])
    assert after["6"] < alone["6"] - 3


def test_float_layers_are_float_in_the_file(network, tmp_path):
    """Also between integers, where onnxruntime would quantize their kernels; and the rest is more exact for it."""
    x = images()
    ratios = []
    for names in ((), (WORST,), (WORST, "2"), ("10",)):
        prepared = calibrated(network, x, names)
        int8 = quantization.convert(prepared)
        path = tmp_path / f"{len(ratios)}.onnx"
        assert export.write_onnx(int8, x, path) < 0.02
        kernels = {name for name, value in int8.state_dict().items() if value.dim() > 1 and value.is_floating_point()}
        assert kernels == {f"network.{name}.weight" for name in names}
        runs = export.operations(path)
        convolutions = sum(name != "10" for name in names)
        assert runs["QLinearConv"] == 4 - convolutions
        assert runs["Conv"] + runs["FusedConv"] == convolutions
        onnx.checker.check_model(onnx.load(path), full_check=True)
        ratios.append([*quantization.signal_to_noise(prepared, int8, x).values()][-1])
    assert min(ratios[1:3]) > ratios[0] + 3


def test_batch_norms_of_float_layers_are_folded(tmp_path):
    """In QAT, too, where torchao folds those of quantized layers alone; and it is trained as it is converted."""
    torch.manual_seed(0)
    parts = [(nn.Conv2d(size, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU()) for size in (3, 4)]
    model, x = nn.Sequential(*(part for block in parts for part in block)), images()
    model.train()(x)
    float_network = model.eval()(x)
    prepared = calibrated(model, x, ("3",), "qat")
    assert len([*prepared.parameters()]) == len([*model.parameters()])
    prepared.train()(x).sum().backward()
    assert all(param.grad is not None for param in prepared.parameters())
    prepared = calibrated(model, x, ("3",), "qat")
    with torch.no_grad():
        int8 = quantization.convert(prepared)
        assert export.relative_difference(int8(x), prepared.eval()(x)) < 0.01
        assert export.relative_difference(int8(x), float_network) < 0.02
        export.write_onnx(int8, x, tmp_path / "int8.onnx")
    runs = export.operations(tmp_path / "int8.onnx")
    assert (runs["QLinearConv"], runs["Conv"] + runs["FusedConv"], runs["BatchNormalization"]) == (1, 1, 0)


def test_as_few_as_it_takes(network):
    x = images()
    order = quantization.most_sensitive(calibrated(network, x), [x])
    ratios = [noise_of_logits(network, x, order[:count]) for count in range(6)]
    made = []

    def make(names):
        made.append(names)
        return calibrated(network, x, names)

    wanted = (ratios[0] + ratios[1]) / 2
    assert quantization.choose_float_layers(make, [x], wanted) == order[:1]
    assert len(made) <= 4  # by bisection
    assert quantization.choose_float_layers(make, [x], ratios[0] - 1) == []
    assert quantization.choose_float_layers(make, [x], 1000) == order


@pytest.mark.parametrize("method", ["ptq", "qat"])
def test_no_such_layer_is_one_line(network, method):
    with pytest.raises(UserError, match=r"unknown layer 'stage0'.*allowed: 0, 10, 2, 4, 6"):
        quantization.prepare(network, images(), method, "default", None, ["stage0"])
