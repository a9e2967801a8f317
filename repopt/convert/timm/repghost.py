"""RepGhostNet."""

from __future__ import annotations

from timm.models.repghost import RepGhostModule

from repopt.convert.declaration import Declaration, register_block
from repopt.convert.timm.parts import conv, declaration
from repopt.csla import IdentityBranch
from repopt.errors import UserError


@register_block(RepGhostModule)
def _rep_ghost(module: RepGhostModule) -> Declaration:
    if len(module.fusion_bn) != 1:
        raise UserError("it has no branches: it was created with reparam=False, or they are fused already")
    cheap = conv("cheap_operation.0", "cheap_operation.1", module.cheap_operation)
    identity = IdentityBranch("fusion_scale", decay_in_search=False)  # as in RepOpt-GhostNet
    return declaration([cheap], identity, target="cheap_operation.0", before=module.primary_conv, after=module.relu)
