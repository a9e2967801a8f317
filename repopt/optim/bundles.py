"""Many small parameters updated as one: an elementwise rule does not see where a parameter ends.

Most parameters of a network are vectors (batch norms, biases). One by one they take longer to name than to update.
"""

from __future__ import annotations

import torch
from torch import Tensor

from repopt.optim.update import Place, Task

SMALL = 2**16  # entries


class Bundles:
    """Gathers the small parameters without multipliers before an update, and scatters them afterwards."""

    def __init__(self) -> None:
        self._places: dict[tuple[Place, ...], Place] = {}

    def gather(self, tasks: list[Task]) -> list[Task]:
        """The tasks, where those of small plain parameters with equal hyper-parameters have become one."""
        alike: dict[object, list[Task]] = {}
        others = []
        for task in tasks:
            param = task.place.param
            numbers = tuple(task.scalars.values())
            if task.place.mult is None and param.numel() <= SMALL and not any(isinstance(n, Tensor) for n in numbers):
                alike.setdefault((id(task.constants), numbers, param.device, param.dtype), []).append(task)
            else:
                others.append(task)
        known, self._places = self._places, {}
        for small in alike.values():
            members = tuple(task.place for task in small)
            place = known.get(members) or Place(
                _flat([member.param for member in members]),
                None,
                {name: _flat([member.state[name] for member in members]) for name in members[0].state},
            )
            self._places[members] = place
            if members in known:
                _gather([member.param for member in members], place.param)
                for name, flat in place.state.items():
                    _gather([member.state[name] for member in members], flat)
            others.append(small[0]._replace(place=place, gradient=_flat([task.gradient for task in small])))
        return others

    def scatter(self) -> None:
        """Give the parameters that were gathered, and their states, what became of them."""
        for members, place in self._places.items():
            _scatter(place.param, [member.param for member in members])
            for name, flat in place.state.items():
                _scatter(flat, [member.state[name] for member in members])


def _flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def _gather(tensors: list[Tensor], flat: Tensor) -> None:
    torch.cat([tensor.reshape(-1) for tensor in tensors], out=flat)


def _scatter(flat: Tensor, tensors: list[Tensor]) -> None:
    parts = flat.split([tensor.numel() for tensor in tensors])
    torch._foreach_copy_(tensors, [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)])
