"""Blocks with trained convolutions in a row, as functions of their kernels: DBB's, OREPA's, and RepMLP's.

Their scales are among theta, and trained; a batch norm follows the block, as everywhere here.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from repopt.csla.block import FunctionBlock
from repopt.csla.branch import ConvBranch, Target, scaled
from repopt.csla.fixed import Numbers, average_filter, dct_filters
from repopt.csla.mult import Shape
from repopt.errors import UserError

Theta = Mapping[str, Tensor]
DBB_SCALES = ("scale_square", "scale_point", "scale_sequence", "scale_pooled")


def dbb_block(target: Target, between: int | None = None) -> FunctionBlock:
    """Return Diverse Branch Block's sum (arXiv 2103.13425): kxk, 1x1, 1x1 - kxk, 1x1 - average pooling.

    Args:
        target: the plain kernel, without groups.
        between: channels between the 1x1 and the kxk; None = as many as come in.
    """
    out_channels, inputs = _without_groups(target)
    between = between or inputs
    shapes = {
        "square": target.shape,
        "point": (out_channels, inputs),
        "first": (between, inputs),
        "second": (out_channels, between, *target.shape[2:]),
        "pooled": (out_channels, inputs),
    }
    return _with_scales(
        target, functools.partial(dbb_kernel, target, average_filter(target.shape[2:])), shapes, DBB_SCALES
    )


def dbb_kernel(target: Target, average: Numbers, theta: Theta) -> Tensor:
    """Return W = f(theta) of `dbb_block`."""
    terms = {
        "scale_square": theta["square"],
        "scale_point": _at_centre(theta["point"], target),
        "scale_sequence": _sequence(theta["first"], theta["second"]),
        "scale_pooled": _outer(theta["pooled"], average),
    }
    return _sum(terms, theta)


def orepa_block(target: Target) -> FunctionBlock:
    """Return OREPA's sum (arXiv 2204.00826): DBB's branches, a depthwise kxk - 1x1, and a 1x1 - frequencies.

    Of the frequencies of a cosine transform, an output channel has one, in turn.

    Args:
        target: the plain kernel, without groups.
    """
    out_channels, inputs = _without_groups(target)
    size = target.shape[2:]
    shapes = {
        "square": target.shape,
        "point": (out_channels, inputs),
        "first": (inputs, inputs),
        "second": target.shape,
        "pooled": (out_channels, inputs),
        "depthwise": (inputs, *size),
        "pointwise": (out_channels, inputs),
        "frequency": (out_channels, inputs),
    }
    scales = (*DBB_SCALES, "scale_separable", "scale_frequency")
    basis = dct_filters(size)
    frequencies = tuple(basis[channel % len(basis)] for channel in range(out_channels))
    function = functools.partial(orepa_kernel, target, average_filter(size), frequencies)
    return _with_scales(target, function, shapes, scales)


def orepa_kernel(target: Target, average: Numbers, frequencies: Numbers, theta: Theta) -> Tensor:
    """Return W = f(theta) of `orepa_block`."""
    fixed = torch.tensor(frequencies, dtype=theta["frequency"].dtype, device=theta["frequency"].device)
    terms = {
        "scale_separable": torch.einsum("oi,i...->oi...", theta["pointwise"], theta["depthwise"]),
        "scale_frequency": torch.einsum("oi,o...->oi...", theta["frequency"], fixed),
    }
    return dbb_kernel(target, average, theta) + _sum(terms, theta)


def repmlp_block(out_channels: int, in_channels: int, size: Shape, kernels: Sequence[int]) -> FunctionBlock:
    """Return RepMLP's layer (arXiv 2105.01883): a fully connected one, and convolutions within it.

    Args:
        out_channels, in_channels: of images (C, H, W), which come and go as vectors of C * H * W numbers.
        size: (H, W).
        kernels: sizes of the convolutions beside the matrix.
    """
    area = size[0] * size[1]
    target = Target("fc", (out_channels * area, in_channels * area))
    shapes: dict[str, Shape] = {"matrix": target.shape}
    shapes |= {f"conv_{k}": (out_channels, in_channels, k, k) for k in kernels}
    function = functools.partial(repmlp_matrix, in_channels, size)
    return FunctionBlock(target, function=function, shapes=shapes)


def repmlp_matrix(in_channels: int, size: Shape, theta: Theta) -> Tensor:
    """Return W = f(theta) of `repmlp_block`: a convolution's matrix is what it makes of unit vectors."""
    inputs = in_channels * size[0] * size[1]
    units = torch.eye(inputs, dtype=theta["matrix"].dtype, device=theta["matrix"].device)
    units = units.view(inputs, in_channels, *size)
    matrices = (
        F.conv2d(units, kernel, padding=kernel.shape[-1] // 2).flatten(1).T
        for name, kernel in theta.items()
        if name != "matrix"
    )
    return sum(matrices, theta["matrix"])


def _with_scales(
    target: Target, function: functools.partial[Tensor], shapes: Mapping[str, Shape], scales: Sequence[str]
) -> FunctionBlock:
    ones = dict.fromkeys(scales, 1.0)
    of_scales = dict.fromkeys(scales, target.shape[:1])
    return FunctionBlock(target, function=function, shapes={**shapes, **of_scales}, initial=ones)


def _without_groups(target: Target) -> tuple[int, int]:
    if target.groups != 1 or len(target.shape) < 3:
        raise UserError(f"this block is one of a convolution without groups, not of {target}")
    return target.shape[:2]  # type: ignore[return-value]  # two of them


def _sum(terms: Theta, theta: Theta) -> Tensor:
    """Return the sum of terms by the names of their scales."""
    first, *others = (scaled(term, theta[name]) for name, term in terms.items())
    return sum(others, first)


def _at_centre(point: Tensor, target: Target) -> Tensor:
    return ConvBranch("point", "scale").embed(point, target)


def _sequence(first: Tensor, second: Tensor) -> Tensor:
    """Return the kernel of a 1x1 convolution (M, I) and one (O, M, *k) after it."""
    return torch.einsum("om...,mi->oi...", second, first)


def _outer(point: Tensor, numbers: Numbers) -> Tensor:
    """Return the kernel of a 1x1 convolution (O, I) and a fixed filter after it."""
    return torch.tensordot(point, torch.tensor(numbers, dtype=point.dtype, device=point.device), 0)
