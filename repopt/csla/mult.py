"""What a kernel's gradient is multiplied by, kept small: a number per entry, or a linear map that mixes entries."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from repopt.errors import UserError

Shape = tuple[int, ...]


@dataclass(frozen=True)
class GradMult:
    """The constant multiplier M of one kernel's gradient, kept small: a kernel per filter and a number per diagonal.

    Attributes:
        filter: (O, 1, *k), what all input channels of a filter share.
        diagonal: (O,), added where an identity branch meets the kernel (its centre, input channel = output channel);
            None without an identity branch.
        shape: (O, I, *k), of the kernel that it multiplies.
        degree: of the update rule it is for; None for a branch's share alone.
        first: which filter of the whole kernel is the first here, where this is a part (`rows`).
    """

    filter: Tensor
    diagonal: Tensor | None
    shape: Shape
    degree: int | None = None
    first: int = 0

    def __call__(self, gradient: Tensor) -> Tensor:
        """Return ``M * gradient`` as a new tensor of the gradient's shape (O, I, *k); M itself is never made."""
        product = gradient * self.filter
        for constants, products, entries in self.on_diagonal(product, gradient):
            products.addcmul_(constants, entries)
        return product

    def dense(self) -> Tensor:
        """Return M in full, (O, I, *k)."""
        return self(self.filter.new_ones(self.shape))

    def on_diagonal(self, *kernels: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """Yield parts of `diagonal`, each with views (all of its shape) of where it meets kernels (O, I, *k).

        There is one part in a whole kernel, and none without an identity branch; a kernel that is cut within its groups
        (`rows`) has up to three.
        """
        if self.diagonal is None:
            return
        start, count, inputs = 0, *self.shape[:2]
        while start < count:
            column = (self.first + start) % inputs
            width = min(inputs - column, count - start)
            groups = (count - start) // width if width == inputs else 1
            rows, shape = slice(start, start + groups * width), (groups, width)
            views = (
                centre_entries(kernel)[rows, column:].unflatten(0, shape).diagonal(dim1=1, dim2=2) for kernel in kernels
            )
            yield self.diagonal[rows].view(shape), *views
            start = rows.stop

    def squares(self, gradient: Tensor, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield constants c and values v of one shape, with ``sum(M * G^2) = sum(c * v^2)``.

        M is the same for all input channels of a filter, but for the diagonal: so their squares are added up first.
        """
        yield self.filter, torch.linalg.vector_norm(gradient, dim=1, keepdim=True, dtype=dtype)
        for constants, entries in self.on_diagonal(gradient):
            yield constants, entries.to(dtype)

    def rows(self, start: int, stop: int) -> GradMult:
        """Return the multiplier of the filters from `start` up to `stop`: views, nothing is copied."""
        diagonal = None if self.diagonal is None else self.diagonal[start:stop]
        part = self.filter[start:stop]
        return GradMult(part, diagonal, (len(part), *self.shape[1:]), self.degree, self.first + start)

    def to_like(self, tensor: Tensor) -> GradMult:
        """Return the same multiplier where a tensor is, and in its precision, but at least in float32."""
        device, dtype = tensor.device, torch.promote_types(tensor.dtype, torch.float32)
        diagonal = None if self.diagonal is None else self.diagonal.to(device, dtype)
        return replace(self, filter=self.filter.to(device, dtype), diagonal=diagonal)

    def tensors(self) -> list[Tensor]:
        """Return what is kept."""
        return [self.filter] if self.diagonal is None else [self.filter, self.diagonal]

    def __add__(self, other: GradMult) -> GradMult:
        if self.diagonal is None or other.diagonal is None:
            diagonal = other.diagonal if self.diagonal is None else self.diagonal
        else:
            diagonal = self.diagonal + other.diagonal
        return replace(self, filter=self.filter + other.filter, diagonal=diagonal)


@dataclass(frozen=True)
class GradMap:
    """The constant linear map P of one kernel's gradient where branches mix its entries; of degree 1 alone.

        P G = M * G + sum_r coefficients_r <G, patterns_r> patterns_r + sum_f F_f F_f^T G

    <> is over the places of every pair of channels; F F^T also mixes filters.

    Attributes:
        entries: M, the share of the branches that mix nothing; of degree 1, or None for a branch's share alone.
        patterns: (R, *k), which all filters share.
        coefficients: (O, R), not negative.
        frozen: kernels F, (O, M, *k) each: from M channels to O.
    """

    entries: GradMult
    patterns: Tensor
    coefficients: Tensor
    frozen: tuple[Tensor, ...] = ()

    @classmethod
    def of_pattern(cls, pattern: Tensor, coefficients: Tensor, shape: Shape) -> GradMap:
        """Return ``coefficients <G, pattern> pattern`` for a pattern (*k) and numbers (O,)."""
        return cls(_no_entries(coefficients, shape), pattern.unsqueeze(0), coefficients.unsqueeze(1))

    @classmethod
    def of_frozen(cls, frozen: Tensor, shape: Shape) -> GradMap:
        """Return ``F F^T`` for a kernel (O, M, *k)."""
        nothing = frozen.new_zeros(0, *shape[2:]), frozen.new_zeros(shape[0], 0)
        return cls(_no_entries(frozen, shape), *nothing, (frozen,))

    @property
    def shape(self) -> Shape:
        """Return the shape (O, I, *k) of the kernel."""
        return self.entries.shape

    @property
    def degree(self) -> int | None:
        """Return the degree of the update rule that it is for."""
        return self.entries.degree

    def __call__(self, gradient: Tensor, out: Tensor | None = None) -> Tensor:
        """Return ``P G``, (O, I, *k), as a new tensor, or in `out`, which is contiguous and of the map's type."""
        gradient = gradient.to(self.coefficients.dtype)
        if self.matrices is not None:
            flat = None if out is None else out.flatten(2)
            product = torch.bmm(gradient.flatten(2), self.matrices, out=flat).view(self.shape)
            for constants, products, entries in self.entries.on_diagonal(product, gradient):
                products.addcmul_(constants, entries)
        else:
            product = self.entries(gradient)
            if len(self.patterns):
                weights = self._on_patterns(gradient) * self.coefficients.unsqueeze(1)
                product += (weights @ self.patterns.flatten(1)).view(self.shape)
        for frozen, between in self._between(gradient):
            product += torch.tensordot(frozen, between, ([1], [0])).movedim(-1, 1)
        return product

    @functools.cached_property
    def matrices(self) -> Tensor | None:
        """Return M and the patterns as one matrix per filter, (O, k, k), where that is smaller than the kernel."""
        inputs, area = self.shape[1], math.prod(self.shape[2:])
        if inputs < area or not len(self.patterns):
            return None
        flat = self.patterns.flatten(1)
        return torch.einsum("or,ra,rb->oab", self.coefficients, flat, flat) + torch.diag_embed(
            self.entries.filter.flatten(1)
        )

    def dense(self) -> Tensor:
        """Return the diagonal of P in full, (O, I, *k): what an entry's own gradient is multiplied by."""
        diagonal = self.entries.dense()
        diagonal += torch.tensordot(self.coefficients, self.patterns.square(), 1).unsqueeze(1)
        for frozen in self.frozen:
            diagonal += frozen.square().sum(1, keepdim=True)
        return diagonal

    def _on_patterns(self, gradient: Tensor) -> Tensor:
        """Return ``<G, patterns>``, (O, I, R)."""
        return gradient.flatten(2) @ self.patterns.flatten(1).T

    def _between(self, gradient: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield every F with ``F^T G``, (M, I)."""
        for frozen in self.frozen:
            places = [0, *range(2, frozen.dim())]
            yield frozen, torch.tensordot(frozen, gradient, (places, places))

    def squares(self, gradient: Tensor, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield constants c and values v of one shape, with ``<G, P G> = sum(c * v^2)``."""
        gradient = gradient.to(dtype)
        yield from self.entries.squares(gradient, dtype)
        yield self.coefficients, torch.linalg.vector_norm(self._on_patterns(gradient), dim=1)
        for _, between in self._between(gradient):
            yield torch.ones_like(between), between

    def rows(self, start: int, stop: int) -> GradMap:
        """Return the map of the filters from `start` up to `stop`.

        Raises:
            UserError: it mixes filters.
        """
        if self.frozen:
            raise UserError(
                "a frozen convolution after a branch mixes filters, so such a kernel cannot be spread over processes: "
                "train with DDP"
            )
        return replace(self, entries=self.entries.rows(start, stop), coefficients=self.coefficients[start:stop])

    def to_like(self, tensor: Tensor) -> GradMap:
        """Return the same map where a tensor is, and in its precision, but at least in float32."""
        entries = self.entries.to_like(tensor)
        patterns, coefficients, *frozen = (value.to(entries.filter) for value in self._own())
        return GradMap(entries, patterns, coefficients, tuple(frozen))

    def tensors(self) -> list[Tensor]:
        """Return what is kept."""
        return [*self.entries.tensors(), *self._own()]

    def _own(self) -> list[Tensor]:
        return [self.patterns, self.coefficients, *self.frozen]


Multiplier = GradMult | GradMap


def add(first: Multiplier, second: Multiplier) -> Multiplier:
    """Return the sum of what two branches share."""
    if isinstance(first, GradMult):
        return first + second if isinstance(second, GradMult) else replace(second, entries=first + second.entries)
    if isinstance(second, GradMult):
        return replace(first, entries=first.entries + second)
    return GradMap(
        first.entries + second.entries,
        torch.cat([first.patterns, second.patterns]),
        torch.cat([first.coefficients, second.coefficients], 1),
        first.frozen + second.frozen,
    )


def with_degree(mult: Multiplier, degree: int) -> Multiplier:
    """Return a multiplier as that of an update rule of a degree."""
    if isinstance(mult, GradMap):
        return replace(mult, entries=replace(mult.entries, degree=degree))
    return replace(mult, degree=degree)


def _no_entries(like: Tensor, shape: Shape) -> GradMult:
    return GradMult(like.new_zeros(shape[0], 1, *shape[2:]), None, shape)


def centre_entries(whole: Tensor) -> Tensor:
    """View the (O, I) entries in the middle of a kernel (O, I, *k) of odd sizes."""
    index: tuple[Any, ...] = (..., *(k // 2 for k in whole.shape[2:]))
    return whole[index]
