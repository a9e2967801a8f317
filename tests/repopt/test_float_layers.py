"""Layers that stay in float, and how they are chosen."""

import copy
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


def decibels(signal, noisy):
    return 10 * math.log10(signal.square().sum() / (noisy - signal).square().sum())


def test_what_the_noise_of_a_layer_alone_does_to_the_logits(network):
    """By hand: its input and weights rounded, which are those of the float network, and all that follows in float."""
    x = images()
    expected, signal, logits = {}, x, network(x)
    for path in ("0", "2", "4", "6"):
        conv, following = network[int(path)], network[int(path) + 1 :]
        image = rounded(signal, 0, 255, symmetric=False)
        kernel = rounded(conv.weight, -127, 127, symmetric=True)
        expected[path] = decibels(logits, following(F.conv2d(image, kernel, conv.bias, padding=1)))
        signal = F.relu(conv(signal))
    prepared = calibrated(network, x)
    found = quantization.sensitivity(prepared, quantization.convert(prepared), [x])
    assert [*found] == [*expected, "10"]
    assert {path: found[path] for path in expected} == pytest.approx(expected, abs=1)
    assert quantization.most_sensitive(prepared, [x])[0] == WORST == min(expected, key=expected.__getitem__)


class Heads(nn.Module):
    """Two heads behind convolutions, a number for every image each; `collect` makes the output of what they give."""

    def __init__(self, collect):
        super().__init__()
        self.trunk = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 2, 3, padding=1))
        self.small, self.large = nn.Linear(200, 1), nn.Linear(200, 1)
        self.register_buffer("constant", torch.ones(2))
        self.collect = collect
        with torch.no_grad():
            self.large.weight.mul_(100)

    def forward(self, x):
        features = self.trunk(x).flatten(1)
        return self.collect(self.small(features), self.large(features), self.constant)


COLLECT = {
    "tensor": lambda small, large, constant: small,
    "tuple": lambda small, large, constant: (small, large),
    "dict": lambda small, large, constant: {"large": large, "small": {"anchors": constant, "small": small}},
}


@torch.no_grad()
def outputs_of(model, x):
    """Return those that layers make."""
    leaves = torch.utils._pytree.tree_leaves(model(x))
    return [leaf for leaf in leaves if len(leaf) == len(x)]


@pytest.mark.parametrize("collect", COLLECT.values(), ids=COLLECT)
def test_all_layers_at_once_as_each_layer_alone(collect):
    """Without ReLUs, and with outputs of one number by image, the first order and the random signs are exact."""
    torch.manual_seed(0)
    model, x = Heads(collect).double(), images().double()
    noisy = copy.deepcopy(model)
    with torch.no_grad():
        for param in noisy.parameters():
            param.add_(0.01 * torch.randn_like(param))
    prepared, other = (quantization.prepare(network, x, "ptq", "default") for network in (model, noisy))
    expected = {}
    for path in ("trunk.0", "trunk.1", "small", "large"):
        alone = copy.deepcopy(model)
        alone.set_submodule(path, noisy.get_submodule(path))
        pairs = [*zip(outputs_of(model, x), outputs_of(alone, x), strict=True)]
        relative = [((noisy - signal).square().sum() / signal.square().sum()).item() for signal, noisy in pairs]
        expected[path] = -10 * math.log10(sum(relative) / len(relative)) if any(relative) else math.inf
    for batches in ([x], x.split(10)):
        found = quantization.sensitivity(prepared, quantization.Int8(other.network), batches)
        assert found == pytest.approx(expected, rel=1e-9)


class Branches(nn.Module):
    """Two branches, of which the one that loses most in INT8 has next to no effect on the output."""

    def __init__(self):
        super().__init__()
        self.noisy, self.exact, self.last = (nn.Conv2d(size, 8, 3, padding=1) for size in (3, 3, 8))
        with torch.no_grad():
            self.noisy.weight[:, 0, 0, 0] *= 100
            self.last.weight.mul_(1e-6)

    def forward(self, x):
        return F.relu(self.exact(x)) + self.last(F.relu(self.noisy(x)))


def test_what_has_no_effect_on_the_output_comes_late():
    torch.manual_seed(0)
    model, x = Branches(), images()
    prepared = calibrated(model, x)
    ratios = quantization.signal_to_noise(prepared, quantization.convert(prepared), x)
    assert ratios["noisy"] < ratios["exact"] - 3  # both are first, with no noise but their own
    assert quantization.most_sensitive(prepared, [x])[0] == "exact"


def test_every_output_is_above_its_noise():
    torch.manual_seed(0)
    model, x = Heads(COLLECT["dict"]), images()

    def worst(names):
        prepared = calibrated(model, x, names)
        pairs = zip(outputs_of(model, x), outputs_of(quantization.convert(prepared), x), strict=True)
        return min(decibels(*pair) for pair in pairs)

    order = quantization.most_sensitive(calibrated(model, x), [x])
    wanted = (worst(order[:2]) + worst(order[:3])) / 2
    assert quantization.choose_float_layers(lambda names: calibrated(model, x, names), [x], wanted) == order[:3]


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
