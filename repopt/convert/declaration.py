"""What a module computes is declared once, by a function that is registered for its type."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from repopt.csla import Block
from repopt.layers import FusedBranches


@dataclass(frozen=True)
class Declaration:
    """What a module computes, ``after(bn(conv2d(before(x))))``, once the sum of its branches is declared.

    Attributes:
        block: kernels and scales that the branches add up from. The batch norm of a branch becomes its scale.
        stride, dilation: those of the convolution, (N, C, H, W) -> (N, O, H', W'); see `repopt.RepConv2d`.
        before: what runs before the convolution.
        bn: the batch norm of the sum, a new one; None = `nn.BatchNorm2d` with its defaults.
        after: what follows the batch norm: attention, a non-linearity.
        fuse: takes the module and returns its branches in eval mode. None = they are what runs in it: convolutions,
            each with its batch norm or none, an identity with or without one, and up to one batch norm after their sum.
    """

    block: Block
    stride: int = 1
    dilation: int = 1
    before: nn.Module = field(default_factory=nn.Identity)
    bn: nn.BatchNorm2d | None = None
    after: nn.Module = field(default_factory=nn.Identity)
    fuse: Callable[[Any], FusedBranches] | None = None


Declare = Callable[[Any], Declaration | None]
Rewrite = Callable[[Any], int | None]
DECLARE: dict[type[nn.Module], Declare] = {}  # by the type of the module
REWRITE: dict[type[nn.Module], Rewrite] = {}


def registered_types() -> str:
    """Return the names of all registered types, as messages list them: those of libraries, not our own parts."""
    own = __name__.partition(".")[0]
    types = (cls for cls in (*DECLARE, *REWRITE) if cls.__module__.partition(".")[0] != own)
    return ", ".join(sorted(f"{cls.__module__}.{cls.__qualname__}" for cls in types))


def register_block(block_type: type[nn.Module]) -> Callable[[Declare], Declare]:
    """Decorate the function that declares a module of this type; the last one registered for a type counts.

    The function gets a module of the copy that is converted, so that the declaration may take its parts over, returns
    None where the module has no branches, and raises `UserError` where it computes something else than it can declare.
    """

    def decorate(declare: Declare) -> Declare:
        DECLARE[block_type] = declare
        return declare

    return decorate


def register_container(container_type: type[nn.Module]) -> Callable[[Rewrite], Rewrite]:
    """Decorate the function that rewrites a module of this type, in whose forward sums of branches stand beside more.

    The function puts modules of registered types in the place of the sums, in the module that it gets, which is to be
    the same function afterwards, and returns how many channels that takes; None where there are no branches.
    """

    def decorate(rewrite: Rewrite) -> Rewrite:
        REWRITE[container_type] = rewrite
        return rewrite

    return decorate


def registered_type(module_type: type[nn.Module]) -> type[nn.Module] | None:
    """Return the registered type, of a block or a container, that a type is or derives from; None where none is."""
    return next((base for base in module_type.__mro__ if base in DECLARE or base in REWRITE), None)
