"""The inference form of a trained network: plain convolutions with biases."""

from __future__ import annotations

import copy

import torch
from torch import nn

from repopt.layers import Deployable


@torch.no_grad()
def deploy(model: nn.Module) -> nn.Module:
    """A copy in eval mode in which every block is folded into one convolution with a bias; the same function.

    Args:
        model: any of ours: hs, csla and target lose their batch norms, a baseline its branches.
    """
    plain = copy.deepcopy(model).eval()
    for name, module in list(plain.named_modules()):
        if isinstance(module, Deployable):
            plain.set_submodule(name, module.deployed())
    return plain.requires_grad_(requires_grad=False)
