"""A whole step as one compiled function: every parameter is read and written once, and nothing else is made.

A step moves memory and does little else, so every further pass over it costs. torch.compile fuses the multiplier into
the update rule. There M must not cost much either: its few numbers are laid out so that the inner loop is long and
contiguous and meets one small pattern again and again, instead of computing where in the kernel it is.
"""

from __future__ import annotations

import itertools
import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._dynamo.eval_frame import remove_from_cache

from repopt.csla import GradMult
from repopt.optim.update import ParamSlot, ParamUpdate, Rule, State, apply

MAX_PROGRAMS = 8  # that one optimizer compiles before it gives that up
LANES = 16  # input channels that share a row of the layout: with a 3x3 kernel, 144 numbers

# Inductor would keep intermediate results that are read often; here none is worth a pass over the memory.
OPTIONS = dict.fromkeys(("realize_reads_threshold", "realize_opcount_threshold", "realize_acc_reads_threshold"), 1000)


class MultLayout(NamedTuple):
    """A Grad Mult laid out as its kernel lies in memory: M = sum of coefficients times patterns, plus the diagonal.

    Attributes:
        shape: (O, rows, columns) of the kernel's memory.
        coefficients: (O, 1, 1) each, or (O, rows, 1).
        patterns: zeros and ones, (columns,) each, one fewer than coefficients: the first stands for ones everywhere.
        diagonal: numbers, and where in the memory of a filter each is, (O, 1, 1) both; empty without a diagonal.
    """

    shape: tuple[int, ...]
    coefficients: list[Tensor]
    patterns: list[Tensor]
    diagonal: tuple[Tensor, ...]

    def __call__(self, gradient: Tensor) -> Tensor:
        """Return ``M * gradient``, both of the layout's shape."""
        mult = self.coefficients[0]
        for coefficient, pattern in zip(self.coefficients[1:], self.patterns, strict=True):
            mult = mult + coefficient * pattern
        if self.diagonal:
            numbers, position = self.diagonal
            _, rows, columns = self.shape
            here = torch.arange(rows * columns, device=gradient.device).view(rows, columns)
            mult = mult + torch.where(here == position, numbers, 0.0)
        return gradient * mult

    def tie_to_mult_loop(self, gradient: Tensor) -> Tensor:
        """Return the gradient times 1, which Inductor reads in the loops in which it would be multiplied by M.

        Where M enters late, it would update the state in a loop of its own before: the memory is passed over once more.
        What depends on the coefficients has their loops.
        """
        for factor in (self.coefficients[0], *self.patterns[:1]):
            gradient = gradient * (0 * factor + 1)
        return gradient


def mult_layout(mult: GradMult, *, channels_last: bool) -> MultLayout:
    """Return the layout of a multiplier (O, I, *k)."""
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
    diagonal: tuple[Tensor, ...] = ()
    if mult.diagonal is not None:
        column = (torch.arange(out_channels, device=filters.device) + mult.first) % in_channels
        position = centre * in_channels + column if channels_last else column * area + centre
        diagonal = (mult.diagonal.view(-1, 1, 1), position.view(-1, 1, 1))
    return MultLayout(shape, coefficients, patterns, diagonal)


class CompileError(Exception):
    """The step could not be compiled."""


def _keep_program_guard(guards: Sequence[Any]) -> list[bool]:
    """Return which guards of a compiled step are kept: all but one would look at every tensor in every step."""
    return [guard.name == "program" for guard in guards]


def _update(program: int, rule: Rule, entries: list[tuple[Any, ...]]) -> None:
    assert program > 0  # reads it, so that it is guarded
    for param, gradient, mult, state, constants, scalars in entries:
        if mult is not None and rule.degree != 1:
            gradient = mult.tie_to_mult_loop(gradient)
        apply(rule, param, gradient, mult, state, {**constants, **scalars})


class CompiledFunction:
    """A function under torch.compile, whose programs are told apart by a key, and freed with it.

    Args:
        function: its first argument is the number of the program, which it has to read, so that it is guarded.
        options: of torch.compile.
    """

    def __init__(self, function: Callable[..., Any], options: Mapping[str, Any] | None = None) -> None:
        assert isinstance(function, FunctionType)
        own = FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
        settings: dict[str, Any] = {**(options or {}), "guard_filter_fn": _keep_program_guard}
        self._compiled = torch.compile(own, fullgraph=True, dynamic=False, options=settings)
        weakref.finalize(self, remove_from_cache, own)  # a program and its code hold each other
        self._programs: dict[Any, int] = {}

    def __contains__(self, key: object) -> bool:
        """Return whether there is a program for a key."""
        return key in self._programs

    def __call__(self, key: object, *arguments: Any) -> Any:
        """Return what the function returns; nothing but the key may decide what it does.

        Raises:
            CompileError: there is no compiler, say, or there are too many keys; nothing has been done.
        """
        is_new = key not in self
        if is_new:
            if len(self._programs) == MAX_PROGRAMS:
                raise CompileError("which parameters have gradients, or hyper-parameters, change again and again")
            self._programs[key] = len(self._programs) + 1
        try:
            with torch._dynamo.config.patch(recompile_limit=MAX_PROGRAMS + 1) if is_new else nullcontext():
                return self._compiled(self._programs[key], *arguments)
        except (torch._dynamo.exc.TorchDynamoException, torch._dynamo.exc.FailOnRecompileLimitHit) as error:
            raise CompileError(str(error).strip().splitlines()[0]) from error


class CompiledUpdate:
    """Does the updates of a step in one compiled function, and keeps what is the same in every step."""

    def __init__(self, rule: Rule) -> None:
        self.rule = rule
        self._flat_slots: dict[ParamSlot, _FlatSlot | None] = {}
        self._scalars: dict[Any, _Scalars] = {}
        self._update = CompiledFunction(_update, OPTIONS)

    def __call__(self, updates: list[ParamUpdate]) -> list[ParamUpdate]:
        """Do the updates, and return those that it cannot do: of parameters neither contiguous nor channels_last.

        Raises:
            CompileError: there is no compiler, say; nothing has been done.
        """
        self._flat_slots |= {u.slot: _flat_slot(u.slot) for u in updates if u.slot not in self._flat_slots}
        left = [u for u in updates if self._flat_slots[u.slot] is None]
        flat_slots = [flat for u in updates if (flat := self._flat_slots[u.slot]) is not None]
        ready = [u for u in updates if self._flat_slots[u.slot] is not None]
        if not ready:
            return left
        key = (*ready[0].scalars, *((u.slot, u.gradient.dtype, *u.constants.items()) for u in ready))
        if key not in self._update:
            self._scalars[key] = _Scalars(ready)
        scalar_buffers = self._scalars[key]
        scalar_buffers.set(ready)
        entries = []
        for update, flat, scalars in zip(ready, flat_slots, scalar_buffers.of_update, strict=True):
            gradient = _flat_view(in_layout_of(update.slot.param, update.gradient), flat.shape)
            entries.append((flat.param, gradient, flat.mult, flat.state, update.constants, scalars))
        self._update(key, self.rule, entries)
        return left

    def tensors(self) -> list[Tensor]:
        """Return what the layouts of multipliers keep."""
        layouts = [flat.mult for flat in self._flat_slots.values() if flat is not None and flat.mult is not None]
        return [tensor for t in layouts for tensor in (*t.coefficients, *t.patterns, *t.diagonal)]


class _FlatSlot(NamedTuple):
    """A slot as it is laid out: everything but the multiplier is a view."""

    shape: tuple[int, ...]
    param: Tensor
    mult: MultLayout | None
    state: State


def _flat_slot(slot: ParamSlot) -> _FlatSlot | None:
    param = slot.param
    channels_last = not param.is_contiguous()
    if channels_last and (param.dim() < 3 or not param.movedim(1, -1).is_contiguous()):
        return None
    mult = None if slot.mult is None else mult_layout(slot.mult, channels_last=channels_last)
    shape = (param.numel(),) if mult is None else mult.shape
    state = {name: _flat_view(value, shape) for name, value in slot.state.items()}
    return _FlatSlot(shape, _flat_view(param, shape), mult, state)


class _Scalars:
    """A tensor of its own for every scalar of every update.

    Numbers would be compiled in; and what several updates read would make Inductor fuse their loops, which then walk
    over too many places of the memory at once.
    """

    def __init__(self, updates: list[ParamUpdate]) -> None:
        names, params = tuple(updates[0].scalars), [update.slot.param for update in updates]
        self.device_dtypes = [(p.device, torch.promote_types(p.dtype, torch.float32)) for p in params]
        self.batches = {
            key: torch.empty(len(names), self.device_dtypes.count(key), device=key[0], dtype=key[1])
            for key in set(self.device_dtypes)
        }
        columns = {key: iter(batch.unbind(1)) for key, batch in self.batches.items()}
        self.of_update = [dict(zip(names, next(columns[key]).unbind(), strict=True)) for key in self.device_dtypes]

    def set(self, updates: list[ParamUpdate]) -> None:
        """Write the scalars of a step.

        Neighbours that have the same are written together; numbers by the device itself, so that a CUDA graph can be
        captured, in which they are constants.
        """
        for key, batch in self.batches.items():
            hypers = [u.scalars for u, own in zip(updates, self.device_dtypes, strict=True) if own == key]
            for name, row in zip(hypers[0], batch, strict=True):
                start = 0
                for _, run in itertools.groupby((scalars[name] for scalars in hypers), key=_same):
                    value, *others = run
                    part = row[start : start + 1 + len(others)]
                    part.copy_(value.reshape(())) if isinstance(value, Tensor) else part.fill_(value)
                    start += len(part)


def _same(scalar: float | Tensor) -> float:
    """Return what two scalars have in common exactly if they are the same number, or the same tensor."""
    return id(scalar) if isinstance(scalar, Tensor) else scalar


def in_layout_of(param: Tensor, value: Tensor) -> Tensor:
    """Return `value`, copied where its strides differ from the parameter's (of a dimension of 1, they mean nothing)."""
    dims = zip(value.stride(), param.stride(), param.shape, strict=True)
    if all(own == other for own, other, size in dims if size > 1):
        return value
    return torch.empty_like(param, dtype=value.dtype).copy_(value)


def _flat_view(value: Tensor, shape: tuple[int, ...]) -> Tensor:
    """View the memory of a dense tensor in a shape of the same size."""
    return value.detach().as_strided(shape, [math.prod(shape[dim + 1 :]) for dim in range(len(shape))])
