"""The declarations of timm's re-parameterized blocks: RepVGG's, MobileOne's and RepGhostNet's."""

from __future__ import annotations

import math
from typing import NamedTuple

from timm.layers import ConvNormAct
from timm.models.byobnet import MobileOneBlock, RepVggBlock
from timm.models.repghost import RepGhostModule
from torch import nn

from repopt.convert.declaration import Declaration, register_block
from repopt.csla import Block, ConvBranch, IdentityBranch, Target
from repopt.errors import UserError


class _Conv(NamedTuple):
    """A branch's declaration and the modules that it stands for."""

    branch: ConvBranch
    conv: nn.Conv2d
    bn: nn.BatchNorm2d


@register_block(RepVggBlock)
def _rep_vgg(module: RepVggBlock) -> Declaration:
    _check_byob(module)
    convs = [_conv_norm("conv", "scale_conv", module.conv_kxk), _conv_norm("conv_1x1", "scale_1x1", module.conv_1x1)]
    return _byob(module, convs)


@register_block(MobileOneBlock)
def _mobile_one(module: MobileOneBlock) -> Declaration:
    _check_byob(module)
    # n equal branches of the scale 1 / sqrt(n) start as one of the scale 1, and under SGD step as one.
    initial = 1 / math.sqrt(len(module.conv_kxk))
    convs = [_conv_norm(f"conv_{i}", f"scale_conv_{i}", conv, initial) for i, conv in enumerate(module.conv_kxk)]
    if module.conv_scale is not None:
        convs.append(_conv_norm("conv_1x1", "scale_1x1", module.conv_scale))
    return _byob(module, convs)


@register_block(RepGhostModule)
def _rep_ghost(module: RepGhostModule) -> Declaration:
    if len(module.fusion_bn) != 1:
        raise UserError("it has no branches: it was created with reparam=False, or they are fused already")
    conv = _conv("cheap_operation.0", "cheap_operation.1", *module.cheap_operation)
    identity = IdentityBranch("fusion_scale", decay_in_search=False)  # as in RepOpt-GhostNet
    return _declaration("cheap_operation.0", [conv], identity, module.primary_conv, module.relu)


def _check_byob(module: RepVggBlock | MobileOneBlock) -> None:
    if module.reparam_conv is not None:
        raise UserError("its branches are fused already (reparam_conv)")
    if not isinstance(module.drop_path, nn.Identity):
        raise UserError("drop_path drops branches at random: create the model with drop_path_rate=0")


def _byob(module: RepVggBlock | MobileOneBlock, convs: list[_Conv]) -> Declaration:
    identity = None if module.identity is None else IdentityBranch("scale_identity")
    return _declaration("conv", convs, identity, nn.Identity(), nn.Sequential(module.attn, module.act))


def _conv_norm(kernel: str, scale: str, module: nn.Module, initial: float = 1.0) -> _Conv:
    assert isinstance(module, ConvNormAct)
    if module.aa is not None:
        raise UserError("its branches end in an anti-aliasing layer")
    return _conv(kernel, scale, module.conv, module.bn, initial)


def _conv(kernel: str, scale: str, conv: nn.Module, bn: nn.Module, initial: float = 1.0) -> _Conv:
    """Return a branch; refuse what is no square convolution that keeps the size at stride 1, and its batch norm."""
    # timm's batch norms hold the non-linearity and the DropBlock that may follow.
    followed = any(not isinstance(child, nn.Identity) for child in bn.children())
    if type(conv) is not nn.Conv2d or conv.bias is not None or not isinstance(bn, nn.BatchNorm2d) or followed:
        raise UserError(f"its branch {kernel!r} is not a convolution without a bias and a batch norm, and nothing else")
    if any(p != d * (k - 1) / 2 for k, d, p in zip(conv.kernel_size, conv.dilation, conv.padding, strict=True)):
        raise UserError(
            f"its branch {kernel!r} does not keep the size: kernel {conv.kernel_size}, padding {conv.padding}"
        )
    return _Conv(ConvBranch(kernel, scale, initial, size=conv.kernel_size), conv, bn)


def _declaration(
    target: str, convs: list[_Conv], identity: IdentityBranch | None, before: nn.Module, after: nn.Module
) -> Declaration:
    """Return a declaration whose target has the shape of the first convolution; the others must fit it."""
    first_branch, first, bn = convs[0]
    for branch, conv, _ in convs:
        if (conv.stride, conv.groups) != (first.stride, first.groups):
            raise UserError(f"its branches {branch.kernel!r} and {first_branch.kernel!r} differ in stride or groups")
    branches = [branch for branch, *_ in convs] + ([identity] if identity else [])
    return Declaration(
        Block(Target(target, tuple(first.weight.shape), first.groups), tuple(branches)),
        stride=first.stride[0],
        dilation=first.dilation[0],
        before=before,
        bn=nn.BatchNorm2d(bn.num_features, bn.eps, bn.momentum),
        after=after,
    )
