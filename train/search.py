"""The search of scales in a training: how far it has come, when it is over, and what looks wrong in it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from torch import Tensor, nn
from yacs.config import CfgNode

from repopt.blocks import declared_blocks, key_of
from repopt.scales import bind
from train.keys import AUTO

SETTLED = 0.2  # of the way since the start: scales that move less in an epoch have settled
MIN_WAY = 0.01  # of the scales: a search that moves them less has found nothing
DEAD = 0.01  # of its start: a branch none of whose scales is larger adds nothing
MAX_FALL = 10.0  # percentage points below the best score


def search_is_over(cfg: CfgNode, epoch: int, *, settled: bool) -> bool:
    """Return whether scales are constants after so many epochs.

    `auto` waits until they have settled, a tenth of the training at most.
    """
    epochs = cfg.TRAIN.SEARCH_EPOCHS
    if epochs == AUTO:
        return epoch > 0 and (settled or epoch >= cfg.TRAIN.EPOCHS // 10)
    return 0 < epochs <= epoch


def start_of_search(model: nn.Module) -> dict[str, Tensor]:
    """Return the scales at which a search of a model begins, by name; identity kernels are none."""
    initial = bind(model, source="initial").scales
    names = [key_of(path, b.scale) for path, module in declared_blocks(model) for b in module.block.branches if b.scale]
    return {name: initial[name] for name in names}


class Movement(NamedTuple):
    """How the scales of a search moved, in 2-norms over all of them.

    Attributes:
        way: from the values at which the search began, as a part of their norm.
        change: in the last epoch, as a part of the way; 1 in the first.
    """

    way: float
    change: float

    @property
    def settled(self) -> bool:
        """Return whether another epoch would hardly move them."""
        return self.change < SETTLED


def movement(start: Mapping[str, Tensor], before: Mapping[str, Tensor], now: Mapping[str, Tensor]) -> Movement:
    """Return how the scales that `start` names moved from there, and since an epoch before, where that was none."""
    way = _norm(now[name] - start[name] for name in start)
    change = _norm(now[name] - (before or start)[name] for name in start)
    return Movement(way / _norm(start.values()) if way else 0.0, change / way if way else 0.0)


def problems(
    start: Mapping[str, Tensor], now: Mapping[str, Tensor], *, fall: float | None, over: Movement | None
) -> Iterator[str]:
    """Yield what looks wrong, a line each.

    Args:
        start, now: the scales by name.
        fall: percentage points that the score is below the best so far; None without an evaluation.
        over: how the scales moved, where the search is over.
    """
    if dead := [name for name in start if now[name].abs().max() < DEAD * start[name].abs().max()]:
        yield f"{len(dead)} branches of the search are dead, their scales all near 0, the first {dead[0]!r}"
    if fall is not None and fall > MAX_FALL:
        yield (
            f"the score is {fall:.1f} points below the best: kernels move by the square of their scale, and scales are "
            "not decayed, so that a search with a high learning rate can throw itself out again; lower TRAIN.BASE_LR, "
            "or end it sooner"
        )
    if over is not None and over.way < MIN_WAY:
        yield (
            f"the search moved the scales by {over.way:.2%}: they are nearly those at which it began, which "
            "TRAIN.CONSTANTS initial gives without a search"
        )


def _norm(tensors: Iterable[Tensor]) -> float:
    return math.sqrt(sum(tensor.double().square().sum().item() for tensor in tensors))
