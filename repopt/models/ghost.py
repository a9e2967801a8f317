"""RepOpt-GhostNet: RepGhostNet (arXiv 2211.06088) whose fusion batch norms are scales, and RepGhostNet, its baseline.

All modules are (N, C, H, W) -> (N, O, H', W') unless they say otherwise.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.functional import hardsigmoid, relu
from torch.nn.utils.fusion import fuse_conv_bn_eval

from repopt.csla import Block, ConvBranch, IdentityBranch, Target
from repopt.layers import MODES, Baseline, Deployable, InitialScales, Mode, RepConv2d, fold_batch_norm, initial_scale
from repopt.models.network import Network, check_strides
from repopt.models.registry import register


def ghost_block(channels: int, initial_scale: float = 1.0) -> Block:
    """The declaration: a depthwise 3x3 and an identity.

    The published hyper-search does not decay the identity, although it stands for a weight.
    """
    branches = (
        ConvBranch("cheap_operation.0", "cheap_operation.1", initial_scale, size=3),
        IdentityBranch("fusion_scale", decay_in_search=False),
    )
    return Block(Target("cheap_operation.0", (channels, 1, 3, 3), groups=channels), branches)


def _conv_bn(in_channels: int, out_channels: int, size: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(in_channels, out_channels, size, stride, size // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(out_channels)]


def _activation(active: bool) -> nn.Module:
    return nn.ReLU(inplace=True) if active else nn.Identity()


def _plain(primary_conv: nn.Sequential, cheap: nn.Conv2d, active: bool) -> nn.Sequential:
    """A trained ghost module at inference: two convolutions with biases."""
    primary, norm, activation = primary_conv
    return nn.Sequential(fuse_conv_bn_eval(primary, norm), activation, cheap, _activation(active))


class GhostModule(RepConv2d, Deployable):
    """A 1x1 convolution, then the declared depthwise one on its output.

    Args:
        in_channels, out_channels: of the 1x1 convolution.
        active: whether ReLUs follow both.
        initial_scale: at which the hyper-search starts the scale of the depthwise convolution.
        mode: "hs", "csla" or "target".
    """

    def __init__(self, in_channels: int, out_channels: int, *, active: bool, initial_scale: float, mode: Mode) -> None:
        super().__init__(ghost_block(out_channels, initial_scale), mode)
        self.active = active
        self.primary_conv = nn.Sequential(*_conv_bn(in_channels, out_channels, 1), _activation(active))
        self.final_bn = nn.BatchNorm2d(out_channels)
        self.activation = _activation(active)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return self.activation(self.final_bn(self.conv2d(self.primary_conv(x))))

    def fuse(self) -> nn.Sequential:  # noqa: D102
        return _plain(self.primary_conv, self.folded(self.final_bn), self.active)


class RepGhostModule(Baseline):
    """The baseline's: batch norms instead of scales. Args: as of `GhostModule`; `initial_scale` has no effect."""

    def __init__(self, in_channels: int, out_channels: int, *, active: bool, initial_scale: float) -> None:
        super().__init__()
        self.block, self.active = ghost_block(out_channels), active
        self.primary_conv = nn.Sequential(*_conv_bn(in_channels, out_channels, 1), _activation(active))
        self.fusion_bn = nn.BatchNorm2d(out_channels)
        self.cheap_operation = nn.Sequential(*_conv_bn(out_channels, out_channels, 3, groups=out_channels))
        self.activation = _activation(active)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        x = self.primary_conv(x)
        return self.activation(self.cheap_operation(x) + self.fusion_bn(x))

    def branches(self) -> dict[str, tuple[nn.Conv2d | None, nn.BatchNorm2d]]:  # noqa: D102
        conv, bn = self.cheap_operation
        return {"cheap_operation.0": (conv, bn), "fusion_scale": (None, self.fusion_bn)}

    def fuse(self) -> nn.Sequential:  # noqa: D102
        return _plain(self.primary_conv, self.merged(), self.active)


class SqueezeExcite(nn.Module):
    """Channels weighted by a hard sigmoid of their pooled means."""

    def __init__(self, channels: int, reduced: int) -> None:
        super().__init__()
        self.conv_reduce = nn.Conv2d(channels, reduced, 1)
        self.conv_expand = nn.Conv2d(reduced, channels, 1)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return x * hardsigmoid(self.conv_expand(relu(self.conv_reduce(x.mean((2, 3), keepdim=True)))))


class Bottleneck(Deployable):
    """Two ghost modules around a strided depthwise convolution and squeeze-and-excitation, and a shortcut.

    Args:
        in_channels, mid_channels, out_channels: before, between and after the ghost modules.
        size: of the depthwise convolutions.
        stride: of the one between the ghost modules; None = there is none.
        se_channels: to which squeeze-and-excitation reduces; 0 = none.
        ghost: ``ghost(in_channels, out_channels, active=..., initial_scale=...)`` makes a ghost module.
        initial_scales: of the two.
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

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        y = self.ghost1(x)
        if self.strided:
            y = self.bn_dw(self.conv_dw(y))
        return self.ghost2(self.se(y)) + self.shortcut(x)

    def fuse(self) -> Bottleneck:  # noqa: D102
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

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return relu(self.bn1(self.conv(x)))

    def fuse(self) -> ConvBNReLU:  # noqa: D102
        fold_batch_norm(self, "conv", "bn1")
        return self


class Shape(NamedTuple):
    """A bottleneck of width 1: kernel size, channels between and after its ghost modules, SE ratio, its resolution."""

    size: int
    expansion: int
    out: int
    se: float
    halves: bool = False


_BOTTLENECKS = [
    [Shape(3, 8, 16, 0)],
    [Shape(3, 24, 24, 0, halves=True)],
    [Shape(3, 36, 24, 0)],
    [Shape(5, 36, 40, 0.25, halves=True)],
    [Shape(5, 60, 40, 0.25)],
    [Shape(3, 120, 80, 0, halves=True)],
    [
        Shape(3, 100, 80, 0),
        Shape(3, 120, 80, 0),
        Shape(3, 120, 80, 0),
        Shape(3, 240, 112, 0.25),
        Shape(3, 336, 112, 0.25),
    ],
    [Shape(5, 336, 160, 0.25, halves=True)],
    [
        Shape(5, 480, 160, 0),
        Shape(5, 480, 160, 0.25),
        Shape(5, 480, 160, 0),
        Shape(5, 480, 160, 0.25),
    ],
]


def _rounded(channels: float) -> int:
    """The nearest multiple of 4, at least 4, and never more than 10 % down."""
    nearest = max(4, int(channels + 2) // 4 * 4)
    return nearest if nearest >= 0.9 * channels else nearest + 4


class RepOptGhostNet(Network, Deployable):
    """The network, (N, in_chans, H, W) -> (N, num_classes).

    Its features are the last stages of their resolutions, before the 1x1 convolution that widens them for the head.

    Args:
        width: multiplier of all channels.
        ghost: makes a ghost module (see `Bottleneck`).
        strides: of the stem and of the bottlenecks that halve the resolution, as of `RepOptVGG`.
        initial_scales: see `initial_scale`.
        num_classes: outputs of the classifier; 0 = none, and the network gives the head's hidden features.
        in_chans: channels of an image.
        global_pool: see `Network.reset_classifier`.
        drop_rate: dropout before the classifier.
        use_checkpoint: recompute every bottleneck's activations in the backward pass instead of keeping them.
    """

    first_conv, classifier_name, hidden_names = "conv_stem", "classifier", ("conv_head",)

    def __init__(
        self,
        width: float,
        ghost: Callable[..., nn.Module],
        *,
        strides: Sequence[int] = (2, 2, 2, 2, 2),
        initial_scales: InitialScales = "depth",
        num_classes: int,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.2,
        use_checkpoint: bool = False,
    ) -> None:
        super().__init__(in_chans=in_chans, use_checkpoint=use_checkpoint)
        check_strides(strides)
        channels = _rounded(16 * width)
        self.conv_stem, self.bn1 = _conv_bn(in_chans, channels, 3, stride=strides[0])
        self.blocks = nn.Sequential()
        reduction, features, later_strides = strides[0], {}, iter(strides[1:])
        number = -1  # of the first ghost module of a bottleneck, in a run that keeps width and resolution
        for index, shapes in enumerate(_BOTTLENECKS):
            stage = nn.Sequential()
            for shape in shapes:
                mid, out = _rounded(shape.expansion * width), _rounded(shape.out * width)
                stride = next(later_strides) if shape.halves else None
                number = number + 2 if not shape.halves and out == channels else 1
                bottleneck = Bottleneck(
                    channels,
                    mid,
                    out,
                    size=shape.size,
                    stride=stride,
                    se_channels=_rounded(mid * shape.se) if shape.se else 0,
                    ghost=ghost,
                    initial_scales=tuple(initial_scale(number + i, initial_scales) for i in (1, 2)),
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
        self._add_head(1280, num_classes=num_classes, global_pool=global_pool, drop_rate=drop_rate)

    def stem(self, x: Tensor) -> Tensor:  # noqa: D102
        return relu(self.bn1(self.conv_stem(x)))

    def hidden(self, x: Tensor) -> Tensor:  # noqa: D102
        return relu(self.conv_head(x))

    def fuse(self) -> RepOptGhostNet:  # noqa: D102
        fold_batch_norm(self, "conv_stem", "bn1")
        return self


def build_ghost(*, mode: str, width: float, **arguments: Any) -> RepOptGhostNet:
    """A RepOpt-GhostNet in the mode hs, csla or target, or its baseline RepGhostNet (mode rep).

    Args: of `RepOptGhostNet`.
    """
    ghost = RepGhostModule if mode == "rep" else functools.partial(GhostModule, mode=mode)
    return RepOptGhostNet(width, ghost, **arguments)


register(
    {f"RepOpt-GhostNet-{width}x": {"width": width} for width in (0.5, 0.58, 0.8, 1.0, 1.11, 1.3, 1.5, 2.0)},
    build_ghost,
    network=RepOptGhostNet,
    modes=(*MODES, "rep"),
    aliases={"ghost": "RepOpt-GhostNet-0.5x"},
)
