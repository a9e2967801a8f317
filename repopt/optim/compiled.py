"""A whole step as one compiled function: every parameter is read and written once, and nothing else is made.

A step moves memory and does little else, so every further pass over it costs. torch.compile fuses the multiplier into
the update rule. There M must not cost much either: its few numbers are laid out so that the inner loop is long and
contiguous and meets one small pattern again and again, instead of computing where in the kernel it is.
"""

from __future__ import annotations

import functools
import itertools
import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._dynamo.eval_frame import remove_from_cache

from repopt.csla import GradMult
from repopt.optim.update import Hyper, Place, Rule, State, Task, apply

MAX_PROGRAMS = 8  # that one optimizer compiles before it gives that up
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

    def in_its_loops(self, gradient: Tensor) -> Tensor:
        """The gradient times 1, read in the loops in which it would be multiplied.

        Where M enters late, Inductor would update the state in a loop of its own before: the memory is passed over once
        more. What depends on the coefficients has their loops.
        """
        for factor in (self.coefficients[0], *self.patterns[:1]):
            gradient = gradient * (0 * factor + 1)
        return gradient


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
        base = int(kinds.sum(0).argmin())  # what others add to it is not negative, so that nothing cancels
        others = [kind for kind in range(kinds.shape[1]) if kind != base]
        coefficients = [kinds[:, base], *(kinds[:, kind] - kinds[:, base] for kind in others)]
        coefficients = [coefficient.reshape(-1, 1, 1) for coefficient in coefficients]
        patterns = [(kind_of == kind).to(filters.dtype).repeat(lanes) for kind in others]
    diagonal = position = None
    if mult.diagonal is not None:
        column = (torch.arange(out_channels, device=filters.device) + mult.first) % in_channels
        position = (centre * in_channels + column if channels_last else column * area + centre).view(-1, 1, 1)
        diagonal = mult.diagonal.view(-1, 1, 1)
    return Tiles(shape, coefficients, patterns, diagonal, position)


class CompileError(Exception):
    """The step could not be compiled."""


def _by_program(guards: Sequence[Any]) -> list[bool]:
    """Which guards of a compiled step are kept: all but one would look at every tensor again, in every step."""
    return [guard.name == "program" for guard in guards]


def _update(program: int, rule: Rule, groups: list[tuple[Hyper, list[tuple[Any, ...]]]]) -> None:
    assert program > 0  # reads it, so that it is guarded
    for constants, entries in groups:
        for param, gradient, mult, state, scalars in entries:
            if mult is not None and rule.degree != 1:
                gradient = mult.in_its_loops(gradient)
            apply(rule, param, gradient, mult, state, {**constants, **scalars})


def _compiled_copy(function: FunctionType) -> Callable[..., None]:
    """Return a function under torch.compile, with code of its own, by which its programs are kept and freed."""
    own = FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
    options = {**OPTIONS, "guard_filter_fn": _by_program}
    compiled = torch.compile(own, fullgraph=True, dynamic=False, options=options)
    weakref.finalize(compiled, remove_from_cache, own)  # a program and its code hold each other
    return compiled


class CompiledUpdate:
    """Does the tasks of a step in one compiled function, and keeps what is the same in every step."""

    def __init__(self, rule: Rule) -> None:
        self.rule = rule
        self._slots: dict[Place, _Slot | None] = {}
        self._known: dict[Any, tuple[int, _Scalars]] = {}
        self._update = _compiled_copy(_update)

    def __call__(self, tasks: list[Task]) -> list[Task]:
        """Do the tasks, and return those that it cannot do because their parameters are neither contiguous nor
        channels_last.

        Raises:
            CompileError: there is no compiler, say; nothing has been done.
        """
        groups: dict[int, tuple[Hyper, list[Task]]] = {}
        for task in tasks:
            groups.setdefault(id(task.constants), (task.constants, []))[1].append(task)
        tasks = [task for _, members in groups.values() for task in members]
        key = (
            tuple(tasks[0].scalars),
            *(
                (*constants.items(), *((task.place, task.gradient.dtype) for task in members))
                for constants, members in groups.values()
            ),
        )
        is_new = key not in self._known
        if is_new:
            if len(self._known) == MAX_PROGRAMS:
                raise CompileError("which parameters have gradients, or hyper-parameters, change again and again")
            self._slots |= {task.place: _slot(task.place) for task in tasks if task.place not in self._slots}
            self._known[key] = len(self._known) + 1, _Scalars(tasks)
        program, room = self._known[key]
        room.set(tasks)
        scalars_of = dict(zip((task.place for task in tasks), room.of_task, strict=True))
        ready, left = [], []
        for constants, members in groups.values():
            entries = []
            for task in members:
                slot = self._slots[task.place]
                if slot is None:
                    left.append(task)
                    continue
                gradient = _laid_out(in_layout_of(task.place.param, task.gradient), slot.shape)
                entries.append((slot.param, gradient, slot.mult, slot.state, scalars_of[task.place]))
            if entries:
                ready.append((constants, entries))
        if ready:
            self._run(program, ready, is_new)
        return left

    def _run(self, program: int, ready: list[tuple[Hyper, list[tuple[Any, ...]]]], is_new: bool) -> None:
        try:
            with torch._dynamo.config.patch(recompile_limit=MAX_PROGRAMS + 1) if is_new else nullcontext():
                self._update(program, self.rule, ready)
        except (torch._dynamo.exc.TorchDynamoException, torch._dynamo.exc.FailOnRecompileLimitHit) as error:
            raise CompileError(str(error).strip().splitlines()[0]) from error

    def tensors(self) -> list[Tensor]:
        """What the layouts of multipliers keep."""
        layouts = [slot.mult for slot in self._slots.values() if slot is not None and slot.mult is not None]
        kept = [[*t.coefficients, *t.patterns, t.diagonal, t.position] for t in layouts]
        return [tensor for tensors in kept for tensor in tensors if tensor is not None]


class _Slot(NamedTuple):
    """A place as it is laid out: everything but the multiplier is a view."""

    shape: tuple[int, ...]
    param: Tensor
    mult: Tiles | None
    state: State


def _slot(place: Place) -> _Slot | None:
    param = place.param
    channels_last = not param.is_contiguous()
    if channels_last and (param.dim() < 3 or not param.movedim(1, -1).is_contiguous()):
        return None
    mult = None if place.mult is None else tiles_of(place.mult, channels_last=channels_last)
    shape = (param.numel(),) if mult is None else mult.shape
    state = {name: _laid_out(value, shape) for name, value in place.state.items()}
    return _Slot(shape, _laid_out(param, shape), mult, state)


class _Scalars:
    """A tensor of its own for every scalar of every task.

    Numbers would be compiled in; and what several tasks read would make Inductor fuse their loops, which then walk over
    too many places of the memory at once.
    """

    def __init__(self, tasks: list[Task]) -> None:
        self.homes = homes = [
            (t.place.param.device, torch.promote_types(t.place.param.dtype, torch.float32)) for t in tasks
        ]
        self.batches: dict[Any, Tensor] = {}
        places: dict[Any, Iterator[Tensor]] = {}
        for device, dtype in set(homes):
            shape = (len(tasks[0].scalars), homes.count((device, dtype)))
            self.batches[device, dtype] = batch = torch.empty(shape, dtype=dtype, device=device)
            places[device, dtype] = iter(batch.unbind(1))
        self.of_task = [dict(zip(tasks[0].scalars, next(places[home]).unbind(), strict=True)) for home in homes]

    def set(self, tasks: list[Task]) -> None:
        """Write the scalars of a step.

        Neighbours that have the same are written together; numbers by the device itself, so that a CUDA graph can be
        captured, in which they are constants.
        """
        of_home: dict[Any, list[Hyper]] = {home: [] for home in self.batches}
        for task, home in zip(tasks, self.homes, strict=True):
            of_home[home].append(task.scalars)
        for home, batch in self.batches.items():
            for name, row in zip(of_home[home][0], batch, strict=True):
                start = 0
                for _, run in itertools.groupby((scalars[name] for scalars in of_home[home]), key=_same):
                    value, *others = run
                    part = row[start : start + 1 + len(others)]
                    part.copy_(value.reshape(())) if isinstance(value, Tensor) else part.fill_(value)
                    start += len(part)


def _same(scalar: float | Tensor) -> float:
    """What two scalars have in common exactly if they are the same number, or the same tensor."""
    return id(scalar) if isinstance(scalar, Tensor) else scalar


def in_layout_of(param: Tensor, value: Tensor) -> Tensor:
    """`value`, copied where its strides are not those of the parameter (of a dimension of 1, they mean nothing)."""
    if value.stride() == param.stride():
        return value
    places = zip(value.stride(), param.stride(), param.shape, strict=True)
    if all(own == other for own, other, size in places if size > 1):
        return value
    return torch.empty_like(param, dtype=value.dtype).copy_(value)


@functools.cache
def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[place + 1 :]) for place in range(len(shape)))


def _laid_out(value: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The memory of a dense tensor, in a shape of the same size."""
    return value.detach().as_strided(shape, _strides(shape))
