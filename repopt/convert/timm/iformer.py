"""iFormer: its positional encoding, a residual around a depthwise convolution and its batch norm."""

from __future__ import annotations

from timm.models.iformer import RepCPE

from repopt.convert.declaration import Declaration, register_block
from repopt.convert.timm.parts import IDENTITY, check_no_drop_path, conv, declaration


@register_block(RepCPE)
def _rep_cpe(module: RepCPE) -> Declaration:
    check_no_drop_path(module.cpe.drop_path)
    return declaration([conv("conv", "scale_conv", module.cpe.module)], IDENTITY)
