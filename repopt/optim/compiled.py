"""A whole step as one compiled function: every parameter is read and written once, and nothing else is made.

A step moves memory and does little else, so every further pass over it costs. torch.compile fuses the multiplier into
the update rule. There M must not cost much either: its few numbers are laid out so that the inner loop is long and
contiguous and meets one small pattern again and again, instead of computing where in the kernel it is.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from repopt.csla import GradMult
from repopt.optim.update import Hyper, Rule, Task, apply

LANES = 16  # input channels that share a row of the layout: with a 3x3 kernel, 144 numbers

# Inductor would keep intermediate results that are read often; here none is worth a pass over the memory.
OPTIONS = {
    "realize_reads_threshold": 1000,
    "realize_opcount_threshold": 1000,
    "realize_acc_reads_threshold": 1000,
}


class Tiles(NamedTuple):
    """A Grad Mult laid out as its kernel lies in memory: M = sum of coefficients times patterns, plus the diagonal.

    Attributes:
        shape: (O, rows, columns) of the kernel's memory.
        coefficients: (O, 1, 1) each, or (O, rows, 1).
        patterns: zeros and ones, (columns,) each, one fewer than coefficients: the first stands for ones everywhere.
        diagonal: (O, 1, 1), or None.
        position: (O, 1, 1), where in the memory of a filter the diagonal is.
    """

    shape: tuple[int, ...]
    coefficients: list[Tensor]
    patterns: list[Tensor]
    diagonal: Tensor | None
    position: Tensor | None

    def __call__(self, gradient: Tensor) -> Tensor:
        """``M * gradient``, both of the layout's shape."""
        mult = self.coefficients[0]
        for coefficient, pattern in zip(self.coefficients[1:], self.patterns, strict=True):
            mult = mult + coefficient * pattern
        if self.diagonal is not None:
            _, rows, columns = self.shape
            here = torch.arange(rows * columns, device=gradient.device).view(rows, columns)
            mult = mult + torch.where(here == self.position, self.diagonal, 0.0)
        return gradient * mult


def tiles_of(mult: GradMult, *, channels_last: bool) -> Tiles:
    """The layout of a multiplier (O, I, *k)."""
    out_channels, in_channels, *size = mult.shape
    area, centre = math.prod(size), math.prod(size) // 2
    filters = mult.filter.reshape(out_channels, area)
    if channels_last:
        shape = (out_channels, area, in_channels)
        coefficients, patterns = [filters.unsqueeze(-1)], []
    else:
        lanes = LANES if in_channels % LANES == 0 else in_channels
        shape = (out_channels, in_channels // lanes, lanes * area)
        kinds, kind_of = filters.unique(dim=1, return_inverse=True)  # of places: a 3x3 with a 1x1 has two
        base = int(kind_of.mode().values)
        others = [kind for kind in range(kinds.shape[1]) if kind != base]
        coefficients = [kinds[:, base], *(kinds[:, kind] - kinds[:, base] for kind in others)]
        coefficients = [coefficient.reshape(-1, 1, 1) for coefficient in coefficients]
        patterns = [(kind_of == kind).to(filters.dtype).repeat(lanes) for kind in others]
    diagonal = position = None
    if mult.diagonal is not None:
        _, column = mult.diagonal_at()
        position = (centre * in_channels + column if channels_last else column * area + centre).view(-1, 1, 1)
        diagonal = mult.diagonal.view(-1, 1, 1)
    return Tiles(shape, coefficients, patterns, diagonal, position)


class CompiledUpdate:
    """Does the tasks of a step in one compiled function, and keeps the layouts of their multipliers."""

    def __init__(self, rule: Rule) -> None:
        self.rule = rule
        self._tiles: dict[int, tuple[GradMult, bool, Tiles]] = {}

    def __call__(self, tasks: list[Task]) -> list[Task]:
        """Do the tasks, and return those that it cannot do because their parameters are neither contiguous nor
        channels_last.

        Raises:
            CompileError: there is no compiler, say; nothing has been done.
        """
        groups: dict[int, tuple[Hyper, list[tuple[Any, ...]]]] = {}
        left = []
        for task, scalars in zip(tasks, _as_tensors(tasks), strict=True):
            param = task.param
            channels_last = not param.is_contiguous()
            if channels_last and not param.movedim(1, -1).is_contiguous():
                left.append(task)
                continue
            mult = None if task.mult is None else self._layout(task.mult, channels_last)
            shape = (param.numel(),) if mult is None else mult.shape
            state = {name: _laid_out(value, shape) for name, value in task.state.items()}
            gradient = _laid_out(in_layout_of(param, task.gradient), shape)
            _, entries = groups.setdefault(id(task.constants), (task.constants, []))
            entries.append((_laid_out(param, shape), gradient, mult, state, scalars))
        if groups:
            _update(self.rule, list(groups.values()))
        return left

    def tensors(self) -> list[Tensor]:
        """What the layouts keep."""
        layouts = [tiles for _, _, tiles in self._tiles.values()]
        kept = [[*t.coefficients, *t.patterns, t.diagonal, t.position] for t in layouts]
        return [tensor for tensors in kept for tensor in tensors if tensor is not None]

    def _layout(self, mult: GradMult, channels_last: bool) -> Tiles:
        _, known, tiles = self._tiles.get(id(mult), (None, None, None))
        if known is not channels_last:
            tiles = tiles_of(mult, channels_last=channels_last)
            self._tiles[id(mult)] = mult, channels_last, tiles
        return tiles


CompileError = torch._dynamo.exc.TorchDynamoException


@functools.partial(torch.compile, fullgraph=True, dynamic=False, options=OPTIONS)
def _update(rule: Rule, groups: list[tuple[Hyper, list[tuple[Any, ...]]]]) -> None:
    for constants, entries in groups:
        for param, gradient, mult, state, scalars in entries:
            apply(rule, param, gradient, mult, state, {**constants, **scalars})


def _as_tensors(tasks: list[Task]) -> list[dict[str, Tensor]]:
    """The scalars of every task as tensors of its own: numbers would be compiled in, and what several tasks read
    would make Inductor fuse their loops, which then walk over too many places of the memory at once.
    """
    numbers: dict[tuple[torch.device, torch.dtype], list[float]] = {}
    for task in tasks:
        values = numbers.setdefault(_home(task.param), [])
        values.extend(value for value in task.scalars.values() if not isinstance(value, Tensor))
    tensors = {
        (device, dtype): iter(torch.tensor(values, dtype=dtype).to(device, non_blocking=True).unbind())
        for (device, dtype), values in numbers.items()
    }
    return [
        {
            name: value.to(*home, copy=True) if isinstance(value, Tensor) else next(tensors[home])
            for name, value in task.scalars.items()
        }
        for task in tasks
        for home in [_home(task.param)]
    ]


def _home(param: Tensor) -> tuple[torch.device, torch.dtype]:
    return param.device, torch.promote_types(param.dtype, torch.float32)


def in_layout_of(param: Tensor, value: Tensor) -> Tensor:
    """`value`, copied where its strides are not those of the parameter."""
    strides = [
        [stride for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]
        for tensor in (param, value)
    ]
    return value if strides[0] == strides[1] else torch.empty_like(param, dtype=value.dtype).copy_(value)


def _laid_out(value: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The memory of a dense tensor, in a shape of the same size."""
    strides = [math.prod(shape[place + 1 :]) for place in range(len(shape))]
    return value.detach().as_strided(shape, strides)
