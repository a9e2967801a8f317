"""SHViT: a residual around a depthwise convolution and its batch norm. Around other modules it is not folded."""

from __future__ import annotations

from timm.models.shvit import Conv2dNorm, Residual

from repopt.convert.declaration import Declaration, register_block
from repopt.convert.timm.parts import IDENTITY, conv, declaration


@register_block(Residual)
def _residual(module: Residual) -> Declaration | None:
    if not isinstance(module.m, Conv2dNorm):
        return None
    return declaration([conv("conv", "scale_conv", module.m)], IDENTITY)
