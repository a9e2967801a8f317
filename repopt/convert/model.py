"""A network of registered blocks becomes one of declared blocks."""

from __future__ import annotations

import copy
from dataclasses import replace

from torch import Tensor, nn

from repopt.convert.registry import Declaration, declare_of, registered_types
from repopt.csla import Block
from repopt.errors import UserError, unknown
from repopt.layers import MODES, Deployable, Mode, RepConv2d, initial_scale


class ConvertedBlock(RepConv2d, Deployable):
    """A declared module, (N, C, H, W) -> (N, O, H', W'): ``after(bn(conv2d(before(x))))``.

    Raises:
        UserError: a kernel or scale has the name of one of the other parts.
    """

    def __init__(self, declaration: Declaration, mode: Mode) -> None:
        super().__init__(declaration.block, mode, declaration.stride, declaration.dilation)
        parts = {"before": declaration.before, "after": declaration.after}
        parts["bn"] = declaration.bn or nn.BatchNorm2d(declaration.block.target.shape[0])
        for name, part in parts.items():
            if name in self._modules:
                raise UserError(f"{name!r} is no name for a kernel or scale: it is the module's {name!r} part")
            self.add_module(name, part)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return self.after(self.bn(self.conv2d(self.before(x))))

    def fuse(self) -> nn.Sequential:  # noqa: D102
        return nn.Sequential(self.before, self.folded(self.bn), self.after)


class Depth:
    """Counts the blocks of a stage, for the scales at which a hyper-search starts (`repopt.layers.initial_scale`).

    A block that changes width or resolution is a first block.
    """

    def __init__(self) -> None:
        self.number = 0

    def initial_scale(self, declaration: Declaration) -> float:
        """Of the next block."""
        out_channels, per_group, *_ = declaration.block.target.shape
        if declaration.stride != 1 or out_channels != per_group * declaration.block.target.groups:
            self.number = 0
        self.number += 1
        return initial_scale(self.number - 1, "depth")


def _scaled(block: Block, factor: float) -> Block:
    """The block whose scales start at `factor` times what it declares."""
    branches = (b if b.scale is None else replace(b, initial=b.initial * factor) for b in block.branches)
    return replace(block, branches=tuple(branches))


def convert_model(model: nn.Module, mode: Mode) -> nn.Module:
    """A copy whose registered blocks are declared ones, with fresh kernels; all else is kept, with its weights.

    The hs, csla and target forms of a model have the same blocks at the same paths, so that the scales searched with
    one fit the others. A hyper-search starts its scales by depth (see `Depth`), and the count begins anew in every
    `nn.Sequential` and `nn.ModuleList`.

    Args:
        model: with modules of registered types (`register_block`; timm's repvgg, mobileone and repghost are). It stays
            as it is.
        mode: "hs", "csla" or "target".

    Raises:
        UserError: an unknown mode; no module of a registered type; one that computes something else than it can
            declare (drop_path, branches that are fused already): the message names the module.
    """
    if mode not in MODES:
        raise unknown("mode", mode, MODES)
    done: dict[nn.Module, nn.Module] = {}  # a module may stand at several places

    def convert(module: nn.Module, path: str, depth: Depth) -> nn.Module:
        if module not in done:
            done[module] = new = _converted(module, path, mode, depth)
            if isinstance(new, nn.Sequential | nn.ModuleList):
                depth = Depth()
            for name, child in list(new._modules.items()):
                if child is not None:
                    setattr(new, name, convert(child, f"{path}.{name}" if path else name, depth))
        return done[module]

    converted = convert(copy.deepcopy(model), "", Depth())
    if all(new is module for module, new in done.items()):
        raise UserError(
            f"{type(model).__name__} has no block of a registered type ({', '.join(registered_types())}): "
            "repopt.register_block registers one"
        )
    return converted


def _converted(module: nn.Module, path: str, mode: Mode, depth: Depth) -> nn.Module:
    """The declared block in the place of a module of a registered type; any other module as it is."""
    try:
        declare = declare_of(module)
        if declare is None:
            return module
        if module._forward_hooks or module._forward_pre_hooks:
            raise UserError("its forward hooks would be lost")
        declaration = declare(module)
        block = _scaled(declaration.block, depth.initial_scale(declaration))
        new = ConvertedBlock(replace(declaration, block=block), mode)
    except UserError as error:
        place = f"{path!r} ({type(module).__name__})" if path else type(module).__name__
        raise UserError(f"cannot convert {place}: {error}") from None
    like = next(module.parameters())
    return new.to(like.device, like.dtype).train(module.training)
