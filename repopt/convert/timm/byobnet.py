"""RepVGG and MobileOne."""

from __future__ import annotations

from timm.models.byobnet import MobileOneBlock, RepVggBlock
from torch import nn

from repopt.convert.declaration import Declaration, register_block
from repopt.convert.timm.parts import FUSED, IDENTITY, Conv, check_no_drop_path, conv, convs_and_1x1, declaration
from repopt.errors import UserError


@register_block(RepVggBlock)
def _rep_vgg(module: RepVggBlock) -> Declaration:
    _check(module)
    convs = [conv("conv", "scale_conv", module.conv_kxk), conv("conv_1x1", "scale_1x1", module.conv_1x1)]
    return _declaration(module, convs)


@register_block(MobileOneBlock)
def _mobile_one(module: MobileOneBlock) -> Declaration:
    _check(module)
    return _declaration(module, convs_and_1x1(module.conv_kxk, module.conv_scale))


def _check(module: RepVggBlock | MobileOneBlock) -> None:
    if module.reparam_conv is not None:
        raise UserError(FUSED)
    check_no_drop_path(module.drop_path)


def _declaration(module: RepVggBlock | MobileOneBlock, convs: list[Conv]) -> Declaration:
    identity = None if module.identity is None else IDENTITY
    return declaration(convs, identity, after=nn.Sequential(module.attn, module.act))
