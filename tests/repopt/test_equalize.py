"""Equalization and bias correction: the float function stays, and INT8 comes closer to it."""

import copy

import pytest
import torch
from torch import nn

import repopt
from repopt import quantization


def layer(*arguments, bias=True, **options):
    """A convolution whose channels differ much."""
    conv = nn.Conv2d(*arguments, bias=bias, **options)
    with torch.no_grad():
        conv.weight.mul_(torch.exp2(torch.randint(-4, 5, (conv.out_channels, 1, 1, 1))))
    return conv


def chain():
    convs = (layer(3, 8, 3), layer(8, 8, 3, groups=8), layer(8, 6, 1, bias=False), layer(6, 8, 3, groups=2))
    layers = [part for conv in convs for part in (conv, nn.ReLU(inplace=True))]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


class Branched(nn.Module):
    """Convolutions between which something else stands, or which are used twice."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.twice, self.last = (layer(3 if i == 0 else 4, 4, 1) for i in range(4))

    def forward(self, x):
        x = self.first(x).relu()
        x = self.second(x) + x
        return self.last(self.twice(self.twice(x).relu()).relu().sigmoid())


def images(count=8, size=12):
    return torch.randn(count, 3, size, size, dtype=torch.float64)


@pytest.mark.parametrize("mode", ["repvgg", "target"])
def test_our_networks_stay_the_same_function(mode):
    model = repopt.create_model("RepOpt-VGG-nano", mode=mode, num_classes=10, layers=(2, 1, 2, 1)).double().eval()
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.normal_(norm.bias)
    x = images(4, 32)
    equalized = quantization.equalize(model, x)
    torch.testing.assert_close(equalized(x), model(x))
    before, after = (network.state_dict() for network in (repopt.deploy(model), equalized))
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    kernels = {name for name in before if name.endswith("conv.weight")}
    assert {name for name in changed if name.endswith("weight")} == kernels


def test_ranges_are_equal():
    model, x = chain().double().eval(), images()
    before = copy.deepcopy(model.state_dict())
    equalized = quantization.equalize(model, x)
    torch.testing.assert_close(equalized(x), model(x))
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name  # the model stays as it is
    first, depthwise, pointwise, grouped = (equalized[place].weight.abs() for place in (0, 2, 4, 6))
    last = grouped.view(2, 4, 3, -1).amax((1, 3)).flatten()
    for made, taken in (
        (first.amax((1, 2, 3)), depthwise.amax((1, 2, 3))),
        (depthwise.amax((1, 2, 3)), pointwise.amax((0, 2, 3))),
        (pointwise.amax((1, 2, 3)), last),
        (equalized[10].weight.abs().amax(1), equalized[12].weight.abs().amax(0)),
    ):
        torch.testing.assert_close(made, taken, rtol=1e-2, atol=0)


def test_what_is_not_alone_stays_as_it_is():
    model, x = Branched().double().eval(), images()
    equalized = quantization.equalize(model, x)
    for name, value in model.state_dict().items():
        assert torch.equal(value, equalized.state_dict()[name]), name


def test_a_channel_without_weights_keeps_its_bias():
    model, x = nn.Sequential(layer(3, 4, 3), nn.ReLU(), layer(4, 2, 1)).double().eval(), images()
    with torch.no_grad():
        model[0].weight[1] *= 1e-30
        model[2].weight[:, 2] = 0
    equalized = quantization.equalize(model, x)
    torch.testing.assert_close(equalized(x), model(x))
    for channel in (1, 2):
        assert torch.equal(equalized[0].bias[channel], model[0].bias[channel])


def errors(network, prepared, x):
    """Means of the error of INT8 over images, by channel."""
    return (quantization.convert(prepared)(x) - network(x)).mean(0).abs()


@torch.no_grad()
def test_mean_errors_go():
    """Of the last layer exactly, but for the rounding of its bias and what follows from that of the others'."""
    torch.manual_seed(0)
    model, x = chain().eval(), images(64).float()
    prepared = quantization.prepare(model, x, "ptq", "per_tensor")
    quantization.calibrate(prepared, [x])
    state = copy.deepcopy(prepared.state_dict())
    corrected = quantization.correct_biases(prepared, [x])
    assert errors(model, corrected, x).max() < 0.1 * errors(model, prepared, x).max()
    for name, value in prepared.state_dict().items():
        assert torch.equal(value, state[name]), name
    names = {
        name
        for name, value in corrected.network.state_dict().items()
        if not torch.equal(value, state[f"network.{name}"])
    }
    assert names == {f"{place}.bias" for place in (0, 2, 6, 10, 12)}


@torch.no_grad()
def test_the_error_of_one_layer_by_hand():
    """In two batches of unlike size; a bias is rounded to a step of its integers."""
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3)).eval(), images(12).float()
    prepared = quantization.prepare(model, x, "ptq", "per_tensor")
    quantization.calibrate(prepared, [x])
    error = (quantization.convert(prepared)(x) - model(x)).mean((0, 2, 3))
    corrected = quantization.correct_biases(prepared, x.split(8))
    bias = corrected.network.state_dict()["0.bias"]
    torch.testing.assert_close(bias, model[0].bias - error, rtol=1e-4, atol=1e-6)
