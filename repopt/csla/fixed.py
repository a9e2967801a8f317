"""Branches whose maps have fixed numbers: a prior for places, a filter or a frozen convolution after a 1x1."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from repopt.csla.branch import Branch, Target, per_filter, power
from repopt.csla.mult import GradMap, GradMult, Shape
from repopt.errors import UserError

Numbers = tuple[Any, ...]  # floats in nested tuples, as `torch.Tensor.tolist` has them in lists


@dataclass(frozen=True)
class PriorBranch(Branch):
    """A convolution of the target's size whose kernel is multiplied place by place by fixed numbers.

    A prior that falls with the distance from the centre, say (RepUX-Net, arXiv 2303.05785).

    Attributes:
        prior: numbers (*k).
    """

    scale: str
    prior: Numbers = field(kw_only=True)

    @override
    def kernel_shape(self, target: Target) -> Shape:
        _check_size(self.kernel, self.prior, target)
        return target.shape

    @override
    def embed(self, kernel: Tensor, target: Target) -> Tensor:
        return kernel * _tensor(self.prior, kernel)

    @override
    def adjoint(self, gradient: Tensor, target: Target) -> Tensor:
        return self.embed(gradient, target)

    @override
    def grad_mult(self, scale: Tensor, target: Target, degree: int) -> GradMult:
        constants = per_filter(scale, len(target.shape)) * _tensor(self.prior, scale)
        return GradMult(power(constants, degree), None, target.shape)


@dataclass(frozen=True)
class FilterBranch(Branch):
    """A 1x1 convolution whose every output channel a fixed filter follows, be it an average pooling.

    Diverse Branch Block's average pooling (arXiv 2103.13425), the edge detectors of super-resolution (ECBSR, ACM MM
    2021), or one frequency of a basis (`dct_filters`).

    Attributes:
        filter: numbers (*k) of the target's size; `average_filter`, `SOBEL_X`, `SOBEL_Y`, `LAPLACIAN`, `dct_filters`.
    """

    scale: str
    filter: Numbers = field(kw_only=True)

    @override
    def kernel_shape(self, target: Target) -> Shape:
        _check_size(self.kernel, self.filter, target)
        return (*target.shape[:2], *[1] * (len(target.shape) - 2))

    @override
    def embed(self, kernel: Tensor, target: Target) -> Tensor:
        return kernel * _tensor(self.filter, kernel)

    @override
    def adjoint(self, gradient: Tensor, target: Target) -> Tensor:
        return (gradient * _tensor(self.filter, gradient)).flatten(2).sum(2)

    @override
    def grad_mult(self, scale: Tensor, target: Target, degree: int) -> GradMap:
        _refuse_degree(self.kernel, "a filter spreads every entry over many places", degree)
        return GradMap.of_pattern(_tensor(self.filter, scale), power(scale, degree), target.shape)


@dataclass(frozen=True, eq=False)
class FrozenConvBranch(Branch):
    """A 1x1 convolution that a convolution of the target's size follows whose kernel is constant.

    Attributes:
        frozen: the constant kernel (O, M, *k), of M channels in between. It belongs to the declaration, not to the
            module's state: whoever loads a checkpoint declares it again.
    """

    scale: str
    frozen: Tensor = field(kw_only=True)

    @override
    def kernel_shape(self, target: Target) -> Shape:
        found, (out_channels, per_group, *size) = tuple(self.frozen.shape), target.shape
        if target.groups != 1 or len(found) != len(target.shape) or (found[0], *found[2:]) != (out_channels, *size):
            raise UserError(
                f"the frozen convolution of a branch ({self.kernel}) is {found}; a kernel of {target.shape} without "
                f"groups takes {(out_channels, '*', *size)} (there are {target.groups} groups)"
            )
        return (found[1], per_group, *[1] * len(size))

    @override
    def embed(self, kernel: Tensor, target: Target) -> Tensor:
        return torch.einsum("om...,mi->oi...", self.frozen.to(kernel), kernel.flatten(1))

    @override
    def adjoint(self, gradient: Tensor, target: Target) -> Tensor:
        return torch.einsum("oma,oia->mi", self.frozen.to(gradient).flatten(2), gradient.flatten(2))

    @override
    def grad_mult(self, scale: Tensor, target: Target, degree: int) -> GradMap:
        _refuse_degree(self.kernel, "a frozen convolution spreads every entry over many places", degree)
        return GradMap.of_frozen(self.frozen.to(scale) * per_filter(scale, self.frozen.dim()), target.shape)

    @override
    def term(self, kernel: Tensor, scale: Tensor | None, target: Target) -> Tensor:
        assert scale is not None, "of a branch with a scale"
        return self.embed(kernel, target) * per_filter(scale, len(target.shape))  # it mixes filters, so not before

    @override
    def gradients(
        self, gradient: Tensor, kernel: Tensor, scale: Tensor | None, target: Target, *, with_scale: bool
    ) -> tuple[Tensor, Tensor | None]:
        assert scale is not None, "of a branch with a scale"
        of_kernel = self.adjoint(gradient * per_filter(scale, gradient.dim()), target).view_as(kernel)
        if not with_scale:
            return of_kernel, None
        return of_kernel, torch.linalg.vecdot(*(t.flatten(1) for t in (self.embed(kernel, target), gradient)))

    @override
    def few_channels(self, target: Target) -> tuple[Branch, Target]:
        frozen = self.frozen[:4, :3].double().cpu()
        few = Target(target.name, (len(frozen), min(target.shape[1], 3), *target.shape[2:]))
        return FrozenConvBranch(self.kernel, self.scale, frozen=frozen), few


SOBEL_X: Numbers = ((1.0, 0.0, -1.0), (2.0, 0.0, -2.0), (1.0, 0.0, -1.0))
SOBEL_Y: Numbers = ((1.0, 2.0, 1.0), (0.0, 0.0, 0.0), (-1.0, -2.0, -1.0))
LAPLACIAN: Numbers = ((0.0, 1.0, 0.0), (1.0, -4.0, 1.0), (0.0, 1.0, 0.0))


def average_filter(size: Shape) -> Numbers:
    """Return the filter that an average pooling of a size (*k) is."""
    return _numbers(torch.full(size, 1 / math.prod(size), dtype=torch.float64))


def distance_prior(size: Shape, sharpness: float = 1.0) -> Numbers:
    """Return numbers (*k) that fall as ``1 / (1 + sharpness * distance from the centre)``, 1 there."""
    axes = [torch.arange(k, dtype=torch.float64) - (k - 1) / 2 for k in size]
    squares = sum(axis.square() for axis in torch.meshgrid(*axes, indexing="ij"))
    assert isinstance(squares, Tensor), "a size has dimensions"
    return _numbers(1 / (1 + sharpness * squares.sqrt()))


def dct_filters(size: Shape) -> list[Numbers]:
    """Return the orthonormal basis of the discrete cosine transform (DCT-II) of a size (*k), lowest frequency first."""
    bases = []
    for k in size:
        place, frequency = torch.arange(k, dtype=torch.float64), torch.arange(k, dtype=torch.float64).unsqueeze(1)
        basis = (2 / k) ** 0.5 * torch.cos(math.pi / k * (place + 0.5) * frequency)
        basis[0] /= 2**0.5
        bases.append(basis)
    found = torch.ones((), dtype=torch.float64)
    for basis in bases:
        found = torch.einsum("...,fp->...fp", found, basis)
    # (f1, p1, f2, p2 ...) -> (frequencies, *k)
    found = found.permute(*range(0, 2 * len(size), 2), *range(1, 2 * len(size), 2)).flatten(0, len(size) - 1)
    return [_numbers(pattern) for pattern in found]


def _tensor(numbers: Numbers, like: Tensor) -> Tensor:
    return torch.tensor(numbers, dtype=like.dtype, device=like.device)


def _numbers(values: Tensor) -> Numbers:
    return tuple(map(_numbers, values)) if values.dim() > 1 else tuple(values.tolist())


def _check_size(kernel: str, numbers: Numbers, target: Target) -> None:
    found = tuple(torch.tensor(numbers).shape)
    if found != target.shape[2:]:
        raise UserError(
            f"the fixed numbers of a branch ({kernel}) are {found}, and the target kernel {target.shape[2:]}"
        )


def _refuse_degree(kernel: str, why: str, degree: int) -> None:
    if degree != 1:
        raise UserError(
            f"constants follow SGD alone where branch {kernel!r} stands: {why}, so rules that normalise gradients need "
            "the branches themselves (repopt.hold_branches)"
        )
