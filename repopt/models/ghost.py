"""RepOpt-GhostNet: RepGhostNet (arXiv 2211.06088) whose fusion batch norms are scales, and RepGhostNet, its baseline.

All modules are (N, C, H, W) -> (N, O, H', W') unless they say otherwise.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

from timm.layers import make_divisible
from torch import Tensor, nn
from torch.nn.functional import hardsigmoid, relu
from typing_extensions import override

from repopt.csla import Block, ConvBranch, IdentityBranch, Target
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


def ghost_block(channels: int, initial_scale: float = 1.0) -> Block:
    """Return the declaration of a ghost module: a depthwise 3x3 and an identity.

    The published hyper-search does not decay the identity, although it stands for a weight.
    """
    branches = (
        ConvBranch("cheap_operation.0", "cheap_operation.1", initial_scale, size=3),
        IdentityBranch("fusion_scale", decay_in_search=False),
    )
    return Block(Target("cheap_operation.0", (channels, 1, 3, 3), groups=channels), branches)


def _conv_bn(
    in_channels: int, out_channels: int, size: int, stride: int = 1, groups: int = 1
) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    conv = nn.Conv2d(in_channels, out_channels, size, stride, size // 2, groups=groups, bias=False)
    return conv, nn.BatchNorm2d(out_channels)


def _activation(active: bool) -> nn.Module:
    return nn.ReLU(inplace=True) if active else nn.Identity()


def _plain(primary_conv: nn.Sequential, cheap: nn.Conv2d, active: bool) -> nn.Sequential:
    """Return a trained ghost module at inference: two convolutions with biases."""
    fold_batch_norm(primary_conv, "0", "1")
    conv, _, activation = primary_conv
    return nn.Sequential(conv, activation, cheap, _activation(active))


class GhostModule(RepConv2d, Deployable):
    """A 1x1 convolution, then the declared depthwise one on its output.

    Args:
        in_channels, out_channels: channels of the 1x1 convolution.
        active: whether a ReLU follows each convolution.
        initial_scale: where the hyper-search starts the scale of the depthwise convolution.
        mode: "hs", "csla" or "target".
    """

    def __init__(self, in_channels: int, out_channels: int, *, active: bool, initial_scale: float, mode: Mode) -> None:
        super().__init__(ghost_block(out_channels, initial_scale), mode)
        self.active = active
        self.primary_conv = nn.Sequential(*_conv_bn(in_channels, out_channels, 1), _activation(active))
        self.final_bn = nn.BatchNorm2d(out_channels)
        self.activation = _activation(active)

    @override
    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.final_bn(self.conv2d(self.primary_conv(x))))

    @override
    def fuse(self) -> nn.Sequential:
        return _plain(self.primary_conv, self.folded(self.final_bn), self.active)


class RepGhostModule(Baseline):
    """The baseline's ghost module, with batch norms instead of scales.

    The arguments are those of `GhostModule`; there are no scales, so `initial_scale` is of the declaration alone.
    """

    def __init__(self, in_channels: int, out_channels: int, *, active: bool, initial_scale: float) -> None:
        super().__init__()
        self.block, self.active = ghost_block(out_channels, initial_scale), active
        self._target = functools.partial(
            GhostModule, in_channels, out_channels, active=active, initial_scale=initial_scale, mode="target"
        )
        self.primary_conv = nn.Sequential(*_conv_bn(in_channels, out_channels, 1), _activation(active))
        self.fusion_bn = nn.BatchNorm2d(out_channels)
        self.cheap_operation = nn.Sequential(*_conv_bn(out_channels, out_channels, 3, groups=out_channels))
        self.activation = _activation(active)

    @override
    def forward(self, x: Tensor) -> Tensor:
        x = self.primary_conv(x)
        return self.activation(self.cheap_operation(x) + self.fusion_bn(x))

    @override
    def branches(self) -> BranchModules:
        conv, bn = cast("tuple[nn.Conv2d, nn.BatchNorm2d]", tuple(self.cheap_operation))
        return {"cheap_operation.0": (conv, bn), "fusion_scale": (None, self.fusion_bn)}

    @override
    def as_target(self) -> tuple[GhostModule, nn.BatchNorm2d]:
        block = self._target()
        block.final_bn.eps, block.final_bn.momentum = self.fusion_bn.eps, self.fusion_bn.momentum
        block.primary_conv = self.primary_conv
        return block, block.final_bn

    @override
    def fuse(self) -> nn.Sequential:
        return _plain(self.primary_conv, self.merged(), self.active)


class SqueezeExcite(nn.Module):
    """Channels are weighted by a hard sigmoid of their pooled means."""

    def __init__(self, channels: int, reduced: int) -> None:
        super().__init__()
        self.conv_reduce = nn.Conv2d(channels, reduced, 1)
        self.conv_expand = nn.Conv2d(reduced, channels, 1)

    @override
    def forward(self, x: Tensor) -> Tensor:
        return x * hardsigmoid(self.conv_expand(relu(self.conv_reduce(x.mean((2, 3), keepdim=True)))))


class Bottleneck(Deployable):
    """Two ghost modules around a strided depthwise convolution and squeeze-and-excitation, and a shortcut.

    Args:
        in_channels, mid_channels, out_channels: channels before, between and after the ghost modules.
        size: kernel size of the depthwise convolutions.
        stride: stride of the convolution between the ghost modules; None = there is none.
        se_channels: channels to which squeeze-and-excitation reduces; 0 = none.
        ghost: ``ghost(in_channels, out_channels, active=..., initial_scale=...)`` makes a ghost module.
        initial_scales: where the hyper-search starts the scales of the two ghost modules.
    """

    def __init__(
        self,
        in_channels: int,
        mid_channels: int,
        out_channels: int,
        *,
        size: int,
        stride: int | None,
        se_channels: int,
        ghost: Callable[..., nn.Module],
        initial_scales: tuple[float, float],
    ) -> None:
        super().__init__()
        self.strided = stride is not None
        self.ghost1 = ghost(in_channels, mid_channels, active=True, initial_scale=initial_scales[0])
        if stride is not None:
            self.conv_dw, self.bn_dw = _conv_bn(mid_channels, mid_channels, size, stride, groups=mid_channels)
        self.se = SqueezeExcite(mid_channels, se_channels) if se_channels else nn.Identity()
        self.ghost2 = ghost(mid_channels, out_channels, active=False, initial_scale=initial_scales[1])
        self.shortcut = nn.Sequential()
        if self.strided or in_channels != out_channels:
            self.shortcut.extend(_conv_bn(in_channels, in_channels, size, stride or 1, groups=in_channels))
            self.shortcut.extend(_conv_bn(in_channels, out_channels, 1))

    @override
    def forward(self, x: Tensor) -> Tensor:
        y = self.ghost1(x)
        if self.strided:
            y = self.bn_dw(self.conv_dw(y))
        return self.ghost2(self.se(y)) + self.shortcut(x)

    @override
    def fuse(self) -> Bottleneck:
        if self.strided:
            fold_batch_norm(self, "conv_dw", "bn_dw")
        for index in range(0, len(self.shortcut), 2):
            fold_batch_norm(self.shortcut, str(index), str(index + 1))
        return self


class ConvBNReLU(Deployable):
    """The 1x1 convolution after the bottlenecks."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv, self.bn1 = _conv_bn(in_channels, out_channels, 1)

    @override
    def forward(self, x: Tensor) -> Tensor:
        return relu(self.bn1(self.conv(x)))

    @override
    def fuse(self) -> ConvBNReLU:
        fold_batch_norm(self, "conv", "bn1")
        return self


class Shape(NamedTuple):
    """A bottleneck at width 1: kernel size, channels between and after its ghost modules, and whether it has SE."""

    size: int
    expansion: int
    out: int
    se: bool = False
    halves: bool = False  # the resolution


_STAGES = [
    [Shape(3, 8, 16)],
    [Shape(3, 24, 24, halves=True)],
    [Shape(3, 36, 24)],
    [Shape(5, 36, 40, se=True, halves=True)],
    [Shape(5, 60, 40, se=True)],
    [Shape(3, 120, 80, halves=True)],
    [Shape(3, 100, 80), Shape(3, 120, 80), Shape(3, 120, 80), Shape(3, 240, 112, se=True), Shape(3, 336, 112, se=True)],
    [Shape(5, 336, 160, se=True, halves=True)],
    [Shape(5, 480, 160), Shape(5, 480, 160, se=True), Shape(5, 480, 160), Shape(5, 480, 160, se=True)],
]
_SE_RATIO = 0.25

_rounded = functools.partial(make_divisible, divisor=4)


class RepOptGhostNet(Network, Deployable):
    """RepOpt-GhostNet, or its baseline RepGhostNet, (N, in_chans, H, W) -> (N, num_classes).

    Its features are the last stages of their resolutions, before the 1x1 convolution that widens them for the head.

    Args:
        width: multiplier of all channels.
        mode: "hs", "csla" or "target"; "rep" for the baseline.
        strides: strides of the stem and of the bottlenecks that halve the resolution, as in `RepOptVGG`.
        initial_scales: see `initial_scale`.
        drop_rate: see `Network`.
        network: the other arguments of `Network`.
    """

    first_conv, classifier_name, hidden_names = "conv_stem", "classifier", ("conv_head",)

    def __init__(
        self,
        *,
        width: float,
        mode: str,
        strides: Sequence[int] = (2, 2, 2, 2, 2),
        initial_scales: InitialScales = "depth",
        drop_rate: float = 0.2,
        **network: Any,
    ) -> None:
        super().__init__(drop_rate=drop_rate, **network)
        check_strides(strides)
        ghost = functools.partial(GhostModule, mode=mode) if mode in MODES else RepGhostModule
        channels = _rounded(16 * width)
        self.conv_stem, self.bn1 = _conv_bn(self.in_chans, channels, 3, stride=strides[0])
        self.blocks = nn.Sequential()
        reduction, features, later_strides = strides[0], {}, iter(strides[1:])
        layer = 0  # number of a bottleneck's first ghost module, counted anew where width or resolution changes
        for index, shapes in enumerate(_STAGES):
            stage = nn.Sequential()
            for shape in shapes:
                mid, out = _rounded(shape.expansion * width), _rounded(shape.out * width)
                stride = next(later_strides) if shape.halves else None
                layer = layer + 2 if not shape.halves and out == channels else 2
                bottleneck = Bottleneck(
                    channels,
                    mid,
                    out,
                    size=shape.size,
                    stride=stride,
                    se_channels=_rounded(mid * _SE_RATIO) if shape.se else 0,
                    ghost=ghost,
                    initial_scales=(initial_scale(layer, initial_scales), initial_scale(layer + 1, initial_scales)),
                )
                stage.append(bottleneck)
                channels, reduction = out, reduction * (stride or 1)
            self.blocks.append(stage)
            features[reduction] = {"num_chs": channels, "reduction": reduction, "module": f"blocks.{index}"}
        self.feature_info = list(features.values())
        self.num_features = _rounded(2 * 480 * width)
        self.blocks.append(nn.Sequential(ConvBNReLU(channels, self.num_features)))
        self.stage_names = [f"blocks.{index}" for index in range(len(self.blocks))]
        self.conv_head = nn.Conv2d(self.num_features, 1280, 1)
        self._add_head(1280)

    @override
    def stem(self, x: Tensor) -> Tensor:
        return relu(self.bn1(self.conv_stem(x)))

    @override
    def hidden(self, x: Tensor) -> Tensor:
        return relu(self.conv_head(x))

    @override
    def fuse(self) -> RepOptGhostNet:
        fold_batch_norm(self, "conv_stem", "bn1")
        return self


register(
    {f"RepOpt-GhostNet-{width}x": {"width": width} for width in (0.5, 0.58, 0.8, 1.0, 1.11, 1.3, 1.5, 2.0)},
    RepOptGhostNet,
    modes=(*MODES, "rep"),
    aliases={"ghost": "RepOpt-GhostNet-0.5x"},
)
