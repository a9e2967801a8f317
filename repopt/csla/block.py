"""The declaration of a block, and the algebra that follows from it."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from typing_extensions import override

from repopt.csla.branch import Branch, PlacedBranch, Target, per_filter, scaled
from repopt.csla.mult import GradMult, Multiplier, Shape, add, with_degree
from repopt.errors import UserError, one_line, unknown


@dataclass(frozen=True)
class Block:
    """The declaration of a multi-branch linear block, from which everything else is derived.

    Attributes:
        target: the plain kernel that the branches add up to.
        branches: what is added up.

    Raises:
        UserError: no branches, or two of the same name; a branch does not fit the target kernel, or it is not the
            linear map that it says (see `Branch`): then the method does not apply.
    """

    target: Target
    branches: tuple[Branch, ...]
    _whole: set[str] = field(init=False, repr=False, compare=False)  # kernels that A leaves as they are

    def __post_init__(self) -> None:
        names = [name for b in self.branches for name in (b.kernel, b.scale) if name is not None]
        if not names or len(set(names)) < len(names):
            raise UserError(f"a block needs branches whose kernels and scales have names of their own, not {names}")
        whole = {branch.kernel for branch in self.branches if _check_map(branch, self.target)}
        object.__setattr__(self, "_whole", whole)

    def names(self) -> list[tuple[str, str | None]]:
        """Return the names of every kernel and of its scale, None where that is the constant 1."""
        return [(branch.kernel, branch.scale) for branch in self.branches]

    def undecayed(self, *, searched: bool) -> set[str]:
        """Return the names of the kernels that are not decayed, in a hyper-search or else."""
        return {b.kernel for b in self.branches if searched and b.scale is None and not b.decay_in_search}

    def whole_branch(self) -> Branch | None:
        """Return the first branch with a scale whose kernel is of the target's shape and left as it is, if any."""
        return next((b for b in self.branches if b.scale is not None and b.kernel in self._whole), None)

    def init_kernels(self, searched: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return one new kernel per branch, by name, as the framework draws them by default, in the order declared.

        Args:
            searched: values (O,) of identity kernels, by name; those not given start at their declared value.
        """
        return {
            b.kernel: b.init_kernel(self.target, None if b.scale else searched.get(b.kernel)) for b in self.branches
        }

    def merge(self, kernels: Mapping[str, Tensor], scales: Mapping[str, Tensor]) -> Tensor:
        """Return ``sum_k s_k A_k(w_k)`` (Rule of Initialization), (O, I, *k); it can be differentiated once.

        Args:
            kernels: w_k by name.
            scales: s_k by name, (O,) each; other entries are ignored.
        """
        tensors: list[Tensor | None] = [kernels[branch.kernel] for branch in self.branches]
        tensors += [None if branch.scale is None else scales[branch.scale] for branch in self.branches]
        if torch.compiler.is_compiling():  # a compiler makes one loop of the sum
            return functools.reduce(torch.add, (self._term(*found) for found in _branches_with_params(self, tensors)))
        return _Merge.apply(self, *tensors)

    def _term(self, branch: Branch, kernel: Tensor, scale: Tensor | None) -> Tensor:
        return scaled(kernel, scale) if branch.kernel in self._whole else branch.term(kernel, scale, self.target)

    def branch_gradients(
        self, gradient: Tensor, kernels: Mapping[str, Tensor], scales: Mapping[str, Tensor], *, with_scales: bool = True
    ) -> dict[str, Tensor]:
        """Return the gradients of kernels and scales, by name, from that of the plain kernel (the chain rule).

            dL/dw_k = A_k^T(s_k G)        dL/ds_k = <A_k(w_k), G> per output channel

        Args:
            gradient: G, (O, I, *k), of ``merge(kernels, scales)``.
            kernels, scales: as `merge` takes them.
            with_scales: whether those of the scales are wanted.
        """
        found: dict[str, Tensor] = {}
        for branch in self.branches:
            scale = None if branch.scale is None else scales[branch.scale]
            of_kernel, of_scale = branch.gradients(
                gradient, kernels[branch.kernel], scale, self.target, with_scale=with_scales
            )
            found[branch.kernel] = of_kernel
            if branch.scale is not None and of_scale is not None:
                found[branch.scale] = of_scale
        return found

    def follows_constants(self, degree: int) -> bool:
        """Return whether the block has a multiplier under rules of a degree; else an optimizer has to hold it."""
        ones = torch.ones(self.target.shape[0], device="cpu")
        try:
            self.grad_mult({branch.searched_name: ones for branch in self.branches}, degree)
        except UserError:
            return False
        return True

    def grad_mult(self, scales: Mapping[str, Tensor], degree: int) -> Multiplier:
        """Return the gradient's multiplier (Rule of Iteration): ``sum_k |s_k|^(1+d) A_k(1)``, or P where entries mix.

        The paper's SGD (degree 1) has the square of the scale, its AdamW (degree 0) the scale. The absolute value
        matters for the latter: a negative scale flips a branch's gradient, and the update flips back on its way into
        the merged kernel.

        Args:
            scales: by name, (O,) each; those of the branches that have one are used.
            degree: the update rule's degree of homogeneity d.

        Raises:
            UserError: a branch that no constants follow under rules of this degree.
        """
        one = next(iter(scales.values())).new_ones(self.target.shape[0])
        constants = [one if b.scale is None else scales[b.scale] for b in self.branches]
        pairs = zip(self.branches, constants, strict=True)
        terms = (branch.grad_mult(constant, self.target, degree) for branch, constant in pairs)
        return with_degree(functools.reduce(add, terms), degree)


@dataclass(frozen=True, eq=False)
class FunctionBlock(Block):
    """A block whose target kernel is any differentiable function of kernels, ``W = f(theta)``: convolutions in a row.

    An optimizer that holds theta follows it exactly, under any rule: the chain rule gives its gradients from that of W
    alone. No constants do, so it takes part in no search and in no scale file: what would be a scale is one of theta.

    Args:
        target: the plain kernel.
        function: theta by name -> W, of the target's shape; nothing but torch's differentiable operations on theta.
        shapes: of theta, by name.
        initial: where entries of theta start that are filled with one number; the others are drawn as the kernels of
            convolutions are.

    Raises:
        UserError: W of another shape, or an initial number for none of theta.
    """

    branches: tuple[Branch, ...] = field(init=False, default=())
    function: Callable[[Mapping[str, Tensor]], Tensor] = field(kw_only=True)
    shapes: Mapping[str, Shape] = field(kw_only=True)
    initial: Mapping[str, float] = field(kw_only=True, default_factory=dict)

    @override
    def __post_init__(self) -> None:
        object.__setattr__(self, "_whole", set())
        for name in self.initial:
            if name not in self.shapes:
                raise unknown("kernel of a function", name, self.shapes)
        merged = self.function({name: torch.empty(shape, device="meta") for name, shape in self.shapes.items()})
        if tuple(merged.shape) != self.target.shape:
            raise UserError(f"the function of a block returns {tuple(merged.shape)}, not {self.target.shape}")

    @override
    def names(self) -> list[tuple[str, str | None]]:
        return [(name, None) for name in self.shapes]

    @override
    def undecayed(self, *, searched: bool) -> set[str]:
        return {name for name, shape in self.shapes.items() if len(shape) < 2}  # what scales is not decayed

    @override
    def init_kernels(self, searched: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: self._drawn(name, torch.empty(shape)) for name, shape in self.shapes.items()}

    def _drawn(self, name: str, values: Tensor) -> Tensor:
        if name in self.initial:
            return values.fill_(self.initial[name])
        return nn.init.kaiming_uniform_(values, a=math.sqrt(5))

    @override
    def merge(self, kernels: Mapping[str, Tensor], scales: Mapping[str, Tensor]) -> Tensor:
        return self.function(kernels)

    @override
    def branch_gradients(
        self, gradient: Tensor, kernels: Mapping[str, Tensor], scales: Mapping[str, Tensor], *, with_scales: bool = True
    ) -> dict[str, Tensor]:
        pull_back = torch.func.vjp(self.function, {name: kernels[name].detach() for name in self.shapes})[1]
        found: dict[str, Tensor] = pull_back(gradient)[0]
        return found

    @override
    def grad_mult(self, scales: Mapping[str, Tensor], degree: int) -> Multiplier:
        raise UserError(
            f"no constants follow a block that is a function of {', '.join(self.shapes)}, the gradient of one of which "
            "has the others as factors: let the optimizer hold them (repopt.hold_branches)"
        )


class _Merge(torch.autograd.Function):
    """`Block.merge` of the kernels of the branches and then their scales (None = 1).

    Kernels that are placed are added where they belong, and their gradients read from there; no A(w) is made of them,
    neither here nor in the backward pass, so a hyper-search costs little more than the training of a plain network.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(block: Block, *tensors: Tensor | None) -> Tensor:
        whole: Tensor | None = None
        for branch, kernel, scale in _branches_with_params(block, tensors):
            if whole is None and scale is not None and branch.kernel in block._whole:
                whole = scaled(kernel, scale)
                continue
            whole = kernel.new_zeros(block.target.shape) if whole is None else whole
            if isinstance(branch, PlacedBranch):
                entries = branch.scatter_view(whole, block.target)
                entries.add_(scaled(kernel, scale).reshape(entries.shape))
            else:
                whole.add_(branch.term(kernel, scale, block.target))
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


@functools.cache
def _check_map(branch: Branch, target: Target) -> bool:
    """Refuse a branch that is not a constant linear map with the adjoint and the multipliers that it says.

    Returns:
        Whether the map leaves every kernel as it is.
    """
    branch.kernel_shape(target)
    few, probe = branch.few_channels(target)
    generator = torch.Generator("cpu").manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64, device="cpu")

    def refuse_unless(found: Tensor, expected: Tensor, what: str) -> None:
        if found.shape != expected.shape or not torch.allclose(found, expected, rtol=1e-9, atol=1e-9):
            raise UserError(f"branch {branch.kernel!r} cannot be re-parameterized into the optimizer: {what}")

    shape = few.kernel_shape(probe)
    first, second, gradient, scale = draw(*shape), draw(*shape), draw(*probe.shape), draw(probe.shape[0])
    try:
        whole = few.embed(first, probe)
        both = few.embed(first + 2 * second, probe)
        back = few.adjoint(gradient, probe).reshape(shape)
        scales = per_filter(scale, gradient.dim())
        again = few.embed(few.adjoint(gradient * scales, probe).reshape(shape), probe)
    except RuntimeError as error:
        raise UserError(f"branch {branch.kernel!r} does not take a kernel of {shape}: {one_line(error)}") from error
    not_linear = "it must do a constant linear map to its kernel, and return the target's shape"
    refuse_unless(both, whole + 2 * few.embed(second, probe), not_linear)
    refuse_unless(torch.zeros_like(whole), torch.zeros_like(gradient), not_linear)  # the shape
    refuse_unless((whole * gradient).sum(), (first * back).sum(), "its adjoint is not that of its map")
    mult = few.grad_mult(scale, probe, 1)
    after_adjoint = "its grad_mult of degree 1 is not its map after its adjoint, with the scale's square"
    refuse_unless(mult(gradient), scales * again, after_adjoint)
    if isinstance(mult, GradMult):
        refuse_unless(
            few.grad_mult(scale, probe, 0).dense().square(),
            mult.dense(),
            "its grad_mult of degree 0 is not the root of that of degree 1, as where entries are placed one by one",
        )
    return branch.kernel_shape(target) == target.shape and shape == whole.shape and torch.equal(whole, first)
