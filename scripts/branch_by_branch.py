"""The slow reference: every branch of a declared block is an operation of its own."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from repopt.csla import (
    Branch,
    ConvBranch,
    FilterBranch,
    FrozenConvBranch,
    FunctionBlock,
    IdentityBranch,
    PriorBranch,
)
from repopt.csla.functions import dbb_kernel, orepa_kernel, repmlp_matrix
from repopt.layers import RepConv, RepLayer, RepLinear
from repopt.transposed import RepConvTranspose


def run_branch_by_branch(module: RepLayer) -> None:
    """Have a module compute its branches one by one from now on."""
    module.linear_part = functools.partial(branch_by_branch, module)  # type: ignore[method-assign]  # of this one alone


def branch_by_branch(module: RepLayer, x: Tensor) -> Tensor:
    """Return the output of a module, in hs or csla mode, as the sum over separate branches."""
    if isinstance(module.block, FunctionBlock):
        assert isinstance(module.block.function, functools.partial)
        return SEPARATE[module.block.function.func](module, x)
    outputs = []
    for branch in module.block.branches:
        y = branch_output(branch, module.values(branch.kernel), x, module)
        outputs.append(y if branch.scale is None else per_channel(module.values(branch.scale), y, module) * y)
    return sum(outputs[1:], outputs[0])


def per_channel(values: Tensor, y: Tensor, module: RepLayer) -> Tensor:
    """View numbers (O,) in a shape that multiplies the channels of an output."""
    return values if isinstance(module, RepLinear) else values.view(-1, *[1] * (y.dim() - 2))


def branch_output(branch: Branch, kernel: Tensor, x: Tensor, module: RepLayer) -> Tensor:
    """Return a branch's output of x, before its scale."""
    if isinstance(branch, IdentityBranch):
        return per_channel(kernel, x, module) * x
    if isinstance(module, RepLinear):
        return F.linear(x, kernel)
    if isinstance(module, RepConvTranspose):
        return module.with_kernel(x, kernel)
    assert isinstance(module, RepConv)
    groups, filters = module.block.target.groups, len(kernel)
    if isinstance(branch, PriorBranch):
        return convolve(x, kernel * torch.tensor(branch.prior, dtype=x.dtype), module, groups)
    if isinstance(branch, FilterBranch):
        fixed = torch.tensor(branch.filter, dtype=x.dtype).expand(filters, 1, *module.block.target.shape[2:])
        return convolve(plain_convolve(x, kernel, groups), fixed, module, filters)
    if isinstance(branch, FrozenConvBranch):
        return convolve(plain_convolve(x, kernel, groups), branch.frozen.to(x), module, 1)
    assert isinstance(branch, ConvBranch)
    return convolve(x, kernel, module, groups, branch.dilation)


def convolve(x: Tensor, kernel: Tensor, module: RepConv, groups: int, dilation: int = 1) -> Tensor:
    """Return a convolution of x with the stride and dilation of a module's, padded to its size."""
    operation: Any = (F.conv1d, F.conv2d, F.conv3d)[kernel.dim() - 3]
    dilation *= module.dilation
    padding = [dilation * (size // 2) for size in kernel.shape[2:]]
    return operation(x, kernel, None, module.stride, padding, dilation, groups)


def plain_convolve(x: Tensor, kernel: Tensor, groups: int = 1) -> Tensor:
    """Return a convolution of x at stride 1, padded to its size."""
    operation: Any = (F.conv1d, F.conv2d, F.conv3d)[kernel.dim() - 3]
    return operation(x, kernel, None, 1, [size // 2 for size in kernel.shape[2:]], 1, groups)


def dbb_outputs(module: RepLayer, x: Tensor) -> dict[str, Tensor]:
    """Return the outputs of Diverse Branch Block's branches by the names of their scales."""
    assert isinstance(module, RepConv)
    return {
        "scale_square": convolve(x, module.values("square"), module, 1),
        "scale_point": convolve(x, point(module, "point"), module, 1),
        "scale_sequence": convolve(plain_convolve(x, point(module, "first")), module.values("second"), module, 1),
        "scale_pooled": F.avg_pool2d(
            plain_convolve(x, point(module, "pooled")), 3, module.stride, 1, count_include_pad=True
        ),
    }


def orepa_outputs(module: RepLayer, x: Tensor) -> dict[str, Tensor]:
    """Return the outputs of OREPA's branches by the names of their scales."""
    assert isinstance(module, RepConv)
    assert isinstance(module.block, FunctionBlock) and isinstance(module.block.function, functools.partial)
    frequencies = torch.tensor(module.block.function.args[-1], dtype=x.dtype).unsqueeze(1)
    depthwise = module.values("depthwise").unsqueeze(1)
    return dbb_outputs(module, x) | {
        "scale_separable": plain_convolve(convolve(x, depthwise, module, x.shape[1]), point(module, "pointwise")),
        "scale_frequency": convolve(
            plain_convolve(x, point(module, "frequency")), frequencies, module, len(frequencies)
        ),
    }


def sum_of(outputs: Callable[[RepLayer, Tensor], dict[str, Tensor]], module: RepLayer, x: Tensor) -> Tensor:
    """Return the scaled sum of outputs."""
    terms = [per_channel(module.values(name), y, module) * y for name, y in outputs(module, x).items()]
    return sum(terms[1:], terms[0])


def repmlp_output(module: RepLayer, x: Tensor) -> Tensor:
    """Return what RepMLP's layer makes of images that come as vectors: its matrix, and convolutions."""
    theta = {name: module.values(name) for name, _ in module.block.names()}
    y = F.linear(x, theta.pop("matrix"))
    side = math.isqrt(x.shape[1] // next(iter(theta.values())).shape[1])
    images = x.view(len(x), -1, side, side)
    return y + sum(plain_convolve(images, kernel).flatten(1) for kernel in theta.values())


def point(module: RepLayer, name: str) -> Tensor:
    """Return a matrix (O, I) as the kernel of a 1x1 convolution."""
    return module.values(name)[..., None, None]


SEPARATE: dict[Any, Callable[[RepLayer, Tensor], Tensor]] = {
    dbb_kernel: functools.partial(sum_of, dbb_outputs),
    orepa_kernel: functools.partial(sum_of, orepa_outputs),
    repmlp_matrix: repmlp_output,
}
