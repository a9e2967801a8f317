"""RepOpt-VGG (table 1 of the paper) and its baselines RepVGG (arXiv 2101.03697) and QARepVGG (arXiv 2212.01593).

Their stages are blocks of a 3x3 convolution that stands for a 3x3, a 1x1 and an identity. A block is
(N, C, H, W) -> (N, O, H', W').
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from repopt.csla import Block, ConvBranch, IdentityBranch, Target
from repopt.layers import MODES, Baseline, BranchModules, Deployable, InitialScales, Mode, RepConv2d, initial_scale
from repopt.models.network import Network, check_strides
from repopt.models.registry import register


def vgg_block(in_channels: int, out_channels: int, identity: bool, initial_scale: float = 1.0) -> Block:
    """Return the declaration of a block: a 3x3, a 1x1, and an identity where one is wanted."""
    branches: list[ConvBranch | IdentityBranch] = [
        ConvBranch("conv", "scale_conv", initial_scale, size=3),
        ConvBranch("conv_1x1", "scale_1x1", initial_scale, size=1),
    ]
    if identity:
        branches.append(IdentityBranch("scale_identity"))
    return Block(Target("conv", (out_channels, in_channels, 3, 3)), tuple(branches))


class PostSE(nn.Module):
    """Squeeze-and-excitation after a block: channels are weighted by a sigmoid of their pooled means."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.down = nn.Conv2d(channels, channels // 4, 1)
        self.up = nn.Conv2d(channels // 4, channels, 1)

    @override
    def forward(self, x: Tensor) -> Tensor:
        weights = self.up(torch.relu(self.down(x.mean((2, 3), keepdim=True))))
        return x * torch.sigmoid(weights)


def _post_se(channels: int, se: bool) -> nn.Module:
    return PostSE(channels) if se else nn.Identity()


class PlainBlock(nn.Module):
    """3x3 convolution with a bias, ReLU, and what follows it: what a trained block is at inference."""

    def __init__(self, conv: nn.Conv2d, post_se: nn.Module) -> None:
        super().__init__()
        self.conv = conv
        self.relu = nn.ReLU(inplace=True)
        self.post_se = post_se

    @override
    def forward(self, x: Tensor) -> Tensor:
        return self.post_se(self.relu(self.conv(x)))


class VGGBlock(RepConv2d, Deployable):
    """RepOpt-VGG's block: the declared convolution, batch norm, ReLU, and optionally `PostSE`.

    Args:
        in_channels, out_channels, stride: channels and stride of the convolution.
        identity: whether an identity branch stands beside it.
        initial_scale: where the hyper-search starts the scales of the two convolutions.
        mode: "hs", "csla" or "target".
        se: whether squeeze-and-excitation follows.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        stride: int,
        identity: bool,
        initial_scale: float,
        mode: Mode,
        se: bool,
    ) -> None:
        super().__init__(vgg_block(in_channels, out_channels, identity, initial_scale), mode, stride)
        self.bn = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.post_se = _post_se(out_channels, se)

    @override
    def forward(self, x: Tensor) -> Tensor:
        return self.post_se(self.relu(self.bn(self.conv2d(x))))

    @override
    def fuse(self) -> PlainBlock:
        return PlainBlock(self.folded(self.bn), self.post_se)


def _normed(x: Tensor, bn: nn.BatchNorm2d | None) -> Tensor:
    return x if bn is None else bn(x)


class RepVGGBlock(Baseline):
    """RepVGG's block: every branch has a batch norm of its own, folded into one kernel after training.

    QARepVGG's has that of the 3x3 alone, and one after the sum of the branches.

    Args:
        in_channels, out_channels, stride, identity, se: those of `VGGBlock`.
        initial_scale: of the declaration alone, since there are no scales.
        sum_norm: whether it is QARepVGG's.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        stride: int,
        identity: bool,
        initial_scale: float,
        se: bool,
        sum_norm: bool,
    ) -> None:
        super().__init__()
        self.block, self.stride = vgg_block(in_channels, out_channels, identity, initial_scale), stride
        self.identity = identity
        self._target = functools.partial(
            VGGBlock,
            in_channels,
            out_channels,
            stride=stride,
            identity=identity,
            initial_scale=initial_scale,
            mode="target",
            se=se,
        )
        self.conv_3x3 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn_3x3 = nn.BatchNorm2d(out_channels)
        self.conv_1x1 = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
        self.bn_1x1 = None if sum_norm else nn.BatchNorm2d(out_channels)
        self.bn_identity = nn.BatchNorm2d(out_channels) if identity and not sum_norm else None
        self.bn = nn.BatchNorm2d(out_channels) if sum_norm else None
        self.relu = nn.ReLU(inplace=True)
        self.post_se = _post_se(out_channels, se)

    @override
    def forward(self, x: Tensor) -> Tensor:
        y = self.bn_3x3(self.conv_3x3(x)) + _normed(self.conv_1x1(x), self.bn_1x1)
        if self.identity:
            y = y + _normed(x, self.bn_identity)
        return self.post_se(self.relu(_normed(y, self.bn)))

    @override
    def branches(self) -> BranchModules:
        convs = {"conv": (self.conv_3x3, self.bn_3x3), "conv_1x1": (self.conv_1x1, self.bn_1x1)}
        return {**convs, "scale_identity": (None, self.bn_identity)} if self.identity else convs

    @override
    def sum_norm(self) -> nn.BatchNorm2d | None:
        return self.bn

    @override
    def as_target(self) -> tuple[VGGBlock, nn.BatchNorm2d]:
        block = self._target()
        norm = self.bn or self.bn_3x3
        block.bn.eps, block.bn.momentum = norm.eps, norm.momentum
        block.post_se = self.post_se
        return block, block.bn

    @override
    def fuse(self) -> PlainBlock:
        return PlainBlock(self.merged(self.stride), self.post_se)


def block_of(mode: str, *, se: bool = False) -> Callable[..., nn.Module]:
    """Return what makes blocks, of the mode hs, csla or target, or of a baseline ("repvgg", "qarepvgg").

    It is called with ``(in_channels, out_channels, stride=..., identity=..., initial_scale=...)``.
    """
    if mode in MODES:
        return functools.partial(VGGBlock, mode=mode, se=se)
    return functools.partial(RepVGGBlock, se=se, sum_norm=mode == "qarepvgg")


class RepOptVGG(Network):
    """RepOpt-VGG, or a baseline, (N, in_chans, H, W) -> (N, num_classes).

    It is one stem block, four stages, pooling and a linear layer.

    Args:
        layers: blocks per stage.
        widths: multipliers of the stages' 64, 128, 256 and 512 channels.
        mode: "hs", "csla" or "target"; "repvgg" or "qarepvgg" for a baseline.
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
        self._set_features((stem_channels, *channels), strides)
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

register(_CONFIGS, RepOptVGG, modes=(*MODES, "repvgg", "qarepvgg"))
