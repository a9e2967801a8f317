"""How numbers become integers: the presets, and what torchao is told of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torchao.quantization import pt2e
from torchao.quantization.pt2e import quantizer as ao
from typing_extensions import override

from repopt.errors import unknown
from repopt.quantization.calibrators import CALIBRATORS

AVERAGED_BATCHES = 100  # that count in the range of an activation, while training for INT8
_MIN_STEP = 1e-15  # between integers; a product of two is still far from the smallest float


@dataclass(frozen=True)
class Preset:
    """How numbers become integers.

    Attributes:
        meaning: description in a line.
        activations, weights: ranges of the integers; a range around 0 is symmetric, one from 0 on is affine.
        per_channel: whether every output channel's weights have a scale of their own.
        calibrator: how PTQ chooses the activations' ranges, a key of `CALIBRATORS`.
        smallest: layers below this size stay in float, see `graph.small_layers`; 0 = none do.
    """

    meaning: str
    activations: tuple[int, int] = (0, 255)
    weights: tuple[int, int] = (-127, 127)
    per_channel: bool = True
    calibrator: str = "histogram"
    smallest: int = 0


# A 3x3 convolution of a colour image has so many products per output. With fewer, and fewer channels, onnxruntime's
# integer kernels take longer than its float ones (docs/performance.md).
_SMALLEST_THAT_PAYS = 27
PRESETS = {
    "default": Preset("8-bit weights per channel, 8-bit activations by histogram", smallest=_SMALLEST_THAT_PAYS),
    "fbgemm": Preset(
        "8-bit weights per channel, 7-bit activations by histogram",
        (0, 127),
        (-128, 127),
        smallest=_SMALLEST_THAT_PAYS,
    ),
    "per_tensor": Preset(
        "8-bit weights per tensor, 8-bit activations from smallest to largest", per_channel=False, calibrator="minmax"
    ),
    "tensorrt": Preset(  # onnxruntime has no integer kernels for it on CPUs, and computes in float
        "8-bit weights per channel, 8-bit activations around 0 by histogram, for TensorRT", (-128, 127)
    ),
}


def find_preset(name: str) -> Preset:
    """Return a preset by its name.

    Raises:
        UserError: there is none; the nearest one is named.
    """
    if name not in PRESETS:
        raise unknown("quantization preset", name, PRESETS)
    return PRESETS[name]


class FakeQuantizedActivation(pt2e.FusedMovingAvgObsFakeQuantize):
    """Rounding of activations in training, whose ranges an evaluation leaves as they are.

    INT8 takes over its scale; torchao's observers compute it anew by another formula.
    """

    @override
    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        return self.scale, self.zero_point


def specs_of(preset: Preset, *, fake: bool) -> tuple[ao.QuantizationSpec, ao.QuantizationSpec]:
    """Return torchao's specifications of activations and of weights; with `fake` for QAT, else for PTQ."""
    if fake:
        per_tensor, per_channel = pt2e.MovingAverageMinMaxObserver, pt2e.MovingAveragePerChannelMinMaxObserver
        activations = FakeQuantizedActivation.with_args(observer=per_tensor, averaging_constant=1 / AVERAGED_BATCHES)
        weights = pt2e.FakeQuantize.with_args(  # not the fused one, whose scales are 6e-5 at least
            observer=per_channel if preset.per_channel else per_tensor,
            averaging_constant=1.0,  # those of the last step alone
            eps=_MIN_STEP,
        )
    else:
        activations = CALIBRATORS[preset.calibrator].with_args(eps=_MIN_STEP)
        weights = pt2e.PerChannelMinMaxObserver if preset.per_channel else pt2e.MinMaxObserver
        weights = weights.with_args(eps=_MIN_STEP)
    symmetric = preset.activations[0] < 0
    return (
        ao.QuantizationSpec(
            torch.int8 if symmetric else torch.uint8,
            activations,
            *preset.activations,
            qscheme=torch.per_tensor_symmetric if symmetric else torch.per_tensor_affine,
        ),
        ao.QuantizationSpec(
            torch.int8,
            weights,
            *preset.weights,
            qscheme=torch.per_channel_symmetric if preset.per_channel else torch.per_tensor_symmetric,
            ch_axis=0 if preset.per_channel else None,
        ),
    )
