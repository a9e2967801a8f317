from .checkpoint import load_weights
from .convert import Declaration, convert_model, register_block
from .csla import Block, Branch, ConvBranch, GradMult, IdentityBranch, Target
from .deploy import deploy
from .errors import UserError
from .layers import RepConv2d
from .models import create_model, list_models
from .optim import RepAdam, RepAdamW, RepLion, RepOptimizer, RepRMSprop, RepSGD, clip_grad_norm_
from .reparam import (
    build_optimizer,
    constant_scales,
    declared_blocks,
    extract_scales,
    fit_scales,
    grad_mults,
    initialize,
    param_groups,
)
from .scales import load_scales, save_scales

__all__ = [
    "Block",
    "Branch",
    "ConvBranch",
    "Declaration",
    "GradMult",
    "IdentityBranch",
    "RepAdam",
    "RepAdamW",
    "RepConv2d",
    "RepLion",
    "RepOptimizer",
    "RepRMSprop",
    "RepSGD",
    "Target",
    "UserError",
    "build_optimizer",
    "clip_grad_norm_",
    "constant_scales",
    "convert_model",
    "create_model",
    "declared_blocks",
    "deploy",
    "extract_scales",
    "fit_scales",
    "grad_mults",
    "initialize",
    "list_models",
    "load_scales",
    "load_weights",
    "param_groups",
    "register_block",
    "save_scales",
]
