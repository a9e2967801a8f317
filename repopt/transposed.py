"""A declared transposed convolution: the same kernels, read the other way round."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from repopt.csla import Block
from repopt.errors import UserError
from repopt.layers import Deployable, Mode, ParamHolder, RepLayer, same_padding


class RepConvTranspose(RepLayer, Deployable):
    """A declared transposed convolution without a bias, in one to three dimensions; see `RepLayer`.

    Its kernel is kept as (O, I, *k), as that of a convolution, so that a filter's scale has its place; `fuse` has it in
    the order of `torch.nn.ConvTranspose2d`.

    Args:
        block, mode: see `RepLayer`.
        stride, output_padding: of the transposed convolution, as torch's take them. The padding is half the kernel.
    """

    def __init__(self, block: Block, mode: Mode, stride: int = 1, output_padding: int = 0) -> None:
        super().__init__(block, mode)
        if len(block.target.shape) not in (3, 4, 5):
            raise UserError(f"RepConvTranspose takes a kernel of 3 to 5 dimensions, not {block.target.shape}")
        self.stride, self.output_padding = stride, output_padding
        self._add_kernels()

    @override
    def plain_module(self) -> nn.Module:
        return ParamHolder(nn.init.kaiming_uniform_(torch.empty(self.block.target.shape), a=math.sqrt(5)))

    @override
    def linear_part(self, x: Tensor) -> Tensor:
        return self.with_kernel(x, self.kernel())

    @override
    def with_kernel(self, x: Tensor, kernel: Tensor) -> Tensor:
        transpose = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[kernel.dim() - 3]
        groups = self.block.target.groups
        padding = same_padding(tuple(kernel.shape), 1)
        return transpose(x, _in_torch_order(kernel, groups), None, self.stride, padding, self.output_padding, groups)

    @override
    def fuse(self) -> nn.Module:
        out_channels, per_group, *size = shape = self.block.target.shape
        groups = self.block.target.groups
        plain: Any = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[len(size) - 1]
        settings: dict[str, Any] = {"output_padding": self.output_padding, "groups": groups, "bias": False}
        conv = plain(
            per_group * groups,
            out_channels,
            tuple(size),
            self.stride,
            same_padding(shape, 1),
            device="meta",
            **settings,
        )
        conv.weight = nn.Parameter(_in_torch_order(self.kernel(), groups).contiguous())
        return conv


def _in_torch_order(kernel: Tensor, groups: int) -> Tensor:
    """View a kernel (O, I, *k) as torch's transposed convolutions have it, (I * groups, O / groups, *k)."""
    return kernel.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
