"""What breaks the equivalence from outside, as far as it can be seen: a warning each."""

from __future__ import annotations

import functools
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from repopt.drawn import is_as_drawn
from repopt.errors import EquivalenceWarning, UserError
from repopt.optim.update import GRAD_SCALER_KEYS

_WATCHES: weakref.WeakSet[GradientWatch] = weakref.WeakSet()


class GradientWatch:
    """Sees what changes the gradients of re-parameterized kernels between the backward pass and the step.

    At the end of a backward pass it remembers the versions of their tensors, which every change in place counts up. So
    accumulation, and what DDP and FSDP2 do during the pass, are none. torch counts nothing where many DTensors are
    changed in one call, so that a clip of FSDP2's gradients is not seen.

    Args:
        names: of the kernels.
    """

    def __init__(self, names: Mapping[Tensor, str]) -> None:
        self._names = {param: name for param, name in names.items() if param.requires_grad and param.is_leaf}
        self._versions: dict[Tensor, tuple[int, int]] = {}  # identity and version of the gradient
        self._pass: int | None = None
        self._clipped = self._stepped = self._warned = False
        hook = _hook(weakref.ref(self))
        handles = [param.register_post_accumulate_grad_hook(hook) for param in self._names]
        weakref.finalize(self, _remove, handles)
        _WATCHES.add(self)

    def queue(self) -> None:
        """Have `remember` called at the end of the backward pass that is running."""
        running = torch._C._current_graph_task_id()
        if self._pass != running:
            self._pass = running
            # From the callback once more, since DDP queues its own, which writes gradients, at the pass's end.
            _at_end_of_pass(lambda: _at_end_of_pass(self.remember))

    def remember(self) -> None:
        """Take the gradients as they are for those of the backward pass."""
        self._clipped = False
        self._versions = {
            param: (id(gradient), gradient._version) for param in self._names if (gradient := param.grad) is not None
        }

    def follow_clip(self, params: Iterable[Tensor]) -> None:
        """Take gradients that have been clipped by the norm of the multi-branch network for right."""
        if not self._versions.keys().isdisjoint(params):
            self.remember()
            self._clipped = True

    def check(self, optimizer: torch.optim.Optimizer) -> None:
        """Warn, before a step, of kernels and gradients that are not those of the multi-branch network.

        Raises:
            UserError: the gradients were clipped by `repopt.clip_grad_norm_` while multiplied by the loss scale.
        """
        found_inf, grad_scale = (getattr(optimizer, key, None) for key in GRAD_SCALER_KEYS)
        versions, clipped = self._versions, self._clipped
        self._versions, self._clipped = {}, False
        if clipped and grad_scale is not None:
            raise UserError(
                "the gradients were clipped while they were multiplied by the loss scale, so far below the bound: give "
                "the optimizer the clip (max_norm= of build_optimizer), or call scaler.unscale_(optimizer) before it"
            )
        if not self._stepped:
            self._stepped = True
            self._warn_of_drawn_kernels()
        # A GradScaler writes them once, be it to unscale them or to look for overflows; unseen where it tells nothing.
        scaled = found_inf is not None or not getattr(optimizer, "_step_supports_amp_scaling", False)
        if not self._warned and _changed(versions, _versions_of_an_unscaling() if scaled else 0):
            self._warned = True
            warn(
                "gradients were changed in place between the backward pass and the step: clipped by their plain norm, "
                "say, which is not that of the multi-branch network; give the optimizer the clip (max_norm= of "
                "build_optimizer), or clip by repopt.clip_grad_norm_"
            )

    def _warn_of_drawn_kernels(self) -> None:
        drawn = [name for param, name in self._names.items() if is_as_drawn(param)]
        if drawn:
            warn(
                f"{drawn[0]!r} is as it was drawn by default, neither initialized by scales (repopt.initialize) nor "
                "loaded, so its training does not start where that of the multi-branch network does"
            )


def _changed(versions: Mapping[Tensor, tuple[int, int]], allowed: int) -> bool:
    """Return whether a parameter's gradient has been written to more often than allowed since its version was noted."""
    return any(
        (gradient := param.grad) is not None and id(gradient) == identity and gradient._version > version + allowed
        for param, (identity, version) in versions.items()
    )


def follow_clip(params: Sequence[Tensor]) -> None:
    """Tell every watch that gradients have been clipped as those of the multi-branch network are."""
    for watch in list(_WATCHES):
        watch.follow_clip(params)


def warn_of_kernels(params: Iterable[Tensor], key: str) -> None:
    """Warn of a group with kernels that is added to a RepOptimizer without saying what they are multiplied by."""
    if any(param.dim() > 2 for param in params):
        warn(
            f"a group with kernels was added without {key!r}, so they are updated plainly: the key belongs into the "
            "group, empty where there is nothing to re-parameterize"
        )


def warn(what: str) -> None:
    """Warn of something that breaks the equivalence, and say how to be silent."""
    silence = "warnings.simplefilter('ignore', repopt.EquivalenceWarning)"
    warnings.warn(f"{what} (where that is meant: {silence})", EquivalenceWarning, stacklevel=4)


@functools.cache
def _versions_of_an_unscaling() -> int:
    """Return by how many versions a GradScaler's writing counts a gradient up, which torch leaves open."""
    gradient, found_inf, inverse_scale = torch.zeros(3, 1, device="cpu", dtype=torch.float32).unbind()
    torch._amp_foreach_non_finite_check_and_unscale_([gradient], found_inf, inverse_scale)
    return gradient._version


def _at_end_of_pass(call: Callable[[], Any]) -> None:
    torch.autograd.Variable._execution_engine.queue_callback(call)


def _hook(own: weakref.ref[GradientWatch]) -> Callable[[Tensor], None]:
    """Return what a kernel calls when its gradient is there; it does not keep the watch alive."""

    def queue(_: Tensor) -> None:
        if not torch.compiler.is_compiling() and (watch := own()) is not None:  # compiled autograd takes no callbacks
            watch.queue()

    return queue


def _remove(handles: Iterable[Any]) -> None:
    for handle in handles:
        handle.remove()
