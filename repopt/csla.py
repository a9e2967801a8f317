"""The algebra of Constant-Scale Linear Addition: tensors in, tensors out.

A CSLA block computes ``y = sum_k s_k * (E_k(w_k) conv x)``: branch k has a kernel ``w_k``, a constant scale ``s_k``
per output channel, and an embedding ``E_k`` that places the kernel in the target kernel's shape. From one declaration,
a `Block`, follow the two rules of the paper (arXiv 2205.15242, section 3.1 and appendix A):

    W0 = sum_k  s_k         * E_k(w_k)      Rule of Initialization   `Block.merge`
    M  = sum_k |s_k|^(1+d)  * E_k(1)        Rule of Iteration        `Block.grad_mult`

where d is the update rule's degree of homogeneity, ``update(c g) = sign(c) |c|^d update(g)``: 1 for SGD, 0 for Adam.

Kernels have the shape (O, I, *k): O output channels, I input channels per group, and any number of spatial dimensions,
none of them for a linear layer.
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from typing_extensions import override

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
                _centre_entries(kernel)[rows, column:].unflatten(0, shape).diagonal(dim1=1, dim2=2)
                for kernel in kernels
            )
            yield self.diagonal[rows].view(shape), *views
            start = rows.stop

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
class Target:
    """The plain kernel that a block becomes: its name in target mode, its shape (O, I, *k), and its groups."""

    name: str
    shape: Shape
    groups: int = 1


@dataclass(frozen=True)
class Branch(ABC):
    """One term ``s * (E(w) conv x)`` of a block; a subclass is an embedding E.

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

    @abstractmethod
    def init_kernel(self, target: Target, searched: Tensor | None) -> Tensor:
        """Return a kernel w to start training from; `searched` are its values in a scale file that has them."""

    @abstractmethod
    def scatter_view(self, whole: Tensor, target: Target) -> Tensor:
        """View the entries of a kernel of the target's shape to which E copies those of w, in the order of w's.

        It is the adjoint of E, too: of a gradient it is the branch's share.
        """

    def embed(self, kernel: Tensor, target: Target) -> Tensor:
        """Return E(w), of the target's shape: every entry of w copied to one place of its own, zeros elsewhere."""
        whole = kernel.new_zeros(target.shape)
        entries = self.scatter_view(whole, target)
        entries.copy_(kernel.reshape(entries.shape))
        return whole

    @abstractmethod
    def grad_mult(self, constant: Tensor, target: Target) -> GradMult:
        """Return ``constant * E(1)`` for one constant per output channel, (O,)."""


@dataclass(frozen=True)
class ConvBranch(Branch):
    """A convolution of its own size, placed at the centre of the target kernel (a 1x1 in the middle of a 3x3)."""

    scale: str
    size: int | Shape = 1

    @override
    def kernel_shape(self, target: Target) -> Shape:
        whole = target.shape[2:]
        size = (self.size,) * len(whole) if isinstance(self.size, int) else self.size
        if len(size) != len(whole) or any(s > w or (w - s) % 2 for s, w in zip(size, whole, strict=True)):
            raise UserError(
                f"a branch of size {size} ({self.kernel}) has no place at the centre of a kernel of {whole}"
            )
        return (*target.shape[:2], *size)

    @override
    def init_kernel(self, target: Target, searched: Tensor | None) -> Tensor:
        assert searched is None, "the kernel of a convolution is not searched"
        # nn.Conv2d's default, for any number of dimensions.
        return nn.init.kaiming_uniform_(torch.empty(self.kernel_shape(target)), a=math.sqrt(5))

    @override
    def scatter_view(self, whole: Tensor, target: Target) -> Tensor:
        return _centre_of(whole, self.kernel_shape(target)[2:])

    @override
    def grad_mult(self, constant: Tensor, target: Target) -> GradMult:
        per_filter = constant.new_zeros(target.shape[0], 1, *target.shape[2:])
        centre = _centre_of(per_filter, self.kernel_shape(target)[2:])
        centre.copy_(_per_filter(constant, centre).expand_as(centre))
        return GradMult(per_filter, None, target.shape)


@dataclass(frozen=True)
class IdentityBranch(Branch):
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
        centre = _centre_entries(whole)
        return centre.unflatten(0, (target.groups, target.shape[1])).diagonal(dim1=1, dim2=2)  # (groups, I)

    @override
    def grad_mult(self, constant: Tensor, target: Target) -> GradMult:
        out_channels, per_group, *size = target.shape
        if per_group == 1:  # depthwise: every filter has one input channel, so the diagonal is all of the centre
            return GradMult(self.embed(constant, target), None, target.shape)
        return GradMult(constant.new_zeros(out_channels, 1, *size), constant, target.shape)


@dataclass(frozen=True)
class Block:
    """The declaration of a multi-branch linear block, from which everything else is derived.

    Attributes:
        target: the plain kernel that the branches add up to.
        branches: what is added up.

    Raises:
        UserError: no branches, or two of the same name; a branch does not fit the target kernel, or its embedding is
            none (see `Branch.embed`): then the method does not apply.
    """

    target: Target
    branches: tuple[Branch, ...]
    _whole: set[str] = field(init=False, repr=False, compare=False)  # kernels that are their own embedding

    def __post_init__(self) -> None:
        names = [name for b in self.branches for name in (b.kernel, b.scale) if name is not None]
        if not names or len(set(names)) < len(names):
            raise UserError(f"a block needs branches whose kernels and scales have names of their own, not {names}")
        whole = {branch.kernel for branch in self.branches if _check_embedding(branch, self.target)}
        object.__setattr__(self, "_whole", whole)

    def init_kernels(self, searched: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return one new kernel per branch, by name, as the framework draws them by default, in the order declared.

        Args:
            searched: values (O,) of identity kernels, by name; those not given start at their declared value.
        """
        return {
            b.kernel: b.init_kernel(self.target, None if b.scale else searched.get(b.kernel)) for b in self.branches
        }

    def merge(self, kernels: Mapping[str, Tensor], scales: Mapping[str, Tensor]) -> Tensor:
        """Return ``sum_k s_k E_k(w_k)`` (Rule of Initialization), (O, I, *k); it can be differentiated once.

        Args:
            kernels: w_k by name.
            scales: s_k by name, (O,) each; other entries are ignored.
        """
        tensors: list[Tensor | None] = [kernels[branch.kernel] for branch in self.branches]
        tensors += [None if branch.scale is None else scales[branch.scale] for branch in self.branches]
        if torch.compiler.is_compiling():  # a compiler makes one loop of the sum
            scaled = ((b, _scaled(kernel, scale)) for b, kernel, scale in _branches_with_params(self, tensors))
            wholes = (kernel if b.kernel in self._whole else b.embed(kernel, self.target) for b, kernel in scaled)
            return functools.reduce(torch.add, wholes)
        return _Merge.apply(self, *tensors)

    def branch_gradients(
        self, gradient: Tensor, kernels: Mapping[str, Tensor], scales: Mapping[str, Tensor], *, with_scales: bool = True
    ) -> dict[str, Tensor]:
        """Return the gradients of kernels and scales, by name, from that of the plain kernel (the chain rule).

            dL/dw_k = s_k A_k^T G        dL/ds_k = <A_k w_k, G> per output channel

        Args:
            gradient: G, (O, I, *k), of ``merge(kernels, scales)``.
            kernels, scales: as `merge` takes them.
            with_scales: whether those of the scales are wanted.
        """
        found: dict[str, Tensor] = {}
        for branch in self.branches:
            kernel = kernels[branch.kernel]
            share = branch.scatter_view(gradient, self.target).reshape(kernel.shape)
            if branch.scale is None:
                found[branch.kernel] = share.clone()
                continue
            found[branch.kernel] = _scaled(share, scales[branch.scale])
            if with_scales:
                found[branch.scale] = torch.linalg.vecdot(*(t.reshape(len(kernel), -1) for t in (share, kernel)))
        return found

    def grad_mult(self, scales: Mapping[str, Tensor], degree: int) -> GradMult:
        """Return the gradient's multiplier ``sum_k |s_k|^(1+d) E_k(1)`` (Rule of Iteration).

        The paper's SGD (degree 1) has the square of the scale, its AdamW (degree 0) the scale. The absolute value
        matters for the latter: a negative scale flips a branch's gradient, and the update flips back on its way into
        the merged kernel.

        Args:
            scales: by name, (O,) each; those of the branches that have one are used.
            degree: the update rule's degree of homogeneity d.
        """
        one = next(iter(scales.values())).new_ones(self.target.shape[0])
        constants = [one if b.scale is None else scales[b.scale].abs() ** (1 + degree) for b in self.branches]
        terms = [b.grad_mult(constant, self.target) for b, constant in zip(self.branches, constants, strict=True)]
        return replace(functools.reduce(GradMult.__add__, terms), degree=degree)


class _Merge(torch.autograd.Function):
    """`Block.merge` of the kernels of the branches and then their scales (None = 1).

    Branches are added where they belong, and their gradients read from there; no embedding is made, neither here nor in
    the backward pass, so that a hyper-search costs little more than the training of a plain network.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(block: Block, *tensors: Tensor | None) -> Tensor:
        target = block.target
        whole: Tensor | None = None
        for branch, kernel, scale in _branches_with_params(block, tensors):
            scaled = _scaled(kernel, scale)
            if whole is None and scale is not None and branch.kernel in block._whole:
                whole = scaled
                continue
            whole = kernel.new_zeros(target.shape) if whole is None else whole
            entries = branch.scatter_view(whole, target)
            entries.add_(scaled.reshape(entries.shape))
        assert whole is not None, "a block has branches"
        return whole

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        block, *tensors = inputs
        ctx.block = block
        ctx.save_for_backward(*tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        branches, needed = ctx.block.branches, ctx.needs_input_grad[1:]
        kernels: dict[str, Tensor] = {}
        scales: dict[str, Tensor] = {}
        for branch, kernel, scale in _branches_with_params(ctx.block, ctx.saved_tensors):
            kernels[branch.kernel] = kernel
            if branch.scale is not None and scale is not None:
                scales[branch.scale] = scale
        found = ctx.block.branch_gradients(gradient, kernels, scales, with_scales=any(needed[len(branches) :]))
        names = [*(branch.kernel for branch in branches), *(branch.scale or "" for branch in branches)]
        return None, *(found[name] if wanted else None for name, wanted in zip(names, needed, strict=True))


def _branches_with_params(block: Block, tensors: Sequence[Any]) -> Iterator[tuple[Branch, Tensor, Tensor | None]]:
    """Yield every branch with its kernel and its scale, of all kernels and then all scales."""
    count = len(block.branches)
    return zip(block.branches, tensors[:count], tensors[count:], strict=True)


def _scaled(kernel: Tensor, scale: Tensor | None) -> Tensor:
    return kernel if scale is None else kernel * _per_filter(scale, kernel)


def _per_filter(values: Tensor, kernel: Tensor) -> Tensor:
    """View (O,) in a shape that multiplies a kernel (O, ...) by filter."""
    return values.view(-1, *[1] * (kernel.dim() - 1))


def _centre_of(whole: Tensor, size: Shape) -> Tensor:
    """View a spatial size in the middle of a kernel (O, I, *k)."""
    margins = [(k - s) // 2 for k, s in zip(whole.shape[2:], size, strict=True)]
    index: tuple[Any, ...] = (..., *(slice(m, m + s) for m, s in zip(margins, size, strict=True)))
    return whole[index]


def _centre_entries(whole: Tensor) -> Tensor:
    """View the (O, I) entries in the middle of a kernel (O, I, *k) of odd sizes."""
    index: tuple[Any, ...] = (..., *(k // 2 for k in whole.shape[2:]))
    return whole[index]


@functools.cache
def _check_embedding(branch: Branch, target: Target) -> bool:
    """Refuse a branch whose embedding does not copy every entry of its kernel to one place of its own.

    Returns:
        Whether every kernel is its own embedding.
    """
    branch.kernel_shape(target)
    # An embedding treats all channels and groups alike, so a few of them tell.
    out_channels, per_group, *size = target.shape
    groups, few = min(target.groups, 2), min(per_group, 3)
    square = out_channels == per_group * target.groups
    few_out = groups * few if square else groups * (few + 1)
    probe = Target(target.name, (few_out, few, *size), groups)
    shape = branch.kernel_shape(probe)
    labels = torch.arange(1.0, math.prod(shape) + 1, dtype=torch.float64, device="cpu")
    try:
        placed = branch.embed(labels.view(shape), probe)
    except RuntimeError:  # a view of another size, or one whose entries share places
        placed = torch.empty(0)
    if not torch.equal(placed[placed != 0].sort().values, labels):
        raise UserError(
            f"branch {branch.kernel!r} cannot be re-parameterized into the optimizer: its embedding must copy every "
            "entry of its kernel to one place of its own (an average pooling, or a 1x1 followed by a 3x3, does not)"
        )
    constant = torch.arange(1.0, few_out + 1, dtype=torch.float64, device="cpu")
    ones = constant.new_ones(shape) * constant.view(-1, *[1] * (len(shape) - 1))
    if not torch.equal(branch.grad_mult(constant, probe).dense(), branch.embed(ones, probe)):
        raise UserError(f"branch {branch.kernel!r}: its grad_mult is not its embedding of ones")
    return branch.kernel_shape(target) == target.shape and torch.equal(placed, labels.view_as(placed))
