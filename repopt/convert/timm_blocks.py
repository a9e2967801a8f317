"""The declarations of timm's re-parameterized blocks: RepVGG's, MobileOne's and RepGhostNet's."""

from __future__ import annotations

import math
from typing import NamedTuple

from timm.layers import ConvNormAct
from timm.models.byobnet import MobileOneBlock, RepVggBlock
from timm.models.repghost import RepGhostModule
from torch import nn

from repopt.convert.registry import Declaration, register_block
from repopt.csla import Block, ConvBranch, IdentityBranch, Target
from repopt.errors import UserError


class _Conv(NamedTuple):
    """A branch's declaration and the modules that it stands for."""

    branch: ConvBranch
    conv: nn.Module
    bn: nn.Module


@register_block(RepVggBlock)
def _rep_vgg(module: RepVggBlock) -> Declaration:
    _check_byob(module)
    size = module.conv_kxk.conv.kernel_size
    convs = [
        _Conv(ConvBranch("conv", "scale_conv", size=size), *_parts(module.conv_kxk)),
        _Conv(ConvBranch("conv_1x1", "scale_1x1"), *_parts(module.conv_1x1)),
    ]
    return _byob(module, convs)


@register_block(MobileOneBlock)
def _mobile_one(module: MobileOneBlock) -> Declaration:
    _check_byob(module)
    # n equal branches of the scale 1 / sqrt(n) start as one of the scale 1, and under SGD step as one.
    initial = 1 / math.sqrt(len(module.conv_kxk))
    convs = [
        _Conv(ConvBranch(f"conv_{i}", f"scale_conv_{i}", initial, size=conv.conv.kernel_size), *_parts(conv))
        for i, conv in enumerate(module.conv_kxk)
    ]
    if module.conv_scale is not None:
        convs.append(_Conv(ConvBranch("conv_1x1", "scale_1x1"), *_parts(module.conv_scale)))
    return _byob(module, convs)


@register_block(RepGhostModule)
def _rep_ghost(module: RepGhostModule) -> Declaration:
    if len(module.fusion_bn) != 1:
        raise UserError("it has no branches: it was created with reparam=False, or they are fused already")
    conv, bn = module.cheap_operation
    branch = ConvBranch("cheap_operation.0", "cheap_operation.1", size=conv.kernel_size)
    identity = IdentityBranch("fusion_scale", decay_in_search=False)  # as in RepOpt-GhostNet
    return _declaration(branch.kernel, [_Conv(branch, conv, bn)], identity, module.primary_conv, module.relu)


def _check_byob(module: RepVggBlock | MobileOneBlock) -> None:
    if module.reparam_conv is not None:
        raise UserError("its branches are fused already (reparam_conv)")
    if not isinstance(module.drop_path, nn.Identity):
        raise UserError("drop_path drops branches at random: create the model with drop_path_rate=0")


def _parts(module: ConvNormAct) -> tuple[nn.Module, nn.Module]:
    if module.aa is not None:
        raise UserError("its branches end in an anti-aliasing layer")
    return module.conv, module.bn


def _byob(module: RepVggBlock | MobileOneBlock, convs: list[_Conv]) -> Declaration:
    identity = None if module.identity is None else IdentityBranch("scale_identity")
    return _declaration("conv", convs, identity, nn.Identity(), nn.Sequential(module.attn, module.act))


def _declaration(
    target: str, convs: list[_Conv], identity: IdentityBranch | None, before: nn.Module, after: nn.Module
) -> Declaration:
    """A declaration whose target has the shape of the first convolution; the others must fit it."""
    first, bn = convs[0].conv, convs[0].bn
    for branch, conv, norm in convs:
        _check_plain(branch.kernel, conv, norm)
        if (conv.stride, conv.groups) != (first.stride, first.groups):
            raise UserError(f"its branches {branch.kernel!r} and {convs[0].branch.kernel!r} differ in stride or groups")
    branches = [branch for branch, *_ in convs] + ([identity] if identity else [])
    return Declaration(
        Block(Target(target, tuple(first.weight.shape), first.groups), tuple(branches)),
        stride=first.stride[0],
        dilation=first.dilation[0],
        before=before,
        bn=nn.BatchNorm2d(bn.num_features, bn.eps, bn.momentum),
        after=after,
    )


def _check_plain(name: str, conv: nn.Module, bn: nn.Module) -> None:
    """Refuse what is not a square convolution without a bias that keeps the size at stride 1, and its batch norm."""
    # timm's batch norms hold the non-linearity and the DropBlock that may follow.
    followed = any(not isinstance(child, nn.Identity) for child in bn.children())
    if type(conv) is not nn.Conv2d or conv.bias is not None or not isinstance(bn, nn.BatchNorm2d) or followed:
        raise UserError(f"its branch {name!r} is not a convolution without a bias and a batch norm, and nothing else")
    if any(p != d * (k - 1) / 2 for k, d, p in zip(conv.kernel_size, conv.dilation, conv.padding, strict=True)):
        raise UserError(
            f"its branch {name!r} does not keep the size: kernel {conv.kernel_size}, padding {conv.padding}"
        )
