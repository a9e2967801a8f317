"""Workers as processes, which the product has, against threads: speed, the first batch, and memory."""

from __future__ import annotations

import collections
import functools
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

import data
from benchmarks.report import Row
from benchmarks.timing import Rounds, Step, interleave
from data.classification import ClassificationDataset
from data.decoded import collate, raise_on_bad
from data.transforms import train_transform
from data.types import EncodedImages

PIPELINES = {"weak": "weak", "raug15": "raug15", "timm's": None}  # name: the preset

Epoch = list[list[tuple[int, int]]]  # batches of (epoch, index)

_join = functools.partial(collate, on_bad=raise_on_bad)


def augmented(images: EncodedImages, preset: str | None, image_size: int) -> ClassificationDataset:
    """Return the data set that a worker decodes and augments."""
    return ClassificationDataset(images, train_transform(data.Augmentation(preset=preset), image_size, "bilinear"), 0)


class Threads:
    """Batches from threads; what these draw comes from generators that they share, unlike what the product promises."""

    def __init__(self, dataset: ClassificationDataset, epoch: Epoch, count: int) -> None:
        self.dataset, self.epoch, self.count = dataset, epoch, count
        self.pool = ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,))

    def _batch(self, items: list[tuple[int, int]]) -> Any:
        return _join(self.dataset.__getitems__(items))

    def __iter__(self) -> Iterator[Any]:
        ahead: collections.deque[Future] = collections.deque()
        for batch in self.epoch:
            ahead.append(self.pool.submit(self._batch, batch))
            if len(ahead) > 2 * self.count:  # as many as a DataLoader has
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


def processes(dataset: ClassificationDataset, epoch: Epoch, count: int) -> DataLoader:
    """Return batches from worker processes."""
    how: dict[str, Any] = {"collate_fn": _join, "persistent_workers": True}
    return DataLoader(dataset, batch_sampler=epoch, num_workers=count, **how)  # type: ignore[arg-type]


def workers(images: EncodedImages, batch_size: int, image_size: int, rounds: Rounds) -> list[Row]:
    """Return rows of uint8 batches of every pipeline from one and two workers of each kind.

    The last column is Amdahl's: of S, the speed of two over that of one, 2 / S - 1 of the time is not shared.
    """
    epoch = [[(0, i) for i in batch.tolist()] for batch in torch.arange(len(images.labels)).split(batch_size)]
    epochs: dict[tuple[str, str, int], Step] = {}
    starts = {}
    for name, preset in PIPELINES.items():
        kinds: dict[str, Callable[..., DataLoader | Threads]] = {"processes": processes, "threads": Threads}
        for kind, make in kinds.items():
            for count in range(1, min(2, os.cpu_count() or 1) + 1):
                loader = make(augmented(images, preset, image_size), epoch, count)
                key = name, kind, count
                starts[key], epochs[key] = started(loader), functools.partial(_pass, loader)
    seconds = interleave(epochs, torch.device("cpu"), rounds=rounds.some(4), warm_up=1)
    rows: list[Row] = []
    for (name, kind, count), own in seconds.items():
        speedup = seconds[name, kind, 1] / own
        first, memory = starts[name, kind, count]
        rows.append(
            {
                "pipeline": name,
                "workers": kind,
                "number": count,
                "images/s": len(images.labels) / own,
                "efficiency": speedup / count,
                "first batch, ms": 1e3 * first,
                "MB a worker": None if memory is None else memory / count / 1e6,
                "not shared (calculated)": 2 / speedup - 1 if count == 2 else None,
            }
        )
    return rows


def started(loader: DataLoader | Threads) -> tuple[float, int | None]:
    """Return the seconds until the first batch, and the bytes of memory that workers add in an epoch."""
    before, start = memory(), time.perf_counter()
    batches = iter(loader)
    next(batches)
    seconds = time.perf_counter() - start
    for _ in batches:
        pass
    after = memory()
    return seconds, None if before is None or after is None else max(0, after - before)


def _pass(loader: DataLoader | Threads) -> None:
    for _ in loader:
        pass


def memory() -> int | None:
    """Return the bytes of this process and its children, shared pages counted once (PSS); None where it is not told."""
    if not Path("/proc/self/smaps_rollup").exists():
        return None
    found = 0
    for pid in (os.getpid(), *(child.pid for child in multiprocessing.active_children())):
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        found += 1024 * next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return found
