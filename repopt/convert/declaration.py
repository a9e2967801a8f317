"""What a module computes is declared once, by a function that is registered for its type."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from repopt.csla import Block


@dataclass(frozen=True)
class Declaration:
    """What a module computes, ``after(bn(conv2d(before(x))))``, once the sum of its branches is declared.

    Attributes:
        block: kernels and scales that the branches add up from. The batch norm of a branch becomes its scale.
        stride, dilation: those of the convolution, (N, C, H, W) -> (N, O, H', W'); see `repopt.RepConv2d`.
        before: what runs before the convolution.
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
DECLARE: dict[type[nn.Module], Declare] = {}  # by the type of the module


def registered_types() -> str:
    """Return the names of all registered types, as messages list them."""
    return ", ".join(sorted(f"{block_type.__module__}.{block_type.__qualname__}" for block_type in DECLARE))


def register_block(block_type: type[nn.Module]) -> Callable[[Declare], Declare]:
    """Decorate the function that declares a module of this type; the last one registered for a type counts.

    The function gets a module of the copy that is converted, so that the declaration may take its parts over, and
    raises `UserError` where the module computes something else than it can declare.
    """

    def decorate(declare: Declare) -> Declare:
        DECLARE[block_type] = declare
        return declare

    return decorate


def registered_type(block_type: type[nn.Module]) -> type[nn.Module] | None:
    """Return the registered type that a type is or derives from; None where there is none."""
    return next((base for base in block_type.__mro__ if base in DECLARE), None)
