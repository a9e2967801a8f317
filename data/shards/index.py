"""Which image lies where in a shard. The index of a shard is made once, and kept beside it as <shard>.index.npz.

Where nothing can be written beside the shards (an object store, a folder of others), it is kept in this user's cache.
An index that others made is data: it is checked, and nothing in it is executed.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from tqdm import tqdm

from data.shards.store import Entry, Range, Store, written_whole
from repopt import archive
from repopt.errors import UserError, one_line

logger = logging.getLogger("repopt")

ENDING = ".index.npz"
MAX_IMAGE_BYTES = 2**28  # more is an attack on the memory
_VERSION = 1
_ALONE = np.empty((0, 3), np.int64)


@dataclass(frozen=True)
class ShardIndex:
    """The images of a shard, in their order.

    Attributes:
        labels: int64 [N].
        names: of the images, one after the other, uint8.
        name_ends: int64 [N], where each name ends.
        starts: int64 [N], where each image's bytes begin in the file; -1 where they lie in groups.
        ends: int64 [N], where they end.
        groups: int64 [G, 3], of images that can only be read together: the last one's number + 1, and where the group's
            bytes begin and end. Empty where every image can be read by itself.
        read_as: what was asked for when the index was made, such as the columns of a Parquet file.
    """

    labels: np.ndarray
    names: np.ndarray
    name_ends: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    groups: np.ndarray
    read_as: str

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, image: int) -> str:
        """Return the name of an image."""
        start = self.name_ends[image - 1] if image else 0
        return self.names[start : self.name_ends[image]].tobytes().decode(errors="replace")

    def check(self, size: int) -> None:
        """Raise a ValueError unless these can be the images of a shard of so many bytes."""
        count = len(self.labels)
        numbers = (self.labels, self.name_ends, self.starts, self.ends, self.groups)
        sound = (
            all(array.dtype == np.int64 for array in numbers)
            and self.names.dtype == np.uint8
            and self.groups.shape[1:] == (3,)
            and all(array.shape == (count,) for array in numbers[:4])
            and _rises(self.name_ends, 0, len(self.names))
            and (self._groups_are_sound(size) if len(self.groups) else self._places_are_sound(size))
        )
        if not sound:
            raise ValueError("this is no index of the shard")
        if not len(self.groups) and count and (self.ends - self.starts).max() > MAX_IMAGE_BYTES:
            raise ValueError(f"{self.name(int((self.ends - self.starts).argmax()))!r} is too large for an image")

    def _places_are_sound(self, size: int) -> bool:
        return bool(((self.starts >= 0) & (self.starts <= self.ends) & (self.ends <= size)).all())

    def _groups_are_sound(self, size: int) -> bool:
        last, starts, ends = self.groups.T
        return _rises(last, 0, len(self)) and bool(((starts >= 0) & (starts <= ends) & (ends <= size)).all())


def of_rows(
    names: list[bytes],
    labels: np.ndarray,
    starts: np.ndarray | None,
    ends: np.ndarray | None,
    *,
    groups: np.ndarray = _ALONE,
    read_as: str = "",
) -> ShardIndex:
    """Return the index of images in their order; without places of their own they lie in groups."""
    absent = np.full(len(names), -1, np.int64)
    return ShardIndex(
        labels.astype(np.int64),
        np.frombuffer(b"".join(names), np.uint8),
        np.cumsum([len(name) for name in names], dtype=np.int64),
        absent if starts is None else starts.astype(np.int64),
        absent if ends is None else ends.astype(np.int64),
        groups.astype(np.int64).reshape(-1, 3),
        read_as,
    )


def _rises(ends: np.ndarray, least: int, last: int) -> bool:
    """Return whether no end is before the one before it, and the last is the last."""
    return bool((np.diff(ends, prepend=least) >= 0).all() and (ends[-1] if len(ends) else least) == last)


def of_shards(
    store: Store,
    shards: Mapping[str, Entry],
    files: Mapping[str, Entry],
    make: Callable[[Store, str, int], ShardIndex],
    read_as: str = "",
) -> list[ShardIndex]:
    """Return the index of every shard; those that are missing are made, by all processes together, with progress.

    Args:
        store: where the shards lie.
        shards: their paths and what they are, in their order.
        files: all files of the store.
        make: reads a shard of so many bytes; what it cannot read is a ValueError, OSError or UserError.
        read_as: what an index must have been made for.

    Raises:
        UserError: a shard cannot be read as one.
    """
    found = _in_store(store, shards, files, read_as) if store.is_remote else {}
    for path, shard in shards.items():
        if path not in found and (index := _on_disk(store, path, shard, read_as)):
            found[path] = index
    if missing := [path for path in shards if path not in found]:
        logger.info("making the index of %d of %d shards in %r, once", len(missing), len(shards), store.root)
        rank, processes = (int(os.environ.get(key, default)) for key, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
        # Every process begins with others; when it is through with its own, others have made most of the rest.
        first = len(missing) * rank // processes
        for path in tqdm(missing[first:] + missing[:first], desc="index", unit="shard", leave=False, disable=None):
            by_others = _on_disk(store, path, shards[path], read_as) if processes > 1 else None
            found[path] = by_others or _made(store, path, shards[path], make)
    return [found[path] for path in shards]


def _in_store(
    store: Store, shards: Mapping[str, Entry], files: Mapping[str, Entry], read_as: str
) -> dict[str, ShardIndex]:
    """Return the indices that lie beside their shards in an object store."""
    ranges = {path: Range(path + ENDING, 0, files[path + ENDING].size) for path in shards if path + ENDING in files}
    contents = zip(ranges, store.read([*ranges.values()]), strict=True)
    parsed = {path: _parsed(path, content, shards[path], read_as) for path, content in contents}
    return {path: index for path, index in parsed.items() if index is not None}


def _on_disk(store: Store, path: str, shard: Entry, read_as: str) -> ShardIndex | None:
    """Return the index of a shard that this machine has, unless the shard is younger."""
    for place in _places(store, path, shard):
        if place.is_file() and (store.is_remote or place.stat().st_mtime_ns >= int(shard.stamp)):
            index = _parsed(path, place.read_bytes(), shard, read_as)
            if index is not None:
                return index
    return None


def _places(store: Store, path: str, shard: Entry) -> list[Path]:
    """Return where this machine may keep the index of a shard as it is now: beside it, or else in the user's cache."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "repopt", "shards")
    cached = folder / f"{hashlib.sha256(repr((store.name(path), *shard)).encode()).hexdigest()[:32]}{ENDING}"
    return [cached] if store.is_remote else [Path(store.root, path + ENDING), cached]


def _parsed(path: str, content: bytes | OSError, shard: Entry, read_as: str) -> ShardIndex | None:
    """Return an index; None for what is none, or that of another shard, which is made anew."""
    if isinstance(content, OSError):
        return None
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            kept: dict[str, Any] = {field.name: arrays[field.name] for field in fields(ShardIndex)}
            kept["read_as"] = str(kept["read_as"])
            found = [str(arrays[key]) for key in ("version", "shard", "size", "read_as")]
            if found != [str(_VERSION), PurePosixPath(path).name, str(shard.size), read_as]:
                return None
        index = ShardIndex(**kept)
        index.check(shard.size)
    except (*archive.ERRORS, KeyError, TypeError):
        return None
    return index


def _made(store: Store, path: str, shard: Entry, make: Callable[[Store, str, int], ShardIndex]) -> ShardIndex:
    try:
        index = make(store, path, shard.size)
        index.check(shard.size)
    except UserError:  # a ValueError too
        raise
    except (OSError, ValueError) as error:
        raise UserError(f"shard {store.name(path)!r} is damaged: {one_line(error)}; fetch or make it again") from None
    content = io.BytesIO()
    arrays = {field.name: getattr(index, field.name) for field in fields(index)}
    np.savez(content, version=_VERSION, shard=PurePosixPath(path).name, size=shard.size, **arrays)
    places = _places(store, path, shard)
    for place in places:
        try:
            with written_whole(place) as beside:
                beside.write_bytes(content.getvalue())
            return index
        except OSError:
            continue
    logger.warning("the index of %r cannot be kept, neither beside it nor in %r", store.name(path), str(places[-1]))
    return index
