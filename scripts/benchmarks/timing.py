"""Contenders that take turns, so that what else the machine does meets them alike."""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import torch
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

Step = Callable[[], Any]
Name = TypeVar("Name", bound=Hashable)


class Rounds(NamedTuple):
    """How often contenders take turns.

    Attributes:
        most: rounds at most.
        seconds: after which none begins, but the first.
    """

    most: int
    seconds: float = math.inf

    def __str__(self) -> str:
        return f"{self.most} turns" if math.isinf(self.seconds) else f"{self.most} turns or {self.seconds:g} s"

    def some(self, divisor: int) -> Rounds:
        """Fewer, for what takes longer: at least 3."""
        return self._replace(most=max(3, self.most // divisor))

    def in_time(self, agreed: Callable[[bool], bool] = bool, *, hidden: bool | None = None) -> Iterator[int]:
        """The numbers of the rounds, as long as there is time.

        Args:
            agreed: makes of what this process says about going on what all of them do.
            hidden: whether no progress is shown; None: not where there is no terminal.
        """
        started = time.monotonic()
        for number in tqdm(range(self.most), desc="measuring", unit="round", disable=hidden, leave=False):
            if number and not agreed(time.monotonic() - started < self.seconds):
                return
            yield number


def interleave(
    contenders: Mapping[Name, Step], device: torch.device, *, rounds: Rounds, warm_up: int = 3, settle: bool = False
) -> dict[Name, float]:
    """Median seconds of each contender's step, by name. Arguments: as of `interleave_times`."""
    times = interleave_times(contenders, device, rounds=rounds, warm_up=warm_up, settle=settle)
    return {name: statistics.median(own) for name, own in times.items()}


def interleave_times(
    contenders: Mapping[Name, Step],
    device: torch.device,
    *,
    rounds: Rounds,
    warm_up: int = 3,
    settle: bool = False,
    before: Step = lambda: None,
    agreed: Callable[[bool], bool] = bool,
    bar: bool = True,
) -> dict[Name, list[float]]:
    """Seconds of each contender's step in every round, by name.

    All take turns in random order, round after round, for what ran before has its effect, too. The order is the same in
    every process.

    Args:
        contenders: what each does, by name.
        device: is waited for after every step.
        rounds: that are measured.
        warm_up: rounds before.
        settle: whether each does a step before the one that is measured, so that it finds caches as in a row of steps.
        before: is called before every step, outside its time (a barrier).
        agreed: as of `Rounds.in_time`.
        bar: whether a terminal shows progress.
    """
    hidden = None if bar else True  # None: where there is no terminal
    for step in tqdm(contenders.values(), desc="warm-up", disable=hidden, leave=False):
        for _ in range(warm_up):
            step()
    times: dict[Name, list[float]] = {name: [] for name in contenders}
    order = random.Random(0)
    for _ in rounds.in_time(agreed, hidden=hidden):
        for name in order.sample(list(contenders), len(contenders)):
            if settle:
                contenders[name]()
            before()
            times[name].append(timed(contenders[name], device))
    return times


def timed(step: Step, device: torch.device) -> float:
    """Seconds that a step takes, until the device is done with it."""
    synchronize(device)
    start = time.perf_counter()
    step()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    """Wait until a device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_extra(step: Step, device: torch.device) -> int:
    """Bytes that a step holds at its worst, beyond what was there before."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        step()
    held = peak = 0
    for event in sorted(seen.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak
