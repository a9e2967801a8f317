"""Calibrators: how the range of an activation is chosen, after training (PTQ), from all that is seen of it.

torchao observes, and makes scale and zero point of a range; here is only the choice of a range that it does not have.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor
from torchao.quantization import pt2e
from typing_extensions import override

from repopt.errors import unknown

PERCENTILE = 99.99
ENDS = 64  # places at which a range may end on either side of 0, from the last number that was seen inwards

_integers = torch.ops.quantized_decomposed.quantize_per_channel.default
_numbers = torch.ops.quantized_decomposed.dequantize_per_channel.default


class PercentileObserver(pt2e.HistogramObserver):
    """From the 0.01th to the 99.99th percentile (`PERCENTILE`), to a bin."""

    @override
    def _non_linear_param_search(self) -> tuple[Tensor, Tensor]:
        share = self.histogram.double().cumsum(0) / self.histogram.double().sum()
        cut, bin_width = 1 - PERCENTILE / 100, (self.max_val - self.min_val) / self.bins
        first, last = (share <= cut).sum(), (share < 1 - cut).sum()
        return self.min_val + first * bin_width, self.min_val + (last + 1) * bin_width


class SearchingObserver(pt2e.HistogramObserver):
    """The range, of those that contain 0, whose integers lose least of the histogram; see `losses`."""

    @override
    def _non_linear_param_search(self) -> tuple[Tensor, Tensor]:
        seen = self._histogram()
        found, least = (self.min_val, self.max_val), torch.inf
        for lows, highs in self._ranges():
            scales, zero_points = self._calculate_qparams(lows, highs)
            settings = (scales, zero_points, 0, self.quant_min, self.quant_max, self.dtype)
            integers = _integers(self._centres().expand(len(lows), -1), *settings)
            inside = (self._centres() >= lows[:, None]) & (self._centres() <= highs[:, None])
            losses = self.losses(seen, integers.long() - self.quant_min, _numbers(integers, *settings), inside)
            least_of_these, place = losses.nan_to_num(torch.inf).min(0)
            if least_of_these < least:
                found, least = (lows[place], highs[place]), least_of_these.item()
        return found

    @abstractmethod
    def losses(self, seen: Tensor, integers: Tensor, numbers: Tensor, inside: Tensor) -> Tensor:
        """Return what ranges lose, (ranges,).

        Args:
            seen: how often the numbers of a bin were seen, (bins,).
            integers: that stand for the bins, from 0 on, (ranges, bins).
            numbers: that the integers stand for, (ranges, bins).
            inside: which bins lie in a range, (ranges, bins).
        """

    def _histogram(self) -> Tensor:
        return self.histogram

    def _centres(self) -> Tensor:
        """Return the numbers in the middle of the bins."""
        bin_width = (self.max_val - self.min_val) / self.bins
        return self.min_val + (torch.arange(self.bins, device=self.min_val.device) + 0.5) * bin_width

    def _ranges(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the ranges to choose from, ends and ends, the widest first."""
        parts = torch.arange(ENDS, 0, -1, device=self.min_val.device) / ENDS
        low, high = self.min_val.clamp(max=0), self.max_val.clamp(min=0)
        if self.qscheme == torch.per_tensor_symmetric:
            ends = torch.maximum(-low, high) * parts
            yield -ends, ends
        else:
            for end in (low * parts).unique():
                yield end.expand(ENDS), high * parts


class MSEObserver(SearchingObserver):
    """The least mean of the squared error of rounding and cutting."""

    @override
    def losses(self, seen: Tensor, integers: Tensor, numbers: Tensor, inside: Tensor) -> Tensor:
        return (seen * (numbers - self._centres()).square()).sum(1)


class EntropyObserver(SearchingObserver):
    """The least Kullback-Leibler divergence between the numbers and their integers, as in TensorRT.

    Of the numbers those outside the range count at its ends; of the integers those inside alone, each spread over its
    bins in which there are numbers.
    """

    @override
    def _histogram(self) -> Tensor:
        """Return the histogram without the peak at 0 that ReLUs make: 0 is an integer of every range."""
        if not self.min_val <= 0 <= self.max_val:
            return self.histogram
        zero, histogram = int(self._centres().abs().argmin()), self.histogram.clone()
        histogram[zero] = torch.cat([histogram[max(0, zero - 1) : zero], histogram[zero + 1 : zero + 2]]).mean()
        return histogram

    @override
    def losses(self, seen: Tensor, integers: Tensor, numbers: Tensor, inside: Tensor) -> Tensor:
        within = seen * inside
        places = torch.arange(self.bins, device=seen.device)
        first = torch.where(inside, places, self.bins - 1).amin(1, keepdim=True)
        last = torch.where(inside, places, 0).amax(1, keepdim=True)
        below, above = (seen * (places < first)).sum(1, keepdim=True), (seen * (places > last)).sum(1, keepdim=True)
        expected = within.scatter_add(1, first, below).scatter_add(1, last, above)
        levels = within.new_zeros(len(within), self.quant_max - self.quant_min + 1)
        counts = levels.scatter_add(1, integers, within) / levels.scatter_add(1, integers, (within > 0).float())
        spread = torch.where(within > 0, counts.gather(1, integers), 0)
        expected, spread = (masses / masses.sum(1, keepdim=True) for masses in (expected, spread))
        return torch.where(expected > 0, expected * (expected.log() - spread.log()), 0).sum(1)


CALIBRATORS: dict[str, type[pt2e.HistogramObserver] | type[pt2e.MinMaxObserver]] = {
    "minmax": pt2e.MinMaxObserver,
    "histogram": pt2e.HistogramObserver,
    "percentile": PercentileObserver,
    "mse": MSEObserver,
    "entropy": EntropyObserver,
}


def check_calibrator(name: str) -> None:
    """Raise a UserError where there is no such calibrator; the nearest one is named."""
    if name not in CALIBRATORS:
        raise unknown("calibrator", name, CALIBRATORS)
