"""RepOpt-LK: a RepLKNet (arXiv 2203.06717) whose small kernels are in the optimizer, and its baseline, which has them.

Its stages are pairs of residual blocks: one around a depthwise convolution, whose large kernel stands for a large and a
5x5 kernel, and one of two 1x1 convolutions. Every convolution has a batch norm behind it, and every non-linearity is a
ReLU, which INT8 takes into the convolution before it; RepLKNet has GELUs, and more batch norms.

All modules are (N, C, H, W) -> (N, O, H', W').
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import relu
from typing_extensions import override

from repopt.csla import Block, ConvBranch, Target
from repopt.layers import (
    MODES,
    Baseline,
    BranchModules,
    Deployable,
    InitialScales,
    Mode,
    RepConv2d,
    fold_batch_norm,
    initial_scale,
)
from repopt.models.network import Network, check_strides
from repopt.models.registry import register


def lk_block(channels: int, size: int, initial_scale: float = 1.0) -> Block:
    """Return the declaration of a depthwise convolution: a large kernel of this size, and a 5x5 at its centre."""
    branches = (
        ConvBranch("conv_large", "scale_large", initial_scale, size=size),
        ConvBranch("conv_small", "scale_small", initial_scale, size=5),
    )
    return Block(Target("conv", (channels, 1, size, size), groups=channels), branches)


class LargeKernel(RepConv2d, Deployable):
    """The declared depthwise convolution, batch norm and ReLU.

    Args:
        channels, size: of the convolution, whose kernel is size x size.
        initial_scale: where the hyper-search starts the scales.
        mode: "hs", "csla" or "target".
    """

    def __init__(self, channels: int, size: int, *, initial_scale: float, mode: Mode) -> None:
        super().__init__(lk_block(channels, size, initial_scale), mode)
        self.bn = nn.BatchNorm2d(channels)

    @override
    def forward(self, x: Tensor) -> Tensor:
        return relu(self.bn(self.conv2d(x)))

    @override
    def fuse(self) -> nn.Sequential:
        return nn.Sequential(self.folded(self.bn), nn.ReLU())


class RepLargeKernel(Baseline):
    """The baseline's: both convolutions have a batch norm of their own, and are folded into one after training.

    The arguments are those of `LargeKernel`; there are no scales, so `initial_scale` is of the declaration alone.
    """

    def __init__(self, channels: int, size: int, *, initial_scale: float) -> None:
        super().__init__()
        self.block = lk_block(channels, size, initial_scale)
        self._target = functools.partial(LargeKernel, channels, size, initial_scale=initial_scale, mode="target")
        self.conv_large = nn.Conv2d(channels, channels, size, padding=size // 2, groups=channels, bias=False)
        self.bn_large = nn.BatchNorm2d(channels)
        self.conv_small = nn.Conv2d(channels, channels, 5, padding=2, groups=channels, bias=False)
        self.bn_small = nn.BatchNorm2d(channels)

    @override
    def forward(self, x: Tensor) -> Tensor:
        return relu(self.bn_large(self.conv_large(x)) + self.bn_small(self.conv_small(x)))

    @override
    def branches(self) -> BranchModules:
        return {"conv_large": (self.conv_large, self.bn_large), "conv_small": (self.conv_small, self.bn_small)}

    @override
    def as_target(self) -> tuple[LargeKernel, nn.BatchNorm2d]:
        block = self._target()
        block.bn.eps, block.bn.momentum = self.bn_large.eps, self.bn_large.momentum
        return block, block.bn

    @override
    def fuse(self) -> nn.Sequential:
        return nn.Sequential(self.merged(), nn.ReLU())


class ConvNorm(Deployable):
    """A convolution, batch norm, and a ReLU if it is active."""

    def __init__(
        self, in_channels: int, out_channels: int, size: int = 1, stride: int = 1, groups: int = 1, active: bool = True
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, size, stride, size // 2, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(out_channels)
        self.active = active

    @override
    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.conv(x))
        return relu(x) if self.active else x

    @override
    def fuse(self) -> ConvNorm:
        fold_batch_norm(self, "conv", "bn")
        return self


class Residual(nn.Sequential):
    """``x + layers(x)``."""

    def __init__(self, **layers: nn.Module) -> None:
        super().__init__(OrderedDict(layers))

    @override
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class RepOptLK(Network):
    """RepOpt-LK, or its baseline, (N, in_chans, H, W) -> (N, num_classes).

    Args:
        layers, widths, sizes: pairs of blocks, channels, and the size of the large kernels of the four stages.
        mode: "hs", "csla" or "target"; "rep" for the baseline.
        strides: strides of the stem's convolution, and of the depthwise 3x3 at the beginning of every stage, as in
            `RepOptVGG`.
        initial_scales: see `initial_scale`.
        network: arguments of `Network`.
    """

    first_conv, classifier_name = "stage0.0.conv", "classifier"
    stage_names = ("stage0", "stage1", "stage2", "stage3", "stage4")

    def __init__(
        self,
        *,
        layers: Sequence[int],
        widths: Sequence[int],
        sizes: Sequence[int],
        mode: str,
        strides: Sequence[int] = (2, 2, 2, 2, 2),
        initial_scales: InitialScales = "depth",
        **network: Any,
    ) -> None:
        super().__init__(**network)
        check_strides(strides)
        large = functools.partial(LargeKernel, mode=mode) if mode in MODES else RepLargeKernel
        channels = widths[0]
        self.stage0 = nn.Sequential(
            ConvNorm(self.in_chans, channels, 3, strides[0]),
            ConvNorm(channels, channels, 3, groups=channels),
            ConvNorm(channels, channels),
        )
        stages = zip(self.stage_names[1:], layers, widths, sizes, strides[1:], strict=True)
        for name, depth, width, size, stride in stages:
            stage = nn.Sequential()
            if width != channels:
                stage.append(ConvNorm(channels, width))
            stage.append(ConvNorm(width, width, 3, stride, groups=width))
            for layer in range(1, depth + 1):
                depthwise = large(width, size, initial_scale=initial_scale(layer, initial_scales))
                before, after = ConvNorm(width, width), ConvNorm(width, width, active=False)
                expand, reduce = ConvNorm(width, 4 * width), ConvNorm(4 * width, width, active=False)
                stage.append(Residual(before=before, depthwise=depthwise, after=after))
                stage.append(Residual(expand=expand, reduce=reduce))
            self.add_module(name, stage)
            channels = width
        self._set_features((widths[0], *widths), strides)
        self._add_head(channels)


# The layers, widths and kernels of B are RepLKNet-31B's.
_CONFIGS: dict[str, dict[str, Any]] = {
    "RepOpt-LK-nano": {"layers": (1, 1, 2, 1), "widths": (16, 32, 64, 128), "sizes": (13, 11, 9, 7)},
    "RepOpt-LK-T": {"layers": (3, 3, 18, 3), "widths": (80, 160, 320, 640), "sizes": (13, 13, 13, 13)},
    "RepOpt-LK-B": {"layers": (2, 2, 18, 2), "widths": (128, 256, 512, 1024), "sizes": (31, 29, 27, 13)},
}

register(_CONFIGS, RepOptLK, modes=(*MODES, "rep"))
