"""A declaration and a mode become a module."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils.checkpoint import checkpoint
from typing_extensions import override

from repopt.csla import Block, Shape
from repopt.drawn import mark_drawn
from repopt.errors import UserError

Mode = Literal["hs", "csla", "target"]
MODES: tuple[Mode, ...] = get_args(Mode)

InitialScales = Literal["depth", "one"]


def initial_scale(layer: int, initial_scales: InitialScales) -> float:
    """Return where a hyper-search starts the scales of the convolutions in a layer (table 9 of the paper).

    Args:
        layer: l, counted from 1 behind the last layer that changes width or resolution; that layer itself is 0.
        initial_scales: "depth" for sqrt(2 / l), or "one".
    """
    return math.sqrt(2 / layer) if layer and initial_scales == "depth" else 1.0


class ParamHolder(nn.Module):
    """A tensor with a place of its own in the state dict, ``<name>.weight``: a branch's kernel or its scale."""

    weight: Tensor

    def __init__(self, values: Tensor, *, trainable: bool = True) -> None:
        super().__init__()
        if trainable:
            self.weight = nn.Parameter(values)
        else:
            self.register_buffer("weight", values)


class RepLayer(nn.Module, ABC):
    """The linear part of a declared block in one of three modes; a subclass says which linear operation it is.

    - ``hs``: every branch has its kernel, and the scales are trained (Hyper-Search).
    - ``csla``: the same with constant scales: the equivalent multi-branch network whose path a RepOptimizer follows.
    - ``target``: one plain module with the kernel that the branches add up to.

    A block is linear up to its batch norm, so hs and csla run one operation with the merged kernel, not one per branch.

    Args:
        block: the declaration. Its names become names of submodules; they may be dotted.
        mode: one of the three.
    """

    def __init__(self, block: Block, mode: Mode) -> None:
        super().__init__()
        self.block, self.mode = block, mode

    def _add_kernels(self) -> None:
        """Add what the mode has of kernels and scales, once all else is known that `plain_module` reads."""
        if self.mode == "target":
            plain = self.plain_module()
            add_submodule_by_path(self, self.block.target.name, plain)
            mark_drawn(self.values(self.block.target.name))
            return
        kernels = self.block.init_kernels({})
        initial = {branch.scale: branch.initial for branch in self.block.branches}
        for kernel, scale in self.block.names():
            add_submodule_by_path(self, kernel, ParamHolder(kernels[kernel]))
            if scale is not None:
                values = kernels[kernel].new_full(self.block.target.shape[:1], initial[scale])
                add_submodule_by_path(self, scale, ParamHolder(values, trainable=self.mode == "hs"))

    @abstractmethod
    def plain_module(self) -> nn.Module:
        """Return a new plain module, whose ``weight`` is the target kernel."""

    @abstractmethod
    def with_kernel(self, x: Tensor, kernel: Tensor) -> Tensor:
        """Return what the plain module of a given kernel makes of x."""

    @override
    def forward(self, x: Tensor) -> Tensor:
        return self.linear_part(x)

    def linear_part(self, x: Tensor) -> Tensor:
        """Return the sum of the branches' outputs."""
        if self.mode == "target":
            return self.get_submodule(self.block.target.name)(x)
        return self.with_kernel(x, self.kernel())

    def kernel(self) -> Tensor:
        """Return the kernel that the block amounts to, (O, I, *k), differentiable."""
        if self.mode == "target":
            return self.values(self.block.target.name)
        names = self.block.names()
        return self.block.merge(
            {kernel: self.values(kernel) for kernel, _ in names},
            {scale: self.values(scale) for _, scale in names if scale is not None},
        )

    def values(self, name: str) -> Tensor:
        """Return the kernel or scale of a declared name."""
        weight = self.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        return weight

    def __prepare_scriptable__(self) -> nn.Module:
        """Refuse `torch.jit.script`, which would put what it compiles into the network in this one's place."""
        raise UserError("torch.jit.script takes another network with declared blocks after repopt.deploy")


class RepLinear(RepLayer):
    """A declared linear layer without a bias, (..., I) -> (..., O); see `RepLayer`."""

    def __init__(self, block: Block, mode: Mode) -> None:
        super().__init__(block, mode)
        _check_dims(self, 0)
        self._add_kernels()

    @override
    def plain_module(self) -> nn.Linear:
        out_features, in_features = self.block.target.shape
        return nn.Linear(in_features, out_features, bias=False)

    @override
    def with_kernel(self, x: Tensor, kernel: Tensor) -> Tensor:
        return F.linear(x, kernel)


class RepConv(RepLayer):
    """A declared convolution without a bias, of as many dimensions as its kernel has; see `RepLayer`.

    Args:
        block, mode: see `RepLayer`.
        stride, dilation: of the convolution, as torch's take them; every branch is dilated alike. The padding is the
            one that keeps the size at stride 1.
    """

    dims: ClassVar[int]

    def __init__(self, block: Block, mode: Mode, stride: int = 1, dilation: int = 1) -> None:
        super().__init__(block, mode)
        _check_dims(self, self.dims)
        self.stride, self.dilation = stride, dilation
        self.padding = same_padding(block.target.shape, dilation)
        self._add_kernels()

    @override
    def plain_module(self) -> nn.Module:
        return _same_conv(self.block.target.shape, self.stride, self.block.target.groups, self.dilation, bias=False)

    @override
    def with_kernel(self, x: Tensor, kernel: Tensor) -> Tensor:
        convolve = (F.conv1d, F.conv2d, F.conv3d)[self.dims - 1]
        return convolve(x, kernel, None, self.stride, self.padding, self.dilation, self.block.target.groups)


class RepConv1d(RepConv):
    """A declared convolution, (N, C, L) -> (N, O, L'); see `RepConv`."""

    dims = 1


class RepConv3d(RepConv):
    """A declared convolution, (N, C, D, H, W) -> (N, O, D', H', W'); see `RepConv`."""

    dims = 3


class RepConv2d(RepConv):
    """A declared convolution, (N, C, H, W) -> (N, O, H', W'); see `RepConv`.

    It stands alone, or a block of a model derives from it, adds what follows the convolution (batch norm,
    non-linearity), and calls `conv2d` in its forward.
    """

    dims = 2

    def conv2d(self, x: Tensor) -> Tensor:
        """Return the sum of the branches' outputs, (N, C, H, W) -> (N, O, H', W')."""
        return self.linear_part(x)

    def folded(self, bn: nn.BatchNorm2d) -> nn.Conv2d:
        """Return the convolution with a bias that this one and a batch norm after it are in eval mode."""
        scale, shift = batch_norm_as_affine(bn)
        kernel = self.kernel() * scale.view(-1, 1, 1, 1)
        return conv2d_of(kernel, shift, self.stride, self.block.target.groups, self.dilation)


def _check_dims(layer: RepLayer, dims: int) -> None:
    shape = layer.block.target.shape
    if len(shape) != 2 + dims:
        raise UserError(f"{type(layer).__name__} takes a kernel of {2 + dims} dimensions, not {shape}")


def same_padding(shape: Shape, dilation: int) -> Shape:
    """Return the padding by which a convolution of a kernel (O, I, *k), k odd, keeps the size at stride 1."""
    return tuple(dilation * (k // 2) for k in shape[2:])


class Deployable(nn.Module, ABC):
    """A module that is another, plainer one at inference (`repopt.deploy`)."""

    @abstractmethod
    def fuse(self) -> nn.Module:
        """Return the plain module of the same function in eval mode."""


class FusedBranches(NamedTuple):
    """What a trained multi-branch block is in eval mode: its batch norms have become scales and a bias.

    Attributes:
        kernels, scales: of the branches, by name, as `Block.merge` takes them.
        bias: (O,).
    """

    kernels: Mapping[str, Tensor]
    scales: Mapping[str, Tensor]
    bias: Tensor


# The convolution (None: an identity) and batch norm (None: none) of every branch, by the names of the kernels.
BranchModules = Mapping[str, tuple[nn.Conv2d | None, nn.BatchNorm2d | None]]


def fuse_branches(block: Block, modules: BranchModules) -> FusedBranches:
    """Return a multi-branch block in eval mode: a batch norm is a scale and a shift, that of an identity its kernel."""
    like = next(
        part for pair in modules.values() for module in pair if module is not None for part in module.parameters()
    )
    ones = like.new_ones(block.target.shape[0])
    kernels, scales, bias = {}, {}, 0 * ones
    for branch in block.branches:
        conv, bn = modules[branch.kernel]
        scale, shift = (ones, 0 * ones) if bn is None else batch_norm_as_affine(bn)
        kernels[branch.kernel] = scale if conv is None else conv.weight
        if branch.scale is not None:
            scales[branch.scale] = scale
        if conv is not None and conv.bias is not None:
            shift = shift + scale * conv.bias
        bias = bias + shift
    return FusedBranches(kernels, scales, bias)


class Baseline(Deployable):
    """The block that a declared one is compared with: batch norms are in its branches, all are folded after training.

    Attributes:
        block: the declaration whose branches it has.
    """

    block: Block

    @abstractmethod
    def branches(self) -> BranchModules:
        """Return the branches' convolutions and batch norms."""

    def sum_norm(self) -> nn.BatchNorm2d | None:
        """Return the batch norm after the sum of the branches, where there is one."""
        return None

    @abstractmethod
    def as_target(self) -> tuple[RepConv2d, nn.BatchNorm2d]:
        """Return the declared block in target mode, and its batch norm, both fresh, with all else that this one has."""

    def merged(self, stride: int = 1) -> nn.Conv2d:
        """Return the convolution with a bias that the block is in eval mode, up to its non-linearity."""
        kernels, scales, bias = fuse_branches(self.block, self.branches())
        kernel = self.block.merge(kernels, scales)
        if (norm := self.sum_norm()) is not None:
            scale, shift = batch_norm_as_affine(norm)
            kernel, bias = kernel * scale.view(-1, 1, 1, 1), scale * bias + shift
        return conv2d_of(kernel, bias, stride, self.block.target.groups)


class ModuleWrapper(nn.Module):
    """A module that runs another one in a form of its own, with the very parameters of that one.

    The rules and optimizers look through it: names are those within.

    Args:
        wrapped_module: the other; no submodule of this one.
    """

    def __init__(self, wrapped_module: nn.Module) -> None:
        super().__init__()
        self._wrapped_module = (wrapped_module,)

    @property
    def wrapped_module(self) -> nn.Module:
        """Return the other one."""
        return self._wrapped_module[0]


def batch_norm_as_affine(bn: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Return the scale and shift, (C,) each, that a batch norm in eval mode applies."""
    assert bn.running_mean is not None and bn.running_var is not None, "a batch norm without statistics"
    scale = bn.weight * torch.rsqrt(bn.running_var + bn.eps)
    return scale, bn.bias - bn.running_mean * scale


def fold_batch_norm(module: nn.Module, conv: str, bn: str) -> None:
    """Fold a batch norm of `module` into the convolution before it, both by name; an identity takes its place."""
    convolution, norm = module.get_submodule(conv), module.get_submodule(bn)
    if isinstance(norm, nn.Identity):
        return  # it is folded
    assert isinstance(convolution, nn.Conv2d) and isinstance(norm, nn.modules.batchnorm._BatchNorm)
    setattr(module, conv, fuse_conv_bn_eval(convolution, norm))
    setattr(module, bn, nn.Identity())


def conv2d_of(kernel: Tensor, bias: Tensor, stride: int = 1, groups: int = 1, dilation: int = 1) -> nn.Conv2d:
    """Return a convolution with a given kernel (O, I, kh, kw) and bias (O,), padded to keep the size at stride 1."""
    conv = _same_conv(kernel.shape, stride, groups, dilation, device="meta")
    assert isinstance(conv, nn.Conv2d)
    conv.weight, conv.bias = nn.Parameter(kernel), nn.Parameter(bias)
    return conv


def _same_conv(shape: Shape, stride: int, groups: int, dilation: int, **settings: Any) -> nn.Module:
    """Return a convolution whose kernel is (O, I, *k), padded to keep the size at stride 1."""
    out_channels, per_group, *size = shape
    conv: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(size) - 1]
    padding = same_padding(shape, dilation)
    return conv(per_group * groups, out_channels, tuple(size), stride, padding, dilation, groups, **settings)


def checkpoint_forward(module: nn.Module, x: Tensor, *, checkpointed: bool) -> Tensor:
    """Return ``module(x)``; if checkpointed, the backward pass computes its activations again instead of keeping them.

    The second run leaves the statistics of batch norms alone, so that training is the same as without.
    """
    if not (checkpointed and module.training):
        return module(x)
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]  # SyncBatchNorm too

    @contextmanager
    def frozen_bn_stats() -> Iterator[None]:
        kept = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
        for norm in norms:
            norm.momentum, norm.num_batches_tracked = 0.0, None
        try:
            yield
        finally:
            for norm, (momentum, count) in zip(norms, kept, strict=True):
                norm.momentum, norm.num_batches_tracked = momentum, count

    return checkpoint(module, x, use_reentrant=False, context_fn=lambda: (nullcontext(), frozen_bn_stats()))


def add_submodule_by_path(root: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` under `root` at a dotted name, with empty modules on the way where there are none.

    Raises:
        UserError: something else has the name.
    """
    *path, leaf = name.split(".")
    for part in path:
        if part not in dict(root.named_children()):
            _add_module(root, part, nn.Module(), name)
        root = root.get_submodule(part)
    _add_module(root, leaf, module, name)


def _add_module(root: nn.Module, part: str, module: nn.Module, name: str) -> None:
    if hasattr(root, part):
        raise UserError(f"{name!r} is no name for a kernel or scale: {part!r} is an attribute of {type(root).__name__}")
    root.add_module(part, module)
