"""What a branch does to its kernel: a constant linear map into the target kernel's shape.

The branches here place the entries of their kernels, each at one place of its own; `fixed` has those that mix them.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from repopt.csla.mult import GradMult, Multiplier, Shape, centre_entries
from repopt.errors import UserError


@dataclass(frozen=True)
class Target:
    """The plain kernel that a block becomes: its name in target mode, its shape (O, I, *k), and its groups."""

    name: str
    shape: Shape
    groups: int = 1


@dataclass(frozen=True)
class Branch(ABC):
    """One term ``s * (A(w) conv x)`` of a block; a subclass is a constant linear map A, by it and its adjoint.

    What the hyper-search finds of a branch is one number per output channel: its scale, or, where the constant scale is
    1 (an identity branch), its kernel, which the published files call a scale all the same.

    Attributes:
        kernel: name of the kernel w in the module that holds the block.
        scale: name of the scale s, trained in the hyper-search and constant afterwards; None = the constant 1.
        initial: value at which the hyper-search starts those numbers.
        decay_in_search: whether the hyper-search decays them, where they are a kernel.
    """

    kernel: str
    scale: str | None
    initial: float = 1.0
    decay_in_search: bool = True

    @property
    def searched_name(self) -> str:
        """Return the name of the (O,) numbers that the hyper-search finds."""
        return self.scale or self.kernel

    @abstractmethod
    def kernel_shape(self, target: Target) -> Shape:
        """Return the shape of w; raise UserError where it does not fit the target kernel."""

    def init_kernel(self, target: Target, searched: Tensor | None) -> Tensor:
        """Return a kernel w to start training from; `searched` are its values in a scale file that has them."""
        assert searched is None, "the kernel of a convolution is not searched"
        # nn.Conv2d's default, for any number of dimensions.
        return nn.init.kaiming_uniform_(torch.empty(self.kernel_shape(target)), a=math.sqrt(5))

    @abstractmethod
    def embed(self, kernel: Tensor, target: Target) -> Tensor:
        """Return A(w), a new tensor of the target's shape."""

    @abstractmethod
    def adjoint(self, gradient: Tensor, target: Target) -> Tensor:
        """Return ``A^T(G)`` of a gradient of the target's shape: <A(w), G> = <w, A^T(G)>; it may be a view."""

    @abstractmethod
    def grad_mult(self, scale: Tensor, target: Target, degree: int) -> Multiplier:
        """Return the branch's share of the multiplier: ``|s|^(1+d) A(1)`` of a placement, else ``s A A^T s``.

        Args:
            scale: (O,), the constant s.
            target: of the block.
            degree: of homogeneity d of the update rule.

        Raises:
            UserError: constants do not follow rules of this degree.
        """

    def term(self, kernel: Tensor, scale: Tensor | None, target: Target) -> Tensor:
        """Return ``s * A(w)``; the kernel itself where that is the same."""
        return self.embed(scaled(kernel, scale), target)

    def gradients(
        self, gradient: Tensor, kernel: Tensor, scale: Tensor | None, target: Target, *, with_scale: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Return ``dL/dw = A^T(s G)``, a new tensor, and if wanted ``dL/ds = <A(w), G>`` per output channel."""
        share = self.adjoint(gradient, target).reshape(kernel.shape)
        if scale is None:
            return share.clone(), None
        of_scale = torch.linalg.vecdot(*(t.reshape(len(kernel), -1) for t in (share, kernel))) if with_scale else None
        return scaled(share, scale), of_scale

    def few_channels(self, target: Target) -> tuple[Branch, Target]:
        """Return the branch on a target of few channels, on which its map is tried: it treats all of them alike."""
        out_channels, per_group, *size = target.shape
        groups, few = min(target.groups, 2), min(per_group, 3)
        square = out_channels == per_group * target.groups
        return self, Target(target.name, (groups * few if square else groups * (few + 1), few, *size), groups)


@dataclass(frozen=True)
class PlacedBranch(Branch):
    """A branch that copies every entry of its kernel to one place of its own, zeros elsewhere."""

    @abstractmethod
    def scatter_view(self, whole: Tensor, target: Target) -> Tensor:
        """View the entries of a kernel of the target's shape to which those of w are copied, in the order of w's."""

    @override
    def embed(self, kernel: Tensor, target: Target) -> Tensor:
        whole = kernel.new_zeros(target.shape)
        entries = self.scatter_view(whole, target)
        entries.copy_(kernel.reshape(entries.shape))
        return whole

    @override
    def adjoint(self, gradient: Tensor, target: Target) -> Tensor:
        return self.scatter_view(gradient, target)


@dataclass(frozen=True)
class ConvBranch(PlacedBranch):
    """A convolution of its own size, placed at the centre of the target kernel (a 1x1 in the middle of a 3x3).

    Attributes:
        size: (*k) of its kernel, or one number for all dimensions.
        dilation: between its entries (UniRepLKNet, arXiv 2311.15599: a 3x3 of dilation 2 in a 5x5).
    """

    scale: str
    size: int | Shape = 1
    dilation: int = 1

    @override
    def kernel_shape(self, target: Target) -> Shape:
        whole = target.shape[2:]
        size = (self.size,) * len(whole) if isinstance(self.size, int) else self.size
        spans = [self.dilation * (s - 1) + 1 for s in size]
        if len(size) != len(whole) or any(s > w or (w - s) % 2 for s, w in zip(spans, whole, strict=True)):
            dilated = f" and dilation {self.dilation}" if self.dilation > 1 else ""
            raise UserError(
                f"a branch of size {size}{dilated} ({self.kernel}) has no place at the centre of a kernel of {whole}"
            )
        return (*target.shape[:2], *size)

    @override
    def scatter_view(self, whole: Tensor, target: Target) -> Tensor:
        return self._centre_of(whole, target)

    @override
    def grad_mult(self, scale: Tensor, target: Target, degree: int) -> GradMult:
        constants = scale.new_zeros(target.shape[0], 1, *target.shape[2:])
        centre = self._centre_of(constants, target)
        centre.copy_(per_filter(power(scale, degree), centre.dim()).expand_as(centre))
        return GradMult(constants, None, target.shape)

    def _centre_of(self, whole: Tensor, target: Target) -> Tensor:
        """View the branch's places in a kernel (O, I, *k) of any number of channels."""
        spans = [self.dilation * (s - 1) + 1 for s in self.kernel_shape(target)[2:]]
        margins = [(k - span) // 2 for k, span in zip(whole.shape[2:], spans, strict=True)]
        places = (slice(m, m + span, self.dilation) for m, span in zip(margins, spans, strict=True))
        index: tuple[Any, ...] = (..., *places)
        return whole[index]


@dataclass(frozen=True)
class IdentityBranch(PlacedBranch):
    """The identity: a trainable kernel of one number per channel on the diagonal, whose constant scale is 1."""

    scale: None = None

    @override
    def kernel_shape(self, target: Target) -> Shape:
        out_channels, per_group, *size = target.shape
        if out_channels != per_group * target.groups or any(k % 2 == 0 for k in size):
            raise UserError(
                f"an identity branch ({self.kernel}) has no place in a kernel of {target.shape} "
                f"({target.groups} groups): it needs as many input as output channels, and odd sizes"
            )
        return (out_channels,)

    @override
    def init_kernel(self, target: Target, searched: Tensor | None) -> Tensor:
        if searched is None:
            return torch.full(self.kernel_shape(target), self.initial)
        return searched.clone()

    @override
    def scatter_view(self, whole: Tensor, target: Target) -> Tensor:
        centre = centre_entries(whole)
        return centre.unflatten(0, (target.groups, target.shape[1])).diagonal(dim1=1, dim2=2)  # (groups, I)

    @override
    def grad_mult(self, scale: Tensor, target: Target, degree: int) -> GradMult:
        out_channels, per_group, *size = target.shape
        constant = power(scale, degree)
        if per_group == 1:  # depthwise: every filter has one input channel, so the diagonal is all of the centre
            return GradMult(self.embed(constant, target), None, target.shape)
        return GradMult(constant.new_zeros(out_channels, 1, *size), constant, target.shape)


def scaled(kernel: Tensor, scale: Tensor | None) -> Tensor:
    """Return a kernel (O, ...) times numbers (O,), filter by filter; None = 1."""
    return kernel if scale is None else kernel * per_filter(scale, kernel.dim())


def per_filter(values: Tensor, dims: int) -> Tensor:
    """View (O,) in a shape of so many dimensions that multiplies a kernel (O, ...) filter by filter."""
    return values.view(-1, *[1] * (dims - 1))


def power(constants: Tensor, degree: int) -> Tensor:
    """Return ``|c|^(1+d)``, by which constants enter the multiplier of an update rule of degree d."""
    return constants.abs() ** (1 + degree)
