"""What the declarations share: branches of timm's modules, and sums of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from torch import Tensor, nn
from typing_extensions import override

from repopt.convert.declaration import Declaration, register_block
from repopt.csla import Block, ConvBranch, IdentityBranch, Target
from repopt.errors import UserError
from repopt.layers import FusedBranches, batch_norm_as_affine

FUSED = "its branches are fused already"
IDENTITY = IdentityBranch("scale_identity")


class Conv(NamedTuple):
    """A branch's declaration and the modules that it stands for."""

    branch: ConvBranch
    conv: nn.Conv2d
    bn: nn.BatchNorm2d | None


def conv(kernel: str, scale: str, module: nn.Module) -> Conv:
    """Return the branch that a convolution is, or a module of a convolution and a batch norm.

    Raises:
        UserError: there is something else in it, or it is no convolution that keeps the size at stride 1.
    """
    parts = [part for part in module.children() if not isinstance(part, nn.Identity)] or [module]
    first, bn = parts[0], parts[1] if len(parts) > 1 else None
    # timm's batch norms hold the non-linearity and the DropBlock that may follow.
    followed = bn is not None and any(not isinstance(child, nn.Identity) for child in bn.children())
    if type(first) is not nn.Conv2d or not isinstance(bn, nn.BatchNorm2d | None) or followed or len(parts) > 2:
        raise UserError(f"its branch {kernel!r} is not a convolution and a batch norm, and nothing else")
    if any(p != d * (k - 1) / 2 for k, d, p in zip(first.kernel_size, first.dilation, first.padding, strict=True)):
        raise UserError(
            f"its branch {kernel!r} does not keep the size: kernel {first.kernel_size}, padding {first.padding}"
        )
    return Conv(ConvBranch(kernel, scale, size=first.kernel_size), first, bn)


def convs_and_1x1(convs: Iterable[nn.Module], small: nn.Module | None) -> list[Conv]:
    """Return MobileOne's branches: some of the whole size, and a 1x1 convolution where there is one."""
    found = [conv(f"conv_{i}", f"scale_conv_{i}", module) for i, module in enumerate(convs)]
    return found if small is None else [*found, conv("conv_1x1", "scale_1x1", small)]


def declaration(
    convs: Sequence[Conv],
    identity: IdentityBranch | None = None,
    *,
    target: str = "conv",
    before: nn.Module | None = None,
    after: nn.Module | None = None,
    fuse: Callable[[Any], FusedBranches] | None = None,
) -> Declaration:
    """Return a declaration whose target has the shape of the first convolution; the others must fit it."""
    first_branch, first, _ = convs[0]
    branches: list[ConvBranch | IdentityBranch] = []
    for branch, module, _ in convs:
        if (module.stride, module.groups) != (first.stride, first.groups):
            raise UserError(f"its branches {branch.kernel!r} and {first_branch.kernel!r} differ in stride or groups")
        # n equal branches of the scale 1 / sqrt(n) start as one of the scale 1, and under SGD step as one.
        equal = sum(other.weight.shape == module.weight.shape for _, other, _ in convs)
        branches.append(replace(branch, initial=1 / math.sqrt(equal)))
    bn = next((bn for *_, bn in convs if bn is not None), nn.BatchNorm2d(1))
    return Declaration(
        Block(
            Target(target, tuple(first.weight.shape), first.groups),
            (*branches, identity) if identity else tuple(branches),
        ),
        stride=first.stride[0],
        dilation=first.dilation[0],
        before=before or nn.Identity(),
        bn=nn.BatchNorm2d(first.out_channels, bn.eps, bn.momentum),
        after=after or nn.Identity(),
        fuse=fuse,
    )


def fuse_residual(convs: Sequence[Conv], gate: Tensor, scale: Tensor, shift: Tensor) -> FusedBranches:
    """Return what ``x + gate * (sum of the convolutions + scale * x + shift)`` is in eval mode; (C,) each."""
    kernels, scales = {IDENTITY.kernel: 1 + gate * scale}, {}
    for branch, module, bn in convs:
        assert bn is not None
        factor, more = batch_norm_as_affine(bn)
        kernels[branch.kernel], scales[branch.scale] = module.weight, gate * factor
        shift = shift + more
    return FusedBranches(kernels, scales, gate * shift)


def check_no_drop_path(module: nn.Module) -> None:
    """Refuse branches that vanish at random."""
    if not isinstance(module, nn.Identity):
        raise UserError("drop_path drops branches at random: create the model with drop_path_rate=0")


class SumOfBranches(nn.Module):
    """A sum that timm computes in the forward of a larger module, as a module, (N, C, H, W) -> (N, O, H', W').

    Args:
        convs: convolutions with their batch norms, by the names of the kernels.
        identity: a batch norm, or `nn.Identity`; None = there is none.
        after: what follows the sum.
    """

    def __init__(
        self, convs: Mapping[str, nn.Module], identity: nn.Module | None = None, after: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.convs, self.identity, self.after = nn.ModuleDict(convs), identity, after or nn.Identity()

    @override
    def forward(self, x: Tensor) -> Tensor:
        parts = [*self.convs.values()] + ([] if self.identity is None else [self.identity])
        return self.after(sum(part(x) for part in parts))


@register_block(SumOfBranches)
def _sum(module: SumOfBranches) -> Declaration:
    convs = [conv(name, f"scale_{name}", branch) for name, branch in module.convs.items()]
    return declaration(convs, None if module.identity is None else IDENTITY, after=module.after)
