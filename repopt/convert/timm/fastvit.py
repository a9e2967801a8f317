"""FastViT and MobileCLIP's image encoders.

`RepMixer` computes ``x + gamma * (mixer(x) - norm(x))``: a residual with a layer scale gamma around a depthwise
MobileOne block and a batch norm. Per channel that is a k x k convolution, a 1x1 and an identity. So gamma is a factor
of their scales, and no parameter of its own any more: the scales are trained in a search and constant afterwards. The
residual is in the kernel, before the new batch norm.
"""

from __future__ import annotations

import torch
from timm.models.fastvit import LayerScale2d, MobileOneBlock, ReparamLargeKernelConv, RepConditionalPosEnc, RepMixer
from torch import nn

from repopt.convert.declaration import Declaration, register_block
from repopt.convert.timm.parts import FUSED, IDENTITY, Conv, conv, convs_and_1x1, declaration, fuse_residual
from repopt.errors import UserError
from repopt.layers import FusedBranches, batch_norm_as_affine


@register_block(MobileOneBlock)
def _mobile_one(module: MobileOneBlock) -> Declaration:
    _check(module)
    if not module.conv_kxk:
        raise UserError("it has no convolution of its whole size")
    convs = convs_and_1x1(module.conv_kxk, module.conv_scale)
    return declaration(convs, None if module.identity is None else IDENTITY, after=nn.Sequential(module.se, module.act))


@register_block(ReparamLargeKernelConv)
def _large_kernel(module: ReparamLargeKernelConv) -> Declaration:
    _check(module)
    convs = [conv("conv", "scale_conv", module.large_conv), conv("conv_small", "scale_small", module.small_conv)]
    return declaration(convs, after=nn.Sequential(module.se, module.act))


@register_block(RepConditionalPosEnc)
def _pos_enc(module: RepConditionalPosEnc) -> Declaration:
    _check(module)
    return declaration([conv("conv", "scale_conv", module.pos_enc)], IDENTITY)


@register_block(RepMixer)
def _rep_mixer(module: RepMixer) -> Declaration:
    _check(module)
    return declaration(_mixer_convs(module), IDENTITY, fuse=_fuse_rep_mixer)


def _fuse_rep_mixer(module: RepMixer) -> FusedBranches:
    mixer, norm = module.mixer.identity, module.norm.identity
    assert mixer is not None and norm is not None, "there are as many channels as before"
    (scale, shift), (other, subtracted) = batch_norm_as_affine(mixer), batch_norm_as_affine(norm)
    scaled = isinstance(module.layer_scale, LayerScale2d)
    gate = module.layer_scale.gamma.flatten() if scaled else torch.ones_like(scale)
    return fuse_residual(_mixer_convs(module), gate, scale - other, shift - subtracted)


def _mixer_convs(module: RepMixer) -> list[Conv]:
    return convs_and_1x1(module.mixer.conv_kxk, module.mixer.conv_scale)


def _check(module: MobileOneBlock | ReparamLargeKernelConv | RepConditionalPosEnc | RepMixer) -> None:
    if module.reparam_conv is not None:
        raise UserError(FUSED)
