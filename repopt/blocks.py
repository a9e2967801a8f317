"""The declared blocks of a model, found by the names of their modules, never by position."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, get_args

from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from torch.nn.parallel import DistributedDataParallel

from repopt.csla import Block
from repopt.errors import UserError
from repopt.layers import Mode, ModuleWrapper, RepLayer

Plain = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear
PLAIN = get_args(Plain)  # of which kernels may be declared


@dataclass(frozen=True, eq=False)
class DeclaredConv:
    """A convolution or linear layer of any network, declared to have branches (`repopt.declare`).

    Attributes:
        block: the declaration.
        conv: the layer.
    """

    block: Block
    conv: Plain
    mode: ClassVar[Mode] = "target"

    _KEY: ClassVar[str] = "repopt_block"  # of the declaration in the convolution's attributes

    @classmethod
    def of(cls, module: nn.Module) -> DeclaredConv | None:
        """Return what a module is declared to be, if it is."""
        block = vars(module).get(cls._KEY)
        return None if block is None or not isinstance(module, PLAIN) else cls(block, module)

    @classmethod
    def mark(cls, conv: Plain, block: Block) -> None:
        """Declare a convolution."""
        setattr(conv, cls._KEY, block)

    @classmethod
    def forget(cls, module: nn.Module) -> None:
        """Take a declaration back, where there is one."""
        vars(module).pop(cls._KEY, None)

    def kernel(self) -> Tensor:
        """Return the kernel, (O, I, *k)."""
        return self.conv.weight

    def values(self, name: str) -> Tensor:
        """Return the kernel by its declared name."""
        assert name == self.block.target.name, f"a plain convolution has no {name}"
        return self.conv.weight


DeclaredBlock = RepLayer | DeclaredConv


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside `torch.compile`, DistributedDataParallel and `ModuleWrapper`, whose names are its own."""
    while isinstance(model, (OptimizedModule, DistributedDataParallel, ModuleWrapper)):
        if isinstance(model, ModuleWrapper):
            model = model.wrapped_module
        else:
            model = model._orig_mod if isinstance(model, OptimizedModule) else model.module
    return model


def declared_blocks(model: nn.Module, *modes: Mode) -> list[tuple[str, DeclaredBlock]]:
    """Return every declared block of a model, with the path of its module.

    Raises:
        UserError: modes are asked for, and there is no block, or one in another mode.
    """
    found: list[tuple[str, DeclaredBlock]] = []
    for path, module in unwrapped(model).named_modules():
        block = module if isinstance(module, RepLayer) else DeclaredConv.of(module)
        if block is not None:
            found.append((path, block))
    if modes and not found:
        raise UserError(f"{type(model).__name__} has no declared blocks: this needs one in {' or '.join(modes)} mode")
    for path, block in found:
        if modes and block.mode not in modes:
            raise UserError(f"this needs a model in {' or '.join(modes)} mode, not {block.mode} ({path})")
    return found


def trained_kernels(model: nn.Module) -> Iterator[tuple[str, str, DeclaredBlock]]:
    """Yield the name of every trained kernel of a model in target mode, with the path of its block, and the block.

    Blocks that share a kernel yield the same name.
    """
    names: dict[Tensor, str] = {param: name for name, param in unwrapped(model).named_parameters()}
    for path, module in declared_blocks(model, "target"):
        if module.kernel().requires_grad:
            yield names[module.kernel()], path, module


def key_of(path: str, name: str) -> str:
    """Return the state-dict key of a declared name in the block at `path`."""
    return f"{path}.{name}.weight" if path else f"{name}.weight"
