"""What is said of a block type, once: the declaration of one of its modules."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from repopt.csla import Block
from repopt.errors import UserError


@dataclass(frozen=True)
class Declaration:
    """What a module computes, ``after(bn(conv2d(before(x))))``, once the sum of its branches is declared.

    Attributes:
        block: kernels and scales that the branches add up from. The batch norm of a branch becomes its scale.
        stride, dilation: of the convolution, (N, C, H, W) -> (N, O, H', W'); see `repopt.RepConv2d`.
        before: what runs before it.
        bn: the batch norm of the sum, a new one; None = `nn.BatchNorm2d` with its defaults.
        after: what follows the batch norm: attention, a non-linearity.
    """

    block: Block
    stride: int = 1
    dilation: int = 1
    before: nn.Module = field(default_factory=nn.Identity)
    bn: nn.BatchNorm2d | None = None
    after: nn.Module = field(default_factory=nn.Identity)


Declare = Callable[[Any], Declaration]
_declare: dict[type[nn.Module], Declare] = {}


def register_block(block_type: type[nn.Module]) -> Callable[[Declare], Declare]:
    """Decorate the function that declares a module of this type; the last one registered for a type counts.

    The function gets a module of the copy that is converted, so that the declaration may take its parts over, and
    raises `UserError` where the module computes something else than it can declare.
    """

    def decorate(declare: Declare) -> Declare:
        _declare[block_type] = declare
        return declare

    return decorate


def declare_of(module: nn.Module) -> Declare | None:
    """The function registered for the module's type.

    Raises:
        UserError: the type derives from a registered one, and may compute something else.
    """
    for cls in type(module).__mro__:
        if cls in _declare:
            if cls is type(module):
                return _declare[cls]
            raise UserError(f"its type derives from {cls.__name__}, and needs a declaration of its own")
    return None


def registered_types() -> list[str]:
    """Names of the types that are registered, with their modules: several types may share a name."""
    return sorted(f"{block_type.__module__}.{block_type.__qualname__}" for block_type in _declare)
