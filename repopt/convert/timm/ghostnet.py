"""GhostNetV3: up to three sums of branches in the forward of a module."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from timm.models.ghostnet import GhostBottleneckV3, GhostModuleV3
from torch import nn

from repopt.convert.declaration import register_container
from repopt.convert.timm.parts import FUSED, SumOfBranches
from repopt.errors import UserError


@register_container(GhostModuleV3)
def _ghost_module(module: Any) -> int:
    _fold(module)
    primary, cheap = _numbered(module.primary_rpr_conv), _numbered(module.cheap_rpr_conv)
    channels = int(module.primary_rpr_conv[0].conv.in_channels)
    module.primary_conv = SumOfBranches(primary, after=module.primary_activation)
    cheap["conv_1x1"] = module.cheap_rpr_scale
    module.cheap_operation = SumOfBranches(cheap, module.cheap_rpr_skip, module.cheap_activation)
    _drop(module, "primary_rpr_conv", "primary_activation", "cheap_rpr_conv", "cheap_rpr_scale", "cheap_rpr_skip")
    _drop(module, "cheap_activation")
    return channels


@register_container(GhostBottleneckV3)
def _ghost_bottleneck(module: Any) -> int | None:
    if module.stride == 1:
        return None
    _fold(module)
    module.conv_dw = SumOfBranches({**_numbered(module.dw_rpr_conv), "conv_1x1": module.dw_rpr_scale})
    _drop(module, "dw_rpr_conv", "dw_rpr_scale")
    return int(module.ghost1.primary_rpr_conv[0].conv.in_channels)


def _fold(module: Any) -> None:
    """Let a module run the parts that have taken up its branches at inference."""
    if module.infer_mode:
        raise UserError(FUSED)
    module.infer_mode = True


def _numbered(convs: Iterable[nn.Module]) -> dict[str, nn.Module]:
    return {f"conv_{i}": branch for i, branch in enumerate(convs)}


def _drop(module: nn.Module, *names: str) -> None:
    for name in names:
        delattr(module, name)
