"""The inference form of a trained network: plain convolutions with biases."""

from __future__ import annotations

import copy

import torch
from torch import nn

from repopt.layers import Deployable


@torch.no_grad()
def deploy(model: nn.Module) -> nn.Module:
    """Return a copy in eval mode, the same function, whose batch norms and branches are folded into convolutions.

    Args:
        model: any of ours, in any mode; one that is deployed already stays as it is.
    """
    return _fused(copy.deepcopy(model).eval()).requires_grad_(requires_grad=False)


def _fused(module: nn.Module) -> nn.Module:
    """Replace the modules in a module, then the module itself, where they say by what, and return it."""
    for name, child in module.named_children():
        setattr(module, name, _fused(child))
    return module.fuse() if isinstance(module, Deployable) else module
