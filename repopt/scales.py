"""Files of searched scales: a flat dict of 1-D tensors, as the published release writes and reads it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from repopt import checkpoint
from repopt.errors import UserError, shown
from repopt.reparam import invalid_reason


def load_scales(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Return searched scales by name, of a scale file, a hyper-search's checkpoint, or any that keeps its scales.

    From a hyper-search all 1-D floating tensors of its state dict are returned; a model picks its own among them.

    Returns:
        Tensors of the shape (O,), on the CPU, of the type that the file has: float32, float64, float16 or bfloat16.

    Raises:
        UserError: no such file, or none of these; a scale that is of another type or shape, or not finite.
    """
    return scales_of(checkpoint.read(path), path)


def scales_of(content: Mapping[str, Any], path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Return the searched scales of what `path` holds; see `load_scales`."""
    kept = content.get("scales")
    state = checkpoint.state_dict_of(content, "scales" if isinstance(kept, Mapping) and kept else "model")
    if any(value.dim() > 2 for value in state.values()):  # kernels: a whole state dict
        state = {name: value for name, value in state.items() if value.dim() == 1 and value.is_floating_point()}
    if not state:
        raise UserError(f"{os.fspath(path)!r} holds no searched scales")
    for name, value in state.items():
        if problem := invalid_reason(value):
            raise UserError(f"{os.fspath(path)!r} cannot give scales: {shown(name)} {problem}")
    return state


def save_scales(scales: Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
    """Write a scale file, which the published code reads too."""
    checkpoint.write({name: value.detach().cpu().clone() for name, value in scales.items()}, path)
