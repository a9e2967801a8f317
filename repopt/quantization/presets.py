"""How numbers become integers: the presets, and what torchao is told of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torchao.quantization import pt2e
from torchao.quantization.pt2e import quantizer as ao
from typing_extensions import override

from repopt.errors import unknown

AVERAGED_BATCHES = 100  # that count in the range of an activation, while training for INT8
_MIN_STEP = 1e-6  # of a weight: the bias of a channel without weights is an integer of 32 bits of such steps


@dataclass(frozen=True)
class Preset:
    """How numbers become integers.

    Attributes:
        meaning: description in a line.
        activations, weights: ranges of the integers; a range around 0 is symmetric, one from 0 on is affine.
        per_channel: whether every output channel's weights have a scale of their own.
        histogram: whether PTQ chooses the activations' range by their histogram, instead of from min to max.
    """

    meaning: str
    activations: tuple[int, int] = (0, 255)
    weights: tuple[int, int] = (-127, 127)
    per_channel: bool = True
    histogram: bool = True


PRESETS = {
    "default": Preset("8-bit weights per channel, 8-bit activations by histogram"),
    "fbgemm": Preset("8-bit weights per channel, 7-bit activations by histogram", (0, 127), (-128, 127)),
    "per_tensor": Preset(
        "8-bit weights per tensor, 8-bit activations from smallest to largest", per_channel=False, histogram=False
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


class FakeQuantize(pt2e.FusedMovingAvgObsFakeQuantize):
    """Rounding in training whose scale INT8 takes over; torchao's observers compute it anew by another formula."""

    @override
    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        return self.scale, self.zero_point


class FakeQuantizedActivation(FakeQuantize):
    """Rounding of activations, whose ranges an evaluation leaves as they are."""


def specs_of(preset: Preset, *, fake: bool) -> tuple[ao.QuantizationSpec, ao.QuantizationSpec]:
    """Return torchao's specifications of activations and of weights; with `fake` for QAT, else for PTQ."""
    if fake:
        per_tensor, per_channel = pt2e.MovingAverageMinMaxObserver, pt2e.MovingAveragePerChannelMinMaxObserver
        activations = FakeQuantizedActivation.with_args(observer=per_tensor, averaging_constant=1 / AVERAGED_BATCHES)
        weights = FakeQuantize.with_args(
            observer=per_channel if preset.per_channel else per_tensor,
            averaging_constant=1.0,  # those of the last step alone
        )
    else:
        activations = pt2e.HistogramObserver if preset.histogram else pt2e.MinMaxObserver
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
