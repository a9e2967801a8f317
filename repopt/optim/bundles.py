"""Many small parameters updated as one: an elementwise rule does not see where a parameter ends.

Most parameters of a network are vectors (batch norms, biases). One by one they take longer to name than to update.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from repopt.optim.update import Place, Task

SMALL = 2**16  # entries
MOST = 32  # bundles that are kept


class Bundles:
    """Gathers the small parameters without multipliers before an update, and scatters them afterwards."""

    def __init__(self) -> None:
        self._known: dict[tuple[Place, ...], _Bundle] = {}
        self._gathered: list[_Bundle] = []

    def gather(self, tasks: list[Task]) -> list[Task]:
        """The tasks, where those of small plain parameters that share constants and scalars have become one."""
        alike: dict[object, list[Task]] = {}
        gathered = []
        for task in tasks:
            param = task.place.param
            if task.place.mult is None and param.numel() <= SMALL:
                dtypes = (param.dtype, task.gradient.dtype, *(value.dtype for value in task.place.state.values()))
                alike.setdefault((id(task.constants), id(task.scalars), param.device, dtypes), []).append(task)
            else:
                gathered.append(task)
        self._gathered = []
        if len(self._known) > MOST:
            self._known = {}
        for small in alike.values():
            members = tuple(task.place for task in small)
            bundle = self._known[members] = self._known.get(members) or _bundle(members)
            self._gathered.append(bundle)
            torch._foreach_copy_(bundle.parts, bundle.tensors)
            gradient = torch.cat([task.gradient.reshape(-1) for task in small])
            gathered.append(small[0]._replace(place=bundle.place, gradient=gradient))
        return gathered

    def scatter(self) -> None:
        """Give the parameters that were gathered, and their states, what became of them."""
        for bundle in self._gathered:
            torch._foreach_copy_(bundle.tensors, bundle.parts)


class _Bundle(NamedTuple):
    """Parameters and states of some places, and the parts of one large place that stand for them."""

    tensors: list[Tensor]
    parts: list[Tensor]
    place: Place


def _bundle(members: tuple[Place, ...]) -> _Bundle:
    params = [member.param.detach() for member in members]
    sizes = [param.numel() for param in params]
    bundle = _Bundle([], [], Place(params[0].new_empty(sum(sizes)), None, {}))

    def add(tensors: list[Tensor], flat: Tensor) -> None:
        parts = flat.split(sizes)
        bundle.tensors.extend(tensors)
        bundle.parts.extend(part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True))

    add(params, bundle.place.param)
    for name in members[0].state:
        bundle.place.state[name] = members[0].state[name].new_empty(sum(sizes))
        add([member.state[name] for member in members], bundle.place.state[name])
    return bundle
