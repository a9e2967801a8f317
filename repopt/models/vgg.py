"""RepOpt-VGG (table 1 of the paper): stages of 3x3 convolutions, each standing for a 3x3, a 1x1 and an identity."""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from repopt.layers import MODES, InitialScales, initial_scale
from repopt.models.network import Network, check_strides
from repopt.models.registry import register
from repopt.models.vgg_blocks import RepVGGBlock, VGGBlock


def block_of(mode: str, *, se: bool = False) -> Callable[..., nn.Module]:
    """Return what makes blocks, of the mode hs, csla or target, else the baseline's.

    It is called with ``(in_channels, out_channels, stride=..., identity=..., initial_scale=...)``.
    """
    return functools.partial(VGGBlock, mode=mode, se=se) if mode in MODES else functools.partial(RepVGGBlock, se=se)


class RepOptVGG(Network):
    """RepOpt-VGG, or its baseline RepVGG, (N, in_chans, H, W) -> (N, num_classes).

    It is one stem block, four stages, pooling and a linear layer.

    Args:
        layers: blocks per stage.
        widths: multipliers of the stages' 64, 128, 256 and 512 channels.
        mode: "hs", "csla" or "target"; "repvgg" for the baseline.
        se: whether squeeze-and-excitation follows every block.
        strides: strides of the stem and of the stages' first blocks. A search at another resolution than the
            training's may have others (table 6 of the paper); its blocks, and so its scales, are the same.
        initial_scales: see `initial_scale`.
        network: arguments of `Network`.
    """

    first_conv, classifier_name = "stage0.conv", "linear"
    stage_names = ("stage0", "stage1", "stage2", "stage3", "stage4")

    def __init__(
        self,
        *,
        layers: Sequence[int],
        widths: Sequence[float],
        mode: str,
        se: bool = False,
        strides: Sequence[int] = (2, 2, 2, 2, 2),
        initial_scales: InitialScales = "depth",
        **network: Any,
    ) -> None:
        super().__init__(**network)
        channels = [int(base * width) for base, width in zip((64, 128, 256, 512), widths, strict=True)]
        stem_channels = min(64, channels[0])
        scales = [initial_scale(layer, initial_scales) for layer in range(max(layers))]
        check_strides(strides)
        block = block_of(mode, se=se)
        first, following = {"identity": False, "initial_scale": scales[0]}, {"identity": True, "stride": 1}
        self.stage0 = block(self.in_chans, stem_channels, stride=strides[0], **first)
        stages, in_channels = [], stem_channels
        for depth, out_channels, stride in zip(layers, channels, strides[1:], strict=True):
            stages.append(nn.Sequential(block(in_channels, out_channels, stride=stride, **first)))
            stages[-1].extend(
                block(out_channels, out_channels, initial_scale=scale, **following) for scale in scales[1:depth]
            )
            in_channels = out_channels
        self.stage1, self.stage2, self.stage3, self.stage4 = stages
        reductions = itertools.accumulate(strides, operator.mul)
        self.feature_info = [
            {"num_chs": width, "reduction": reduction, "module": name}
            for name, width, reduction in zip(self.stage_names, (stem_channels, *channels), reductions, strict=True)
        ]
        self.num_features = in_channels
        self._add_head(in_channels)


_B, _L = (4, 6, 16, 1), (8, 14, 24, 1)
_CONFIGS: dict[str, dict[str, Any]] = {
    "RepOpt-VGG-nano": {"layers": _B, "widths": (0.25, 0.25, 0.25, 0.5)},
    "RepOpt-VGG-A0": {"layers": (2, 4, 14, 1), "widths": (0.75, 0.75, 0.75, 2.5)},
    "RepOpt-VGG-A1": {"layers": (2, 4, 14, 1), "widths": (1, 1, 1, 2.5)},
    "RepOpt-VGG-A2": {"layers": (2, 4, 14, 1), "widths": (1.5, 1.5, 1.5, 2.75)},
    "RepOpt-VGG-B0": {"layers": _B, "widths": (1, 1, 1, 2.5)},
    "RepOpt-VGG-B1": {"layers": _B, "widths": (2, 2, 2, 4)},
    "RepOpt-VGG-B2": {"layers": _B, "widths": (2.5, 2.5, 2.5, 5)},
    "RepOpt-VGG-L1": {"layers": _L, "widths": (2, 2, 2, 4)},
    "RepOpt-VGG-L2": {"layers": _L, "widths": (2.5, 2.5, 2.5, 5)},
    "RepOpt-VGG-L2-se": {"layers": _L, "widths": (2.5, 2.5, 2.5, 5), "se": True},
}

register(_CONFIGS, RepOptVGG, modes=(*MODES, "repvgg"))
