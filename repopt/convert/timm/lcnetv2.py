"""PP-LCNetV2: depthwise convolutions of several sizes, in the forward of a block that has more."""

from __future__ import annotations

from typing import Any

from timm.models.lcnetv2 import RepDepthwiseSeparable
from torch import nn

from repopt.convert.declaration import register_container
from repopt.convert.timm.parts import FUSED, SumOfBranches
from repopt.errors import UserError


@register_container(RepDepthwiseSeparable)
def _depthwise_separable(module: Any) -> int | None:
    if module.dw_conv_list is None:
        if isinstance(module.dw_conv, nn.Conv2d):
            raise UserError(FUSED)
        return None
    convs = {f"conv_{branch.conv.kernel_size[0]}": branch for branch in module.dw_conv_list}
    module.dw_conv, module.dw_conv_list = SumOfBranches(convs), None
    return int(module.in_chs)
