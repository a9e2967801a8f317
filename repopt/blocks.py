"""The declared blocks of a model, found by the names of their modules, never by position."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from torch.nn.parallel import DistributedDataParallel

from repopt.errors import UserError
from repopt.layers import Mode, ModuleWrapper, RepConv2d


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside `torch.compile`, DistributedDataParallel and `ModuleWrapper`, whose names are its own."""
    while isinstance(model, (OptimizedModule, DistributedDataParallel, ModuleWrapper)):
        if isinstance(model, ModuleWrapper):
            model = model.wrapped_module
        else:
            model = model._orig_mod if isinstance(model, OptimizedModule) else model.module
    return model


def declared_blocks(model: nn.Module, *modes: Mode) -> list[tuple[str, RepConv2d]]:
    """Return every declared block of a model, with the path of its module.

    Raises:
        UserError: modes are asked for, and there is no block, or one in another mode.
    """
    found = [(path, module) for path, module in unwrapped(model).named_modules() if isinstance(module, RepConv2d)]
    if modes and not found:
        raise UserError(f"{type(model).__name__} has no declared blocks: this needs one in {' or '.join(modes)} mode")
    for path, module in found:
        if modes and module.mode not in modes:
            raise UserError(f"this needs a model in {' or '.join(modes)} mode, not {module.mode} ({path})")
    return found


def trained_kernels(model: nn.Module) -> Iterator[tuple[str, str, RepConv2d]]:
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
