"""RepViT: a depthwise k x k, a depthwise 1x1 and an identity, with a batch norm after their sum."""

from __future__ import annotations

from timm.models.repvit import RepVggDw

from repopt.convert.declaration import Declaration, register_block
from repopt.convert.timm.parts import IDENTITY, conv, declaration


@register_block(RepVggDw)
def _rep_vgg_dw(module: RepVggDw) -> Declaration:
    return declaration([conv("conv", "scale_conv", module.conv), conv("conv_1x1", "scale_1x1", module.conv1)], IDENTITY)
