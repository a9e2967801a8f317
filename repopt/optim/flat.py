"""Many small parameters updated as one vector: an elementwise rule does not see where a parameter ends.

Most parameters of a network are vectors (batch norms, biases), whose updates one by one are all overhead.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from repopt.optim.update import ParamSlot, ParamUpdate

MAX_NUMEL = 2**16  # of a parameter that is small
MAX_KEPT = 32  # vectors that are kept from step to step


class FlatParams:
    """Copies small parameters without multipliers into vectors before an update, and back afterwards."""

    def __init__(self) -> None:
        self._known: dict[tuple[ParamSlot, ...], _Flat] = {}
        self._in_use: list[_Flat] = []

    def flatten(self, updates: list[ParamUpdate]) -> list[ParamUpdate]:
        """Return the updates, one instead of those of small plain parameters that share constants and scalars."""
        alike: dict[object, list[ParamUpdate]] = {}
        flattened, self._in_use = [], []
        for update in updates:
            param = update.slot.param
            if update.slot.mult is None and param.numel() <= MAX_NUMEL:
                dtypes = (param.dtype, update.gradient.dtype, *(value.dtype for value in update.slot.state.values()))
                alike.setdefault((id(update.constants), id(update.scalars), param.device, dtypes), []).append(update)
            else:
                flattened.append(update)
        if len(self._known) > MAX_KEPT:
            self._known = {}
        for small in alike.values():
            members = tuple(update.slot for update in small)
            flat = self._known[members] = self._known.get(members) or _flat(members)
            self._in_use.append(flat)
            torch._foreach_copy_(flat.parts, flat.tensors)
            gradient = torch.cat([update.gradient.reshape(-1) for update in small])
            flattened.append(small[0]._replace(slot=flat.slot, gradient=gradient))
        return flattened

    def unflatten(self) -> None:
        """Copy the vectors' entries back into the parameters and their states."""
        for flat in self._in_use:
            torch._foreach_copy_(flat.tensors, flat.parts)


class _Flat(NamedTuple):
    """Parameters and their states, the parts of vectors that stand for them, and the slot of these vectors."""

    tensors: list[Tensor]
    parts: list[Tensor]
    slot: ParamSlot


def _flat(members: tuple[ParamSlot, ...]) -> _Flat:
    names = tuple(members[0].state)
    rows = [[member.param.detach() for member in members]]
    rows += [[member.state[name] for member in members] for name in names]
    sizes = [param.numel() for param in rows[0]]
    vectors = [row[0].new_empty(sum(sizes)) for row in rows]
    tensors = [tensor for row in rows for tensor in row]
    parts = [part for vector in vectors for part in vector.split(sizes)]
    parts = [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)]
    return _Flat(tensors, parts, ParamSlot(vectors[0], None, dict(zip(names, vectors[1:], strict=True))))
