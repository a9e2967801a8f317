"""EfficientViM: residuals around depthwise convolutions and their batch norms, in the forward of larger modules.

In a block the residual has a gate, ``x + a * (conv(x) - x)`` with ``a = sigmoid(alpha)`` per channel. It is a factor of
the convolution's scale, and leaves ``1 - a`` for the identity.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.models.efficientvim import ConvLayer2d, EfficientViMBlock, PatchMerging
from torch import Tensor, nn
from typing_extensions import override

from repopt.convert.declaration import Declaration, register_block, register_container
from repopt.convert.timm.parts import (
    FUSED,
    IDENTITY,
    SumOfBranches,
    check_no_drop_path,
    conv,
    declaration,
    fuse_residual,
)
from repopt.errors import UserError
from repopt.layers import FusedBranches


class GatedResidual(nn.Module):
    """A residual of `EfficientViMBlock` as a module, (N, C, H, W) -> (N, C, H, W).

    Args:
        module: a convolution and its batch norm.
        alpha: (C,), the gate before its sigmoid.
    """

    def __init__(self, module: ConvLayer2d, alpha: Tensor) -> None:
        super().__init__()
        self.module, self.alpha = module, nn.Parameter(alpha.detach().clone())

    @override
    def forward(self, x: Tensor) -> Tensor:
        return x + self.alpha.sigmoid().view(-1, 1, 1) * (self.module(x) - x)


@register_block(GatedResidual)
def _gated(module: GatedResidual) -> Declaration:
    return declaration([conv("conv", "scale_conv", module.module)], IDENTITY, fuse=_fuse_gated)


def _fuse_gated(module: GatedResidual) -> FusedBranches:
    gate = module.alpha.sigmoid()
    convs = [conv("conv", "scale_conv", module.module)]
    return fuse_residual(convs, gate, -torch.ones_like(gate), torch.zeros_like(gate))


@register_container(EfficientViMBlock)
def _block(module: Any) -> int:
    _fold(module)
    check_no_drop_path(module.drop_path)
    module.dwconv1 = GatedResidual(module.dwconv1, module.alpha[0])
    module.dwconv2 = GatedResidual(module.dwconv2, module.alpha[2])
    return int(module.mixer.BCdt_proj.conv.in_channels)


@register_container(PatchMerging)
def _patch_merging(module: Any) -> int:
    _fold(module)
    module.dwconv1, module.dwconv2 = (
        SumOfBranches({"conv": part}, nn.Identity()) for part in (module.dwconv1, module.dwconv2)
    )
    return int(module.conv[0].conv.in_channels)


def _fold(module: Any) -> None:
    if module.fused:
        raise UserError(FUSED)
    module.fused = True
