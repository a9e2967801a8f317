"""RepOptimizers: plain networks trained as if they were multi-branch ones (arXiv 2205.15242).

model  = repopt.create_model("RepOpt-VGG-B1", mode="target", num_classes=1000)
scales = repopt.load_scales("RepOpt-VGG-B1-scales.pth")
repopt.initialize(model, scales)
optimizer = repopt.build_optimizer("sgd", model, scales, lr=0.1, momentum=0.9, weight_decay=4e-5, nesterov=True)
"""

from repopt.blocks import declared_blocks
from repopt.branches import hold_branches, share_branches
from repopt.checkpoint import load_weights
from repopt.convert import Declaration, convert_model, register_block
from repopt.csla import (
    Block,
    Branch,
    ConvBranch,
    FilterBranch,
    FrozenConvBranch,
    FunctionBlock,
    GradMap,
    GradMult,
    IdentityBranch,
    PlacedBranch,
    PriorBranch,
    Target,
)
from repopt.declare import declare
from repopt.deploy import deploy
from repopt.errors import EquivalenceWarning, UserError
from repopt.layers import RepConv1d, RepConv2d, RepConv3d, RepLayer, RepLinear
from repopt.load import load
from repopt.merge import PlainNetwork, merge_branches
from repopt.models import create_model, list_models
from repopt.optim import (
    BranchOptimizer,
    HeldBranches,
    JointOptimizer,
    RepAdam,
    RepAdamW,
    RepLion,
    RepOptimizer,
    RepRMSprop,
    RepSGD,
    clip_grad_norm_,
)
from repopt.reparam import build_optimizer, grad_mults, initialize, param_groups
from repopt.scales import (
    BoundScales,
    bind,
    constant_scales,
    extract_scales,
    fit_scales,
    load_scales,
    save_scales,
)
from repopt.transposed import RepConvTranspose

__version__ = "0.2.0"

__all__ = [
    "Block",
    "BoundScales",
    "Branch",
    "BranchOptimizer",
    "ConvBranch",
    "Declaration",
    "EquivalenceWarning",
    "FilterBranch",
    "FrozenConvBranch",
    "FunctionBlock",
    "GradMap",
    "GradMult",
    "HeldBranches",
    "IdentityBranch",
    "JointOptimizer",
    "PlacedBranch",
    "PlainNetwork",
    "PriorBranch",
    "RepAdam",
    "RepAdamW",
    "RepConv1d",
    "RepConv2d",
    "RepConv3d",
    "RepConvTranspose",
    "RepLayer",
    "RepLinear",
    "RepLion",
    "RepOptimizer",
    "RepRMSprop",
    "RepSGD",
    "Target",
    "UserError",
    "bind",
    "build_optimizer",
    "clip_grad_norm_",
    "constant_scales",
    "convert_model",
    "create_model",
    "declare",
    "declared_blocks",
    "deploy",
    "extract_scales",
    "fit_scales",
    "grad_mults",
    "hold_branches",
    "initialize",
    "list_models",
    "load",
    "load_scales",
    "load_weights",
    "merge_branches",
    "param_groups",
    "register_block",
    "save_scales",
    "share_branches",
]
