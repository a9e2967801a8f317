"""Calibrators against slow references: sums over every bin and every range, in float64."""

import math

import pytest
import torch
from torch import nn

from repopt import export, quantization
from repopt.errors import UserError
from repopt.quantization.calibrators import (
    CALIBRATORS,
    ENDS,
    EntropyObserver,
    MSEObserver,
    PercentileObserver,
)

AFFINE, SYMMETRIC = (
    (torch.uint8, torch.per_tensor_affine, 0, 7),
    (torch.int8, torch.per_tensor_symmetric, -4, 3),
)
NUMBERS = {
    "after a ReLU": lambda: torch.distributions.StudentT(3.0).sample((3000,)).relu(),
    "of both signs": lambda: torch.distributions.StudentT(3.0).sample((3000,)) + 0.5,
    "far from 0": lambda: 2 + torch.rand(3000),
    "one number": lambda: torch.full((3000,), 2.0),
}


def observed(calibrator, numbers, settings, **options):
    dtype, scheme, low, high = settings
    observer = calibrator(dtype=dtype, qscheme=scheme, quant_min=low, quant_max=high, **options)
    for part in numbers.split(1000):
        observer(part)
    return observer


class Reference:
    """The ranges that an observer chooses from, and what they lose."""

    def __init__(self, observer):
        self.low, self.high = observer.quant_min, observer.quant_max
        self.symmetric = observer.qscheme == torch.per_tensor_symmetric
        self.first, self.last = observer.min_val.item(), observer.max_val.item()
        self.width = (self.last - self.first) / observer.bins
        self.seen = observer.histogram.tolist()
        self.bins = [self.first + (place + 0.5) * self.width for place in range(observer.bins)]

    def ranges(self):
        parts = [part / ENDS for part in range(ENDS, 0, -1)]
        if self.symmetric:
            return [(-part * self.largest, part * self.largest) for part in parts]
        return [(a * min(0, self.first), b * max(0, self.last)) for a in parts for b in parts]

    @property
    def largest(self):
        return max(-self.first, self.last)

    def integer(self, number, start, end):
        if self.symmetric:
            scale, zero = max(-start, end) / ((self.high - self.low) / 2), 0
        else:
            scale = (end - start) / (self.high - self.low)
            zero = self.low - round(start / scale)
        integer = min(self.high, max(self.low, round(number / scale) + zero))
        return integer, (integer - zero) * scale

    def squared_error(self, start, end):
        errors = [number - self.integer(number, start, end)[1] for number in self.bins]
        return sum(count * error**2 for count, error in zip(self.seen, errors, strict=True))

    def divergence(self, start, end):
        seen = [*self.seen]
        if self.first <= 0 <= self.last:
            zero = min(range(len(seen)), key=lambda place: abs(self.bins[place]))
            beside = [seen[place] for place in (zero - 1, zero + 1) if 0 <= place < len(seen)]
            seen[zero] = sum(beside) / len(beside)
        inside = [place for place, number in enumerate(self.bins) if start <= number <= end]
        if not inside or not any(seen[place] for place in inside):
            return math.inf
        expected = {place: seen[place] for place in inside}
        expected[inside[0]] += sum(seen[: inside[0]])
        expected[inside[-1]] += sum(seen[inside[-1] + 1 :])
        groups = {}
        for place in inside:
            if seen[place]:
                groups.setdefault(self.integer(self.bins[place], start, end)[0], []).append(place)
        spread = dict.fromkeys(inside, 0.0)
        for places in groups.values():
            spread |= dict.fromkeys(places, sum(seen[place] for place in places) / len(places))
        total, kept = sum(expected.values()), sum(spread.values())
        divergence = 0.0
        for place in inside:
            if expected[place]:
                p, q = expected[place] / total, spread[place] / kept
                divergence += p * math.log(p / q) if q else math.inf
        return divergence


@pytest.mark.parametrize("numbers", NUMBERS)
@pytest.mark.parametrize("settings", [AFFINE, SYMMETRIC], ids=["affine", "symmetric"])
@pytest.mark.parametrize(
    ("calibrator", "loss"), [(MSEObserver, Reference.squared_error), (EntropyObserver, Reference.divergence)]
)
def test_no_range_loses_less(calibrator, loss, settings, numbers):
    observer = observed(calibrator, NUMBERS[numbers](), settings, bins=32)
    start, end = (value.item() for value in observer._non_linear_param_search())
    reference = Reference(observer)
    nearest = min(reference.ranges(), key=lambda range: abs(range[0] - start) + abs(range[1] - end))
    assert (start, end) == pytest.approx(nearest, rel=1e-5, abs=1e-6)
    least = min(loss(reference, *range) for range in reference.ranges())
    assert loss(reference, *nearest) == pytest.approx(least, rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("settings", [(*AFFINE[:2], 0, 255), (*SYMMETRIC[:2], -128, 127)], ids=["affine", "symmetric"])
def test_the_error_of_the_numbers_themselves_is_least(settings):
    """Of all calibrators', to what 2,048 bins do not tell."""
    numbers = torch.randn(100_000)
    errors = {}
    for name, calibrator in CALIBRATORS.items():
        scale, zero_point = observed(calibrator, numbers, settings).calculate_qparams()
        rounded = torch.fake_quantize_per_tensor_affine(numbers, scale, zero_point.int(), *settings[2:])
        errors[name] = (rounded - numbers).square().mean().item()
    assert errors["mse"] <= 1.02 * min(errors.values())
    assert errors["mse"] < 0.9 * errors["minmax"]


@pytest.mark.parametrize("numbers", NUMBERS)
def test_percentiles(numbers):
    x = NUMBERS[numbers]().repeat(4)
    observer = observed(PercentileObserver, x, (*AFFINE[:2], 0, 255))
    found = torch.stack(observer._non_linear_param_search()).double()
    expected = torch.quantile(x.double(), torch.tensor([1e-4, 1 - 1e-4]).double())
    bin_width = (x.max() - x.min()).item() / observer.bins
    # Where observations are joined, a number may move to the bin beside.
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2 * bin_width + 1e-5)


def test_from_smallest_to_largest():
    x = torch.randn(1000)
    scale, zero_point = observed(CALIBRATORS["minmax"], x, (*AFFINE[:2], 0, 255)).calculate_qparams()
    assert scale.item() == pytest.approx((x.max() - x.min()).item() / 255)
    assert zero_point.item() == round(-x.min().item() / scale.item())


class TestNetworks:
    def quantized(self, model, x, *arguments):
        prepared = quantization.prepare(model, x, "ptq", *arguments)
        quantization.calibrate(prepared, x.split(8))
        return prepared, quantization.convert(prepared)

    @pytest.fixture(scope="class")
    def network(self):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
        return model.eval().requires_grad_(requires_grad=False)

    @pytest.mark.parametrize("preset", ["default", "tensorrt"])
    @pytest.mark.parametrize("name", CALIBRATORS)
    def test_activations_are_calibrated_so_and_weights_as_the_preset_says(self, network, name, preset):
        x = torch.randn(16, 3, 12, 12)
        prepared, int8 = self.quantized(network, x, preset, name)
        assert 0 < export.relative_difference(int8(x), network(x)) < 0.1
        kinds = [type(module) for module in prepared.network.modules() if hasattr(module, "calculate_qparams")]
        per_channel = CALIBRATORS["minmax"].__name__.replace("Min", "PerChannelMin", 1)
        assert sum(kind is CALIBRATORS[name] for kind in kinds) == 3
        assert [kind.__name__ for kind in kinds if kind is not CALIBRATORS[name]] == [per_channel] * 3

    @pytest.mark.parametrize(("preset", "own"), [("default", "histogram"), ("per_tensor", "minmax")])
    def test_presets_have_their_own(self, network, preset, own):
        x = torch.randn(16, 3, 12, 12)
        found = [self.quantized(network, x, preset, *named)[1](x) for named in ((), (own,))]
        assert torch.equal(*found)

    def test_a_state_dict_brings_the_ranges_back(self, network):
        x = torch.randn(16, 3, 12, 12)
        prepared, int8 = self.quantized(network, x, "default", "entropy")
        again = quantization.prepare(network, x, "ptq", "default", "entropy")
        quantization.load(again, prepared.state_dict())
        assert torch.equal(quantization.convert(again)(x), int8(x))

    def test_mistakes(self, network):
        x = torch.randn(2, 3, 12, 12)
        with pytest.raises(UserError, match="unknown calibrator 'entropie'; did you mean 'entropy'"):
            quantization.prepare(network, x, "ptq", "default", "entropie")
        with pytest.raises(UserError, match="takes no calibrator"):
            quantization.prepare(network, x, "qat", "default", "mse")


class TestSmallWeights:
    """Channels, and whole layers, of weights that torchao's own smallest scales would make 0."""

    def no_weights(self, layers):
        layers[0].weight[1], layers[0].bias[1] = 0, 0

    def a_constant(self, layers):
        """Whose integer is more than 32 bits of the smallest steps of weights."""
        layers[0].weight[1] *= 1e-12
        layers[0].bias[1] = 20.0

    def a_layer(self, layers):
        layers[-1].weight *= 1e-9
        layers[-1].bias *= 1e-9

    @pytest.mark.parametrize("change", [no_weights, a_constant, a_layer])
    @pytest.mark.parametrize("preset", ["default", "per_tensor"])
    @pytest.mark.parametrize("method", ["ptq", "qat"])
    @torch.no_grad()
    def test_int8_is_the_float_function(self, method, preset, change, tmp_path):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
        change(self, [layer for layer in model if isinstance(layer, nn.Conv2d)])
        x = torch.randn(16, 3, 8, 8)
        prepared = quantization.prepare(model, x, method, preset)
        quantization.calibrate(prepared, [x])
        int8 = quantization.convert(prepared)
        assert export.relative_difference(int8(x), model(x)) < 0.03
        again = quantization.prepare(model, x, method, preset)
        quantization.load(again, {name: value.clone() for name, value in prepared.state_dict().items()})
        assert torch.equal(quantization.convert(again)(x), int8(x))
        export.write_onnx(int8, x, tmp_path / "int8.onnx")
        assert export.relative_difference(export.OnnxNetwork(tmp_path / "int8.onnx")(x), int8(x)) < 0.01
