"""A network of registered blocks becomes one of declared blocks."""

from __future__ import annotations

import copy
from dataclasses import replace

from torch import Tensor, nn
from typing_extensions import override

from repopt.convert.check import check_declaration
from repopt.convert.declaration import DECLARE, Declaration, registered_type
from repopt.errors import UserError, unknown
from repopt.layers import MODES, Deployable, Mode, RepConv2d, initial_scale


class ConvertedBlock(RepConv2d, Deployable):
    """A declared module, (N, C, H, W) -> (N, O, H', W'): ``after(bn(conv2d(before(x))))``.

    Raises:
        UserError: a kernel or scale has the name of one of the other parts.
    """

    before: nn.Module
    bn: nn.BatchNorm2d
    after: nn.Module

    def __init__(self, declaration: Declaration, mode: Mode) -> None:
        super().__init__(declaration.block, mode, declaration.stride, declaration.dilation)
        parts = {"before": declaration.before, "after": declaration.after}
        parts["bn"] = declaration.bn or nn.BatchNorm2d(declaration.block.target.shape[0])
        for name, part in parts.items():
            if name in self._modules:
                raise UserError(f"{name!r} is no name for a kernel or scale: it is the module's {name!r} part")
            self.add_module(name, part)

    @override
    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.bn(self.conv2d(self.before(x))))

    @override
    def fuse(self) -> nn.Sequential:
        return nn.Sequential(self.before, self.folded(self.bn), self.after)


class _Depth:
    """Counts the blocks of a stage; one that changes width or resolution is a first block."""

    def __init__(self) -> None:
        self.number = 0

    def scaled(self, declaration: Declaration) -> Declaration:
        """Return the declaration of the next block with the scales at which a hyper-search starts at its depth."""
        block = declaration.block
        out_channels, per_group, *_ = block.target.shape
        if declaration.stride != 1 or out_channels != per_group * block.target.groups:
            self.number = 0
        factor = initial_scale(self.number, "depth")
        self.number += 1
        branches = tuple(b if b.scale is None else replace(b, initial=b.initial * factor) for b in block.branches)
        return replace(declaration, block=replace(block, branches=branches))


def convert_model(model: nn.Module, mode: Mode) -> nn.Module:
    """Return a copy whose registered blocks are declared ones, with fresh kernels; all else is kept with its weights.

    The hs, csla and target forms of a model have the same blocks at the same paths, so that the scales searched with
    one fit the others. A hyper-search starts its scales by depth (`repopt.layers.initial_scale`), counted anew in every
    `nn.Sequential` and `nn.ModuleList`, and from every block that changes width or resolution.

    Args:
        model: a network with modules of registered types (`register_block`; those of timm's repvgg, mobileone and
            repghost are). It stays as it is.
        mode: "hs", "csla" or "target".

    Raises:
        UserError: an unknown mode; no module of a registered type; one that computes something else than it can
            declare (drop_path, branches that are fused already), or than it is declared to, which is tried on random
            statistics and input: the message names the module.
    """
    if mode not in MODES:
        raise unknown("mode", mode, MODES)
    done: dict[nn.Module, nn.Module] = {}  # a module may stand at several places

    def convert(module: nn.Module, path: str, depth: _Depth) -> nn.Module:
        if module not in done:
            done[module] = new = _converted(module, path, mode, depth)
            if isinstance(new, nn.Sequential | nn.ModuleList):
                depth = _Depth()
            for name, child in list(new._modules.items()):
                if child is not None:
                    setattr(new, name, convert(child, f"{path}.{name}" if path else name, depth))
        return done[module]

    converted = convert(copy.deepcopy(model), "", _Depth())
    if all(new is module for module, new in done.items()):
        registered = sorted(f"{block_type.__module__}.{block_type.__qualname__}" for block_type in DECLARE)
        raise UserError(
            f"{type(model).__name__} has no block of a registered type ({', '.join(registered)}): "
            "repopt.register_block registers one; a network without branches is taken as it is by repopt.declare"
        )
    return converted


def _converted(module: nn.Module, path: str, mode: Mode, depth: _Depth) -> nn.Module:
    """Return the declared block in the place of a module of a registered type; any other module as it is."""
    cls = registered_type(type(module))
    if cls is None:
        return module
    try:
        if cls is not type(module):  # it may compute something else
            raise UserError(f"its type derives from {cls.__name__}, and needs a declaration of its own")
        if module._forward_hooks or module._forward_pre_hooks:
            raise UserError("its forward hooks would be lost")
        declaration = DECLARE[cls](module)
        check_declaration(module, declaration)
        new = ConvertedBlock(depth.scaled(declaration), mode)
    except Exception as error:  # of a declaration that others wrote, too
        which = f"{path!r} ({type(module).__name__})" if path else type(module).__name__
        if isinstance(error, UserError):
            raise UserError(f"cannot convert {which}: {error}") from None
        raise UserError(f"cannot convert {which}: its declaration raised {type(error).__name__}: {error}") from error
    for name, value in vars(module).items():  # what a framework has noted on it, be it in the place of a method
        of_all = name not in vars(new) and hasattr(nn.Module, name)
        if not hasattr(new, name) or (of_all and getattr(type(new), name) is getattr(nn.Module, name)):
            setattr(new, name, value)
    like = next(module.parameters())
    return new.to(like.device, like.dtype).train(module.training)
