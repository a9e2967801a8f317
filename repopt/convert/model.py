"""A network of registered blocks becomes one of declared blocks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from torch import Tensor, nn
from typing_extensions import override

from repopt.convert.check import Original, check_declaration, rewrite_container
from repopt.convert.declaration import DECLARE, REWRITE, Declaration, registered_type, registered_types
from repopt.errors import UserError, unknown
from repopt.layers import MODES, Deployable, Mode, RepConv2d, initial_scale

FOLDS = ("reparameterize", "switch_to_deploy", "fuse")  # methods by which timm folds a block


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


class Converted(NamedTuple):
    """A declared block, and what the module in whose place it stands was with its branches."""

    block: ConvertedBlock
    original: Original


class Depth:
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
        model: a network with modules of registered types (`register_block`; those that timm folds are). It stays as it
            is.
        mode: "hs", "csla" or "target".

    Raises:
        UserError: an unknown mode; no module of a registered type; a block that would keep its branches
            (`check_complete`); one that computes something else than it can declare (drop_path, branches that are fused
            already), or than it is declared to, which is tried on random statistics and input: the message names the
            module.
    """
    if mode not in MODES:
        raise unknown("mode", mode, MODES)
    found = []

    def convert(module: nn.Module, path: str, depth: Depth) -> nn.Module:
        if (converted := convert_block(module, path, mode, depth)) is None:
            return module
        found.append(converted)
        return converted.block

    copied = replace_modules(model, convert)
    if not found:
        raise UserError(
            f"{type(model).__name__} has no block of a registered type ({registered_types()}): "
            "repopt.register_block registers one; a network without branches is taken as it is by repopt.declare"
        )
    check_complete(copied)
    return copied


def replace_modules(model: nn.Module, replacement: Callable[[nn.Module, str, Depth], nn.Module]) -> nn.Module:
    """Return a copy in which other modules stand in the place of some, with the same device, type and training mode.

    Args:
        model: stays as it is.
        replacement: takes a module of the copy, its path, and the depth at which it stands, and returns the one that is
            to stand there, be it the same; the modules within that one are next.

    Raises:
        UserError: a module that is to be replaced has forward hooks.
    """
    done: dict[nn.Module, nn.Module] = {}  # a module may stand at several places

    def replaced(module: nn.Module, path: str, depth: Depth) -> nn.Module:
        if module not in done:
            done[module] = new = replacement(module, path, depth)
            if new is not module:
                if module._forward_hooks or module._forward_pre_hooks:
                    raise UserError(f"cannot convert {_place(module, path)}: its forward hooks would be lost")
                like = next(module.parameters())
                new.to(like.device, like.dtype).train(module.training)
            if isinstance(new, nn.Sequential | nn.ModuleList):
                depth = Depth()
            for name, child in list(new._modules.items()):
                if child is not None:
                    setattr(new, name, replaced(child, f"{path}.{name}" if path else name, depth))
        return done[module]

    return replaced(copy.deepcopy(model), "", Depth())


def check_complete(model: nn.Module) -> None:
    """Refuse a converted network with a block of timm left that folds its branches, and is of no registered type.

    Such a block has a method of `FOLDS` (what other libraries' methods of these names do is not known), none within it
    has one, and two convolutions or more: with one it is a convolution and its batch norm.

    Raises:
        UserError: it names the block.
    """
    for path, module in model.named_modules():
        if type(module).__module__.partition(".")[0] != "timm":
            continue
        folds = [part for part in module.modules() if any(hasattr(part, name) for name in FOLDS)]
        convs = sum(isinstance(part, nn.Conv2d) for part in module.modules())
        known = isinstance(module, RepConv2d) or registered_type(type(module))
        if folds == [module] and convs > 1 and not known:
            raise UserError(
                f"cannot convert {_place(module, path)}: it folds its branches at inference as the network's other "
                "blocks do, and its type is not registered (repopt.register_block)"
            )


def convert_block(module: nn.Module, path: str, mode: Mode, depth: Depth) -> Converted | None:
    """Return the declared block that takes the place of a module of a registered type; None for any other module.

    A module of a registered container type is rewritten in place: the modules within are converted next.

    Raises:
        UserError: it computes something else than it can declare or is declared to; the message names the path.
    """
    cls = registered_type(type(module))
    if cls is None:
        return None
    try:
        if cls is not type(module):  # it may compute something else
            raise UserError(f"its type derives from {cls.__name__}, and needs a declaration of its own")
        if cls in REWRITE:
            rewrite_container(module, REWRITE[cls])
            return None
        if (declaration := DECLARE[cls](module)) is None:
            return None
        original = check_declaration(module, declaration)
        new = ConvertedBlock(depth.scaled(declaration), mode)
    except Exception as error:  # of a declaration that others wrote, too
        which = _place(module, path)
        if isinstance(error, UserError):
            raise UserError(f"cannot convert {which}: {error}") from None
        raise UserError(f"cannot convert {which}: its declaration raised {type(error).__name__}: {error}") from error
    for name, value in vars(module).items():  # what a framework has noted on it, be it in the place of a method
        of_all = name not in vars(new) and hasattr(nn.Module, name)
        if not hasattr(new, name) or (of_all and getattr(type(new), name) is getattr(nn.Module, name)):
            setattr(new, name, value)
    return Converted(new, original)


def _place(module: nn.Module, path: str) -> str:
    return f"{path!r} ({type(module).__name__})" if path else type(module).__name__
