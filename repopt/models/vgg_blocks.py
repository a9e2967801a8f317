"""The blocks of RepOpt-VGG and of its baseline RepVGG (arXiv 2101.03697), and the plain block both are deployed as.

Every block is (N, C, H, W) -> (N, O, H', W').
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from typing_extensions import override

from repopt.csla import Block, ConvBranch, IdentityBranch, Target
from repopt.layers import Baseline, Deployable, Mode, RepConv2d


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


class RepVGGBlock(Baseline):
    """RepVGG's block: every branch has a batch norm of its own, folded into one kernel after training.

    The arguments are those of `VGGBlock`; there are no scales, so `initial_scale` has no effect.
    """

    def __init__(
        self, in_channels: int, out_channels: int, *, stride: int, identity: bool, initial_scale: float, se: bool
    ) -> None:
        super().__init__()
        self.block, self.stride = vgg_block(in_channels, out_channels, identity), stride
        self.conv_3x3 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn_3x3 = nn.BatchNorm2d(out_channels)
        self.conv_1x1 = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
        self.bn_1x1 = nn.BatchNorm2d(out_channels)
        self.bn_identity = nn.BatchNorm2d(out_channels) if identity else None
        self.relu = nn.ReLU(inplace=True)
        self.post_se = _post_se(out_channels, se)

    @override
    def forward(self, x: Tensor) -> Tensor:
        y = self.bn_3x3(self.conv_3x3(x)) + self.bn_1x1(self.conv_1x1(x))
        if self.bn_identity is not None:
            y = y + self.bn_identity(x)
        return self.post_se(self.relu(y))

    @override
    def branches(self) -> Mapping[str, tuple[nn.Conv2d | None, nn.BatchNorm2d]]:
        convs = {"conv": (self.conv_3x3, self.bn_3x3), "conv_1x1": (self.conv_1x1, self.bn_1x1)}
        return convs if self.bn_identity is None else {**convs, "scale_identity": (None, self.bn_identity)}

    @override
    def fuse(self) -> PlainBlock:
        return PlainBlock(self.merged(self.stride), self.post_se)
