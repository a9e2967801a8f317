"""Kernels that are as they were drawn by default: neither initialized by scales, nor loaded, nor trained."""

from __future__ import annotations

from torch import Tensor

_AS_DRAWN = "repopt_as_drawn"  # attribute of a kernel: identity, since copies have it too, and version


def mark_drawn(kernel: Tensor) -> None:
    """Note that a kernel has just been drawn."""
    if not kernel.is_inference():
        setattr(kernel, _AS_DRAWN, (id(kernel), kernel._version))


def is_as_drawn(kernel: Tensor) -> bool:
    """Return whether nothing has written to a kernel since `mark_drawn`."""
    return getattr(kernel, _AS_DRAWN, None) == (id(kernel), kernel._version)
