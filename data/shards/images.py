"""The images of a split in shards, any one at any time."""

from __future__ import annotations

import functools
import itertools
import logging
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import torch
from typing_extensions import override

from data.folder import OTHER_NAMES
from data.sampler import LANES, Blocks
from data.shards import index, parquet, tar
from data.shards.index import ShardIndex
from data.shards.store import Entry, Range, Store
from data.types import DatasetInfo, EncodedImages, Source
from repopt.errors import UserError, shown, unknown

logger = logging.getLogger("repopt")

SHUFFLES = ("auto", "global", "blocks")

_BLOCK_BYTES = 2**23  # of images that are read together, where each could be read by itself
_HELD_BYTES = 2**29  # of the blocks that an order by blocks mixes
_WINDOW = 8  # blocks of a lane that it mixes at most


@dataclass(frozen=True)
class Form:
    """A form of shards.

    Attributes:
        ending: of their names.
        read_index: store, path, size -> the index of a shard.
        class_names: store, all files, shards -> the names of the classes; empty where they have none.
        read_as: `ShardIndex.read_as` of these indices.
        image: name of the column of images, where there are columns.
    """

    ending: str
    read_index: Callable[[Store, str, int], ShardIndex]
    class_names: Callable[[Store, Mapping[str, Entry], Mapping[str, Entry]], tuple[str, ...]]
    read_as: str = ""
    image: str = ""


def form_of(source: Source) -> Form:
    """Return the form of a source's shards."""
    if source.dataset == "wds":
        return Form(tar.ENDING, tar.read_index, tar.class_names)
    image, label = source.columns
    return Form(
        parquet.ENDING,
        functools.partial(parquet.read_index, image=image, label=label),
        lambda store, files, shards: parquet.class_names(store, shards, label=label),
        parquet.read_as_columns(image, label),
        image,
    )


def describe(source: Source, splits: Sequence[str]) -> DatasetInfo:
    """Return the classes: `Source.classes`, else the names that the shards have, else as many as occur.

    Raises:
        UserError: shards are missing or damaged, or one split has classes that the first does not have.
    """
    found = {split: _Split(source, split) for split in splits}
    (first, reference), *others = found.items()
    if reference.classes:
        return DatasetInfo(num_classes=len(reference.classes), image_size=None, classes=reference.classes)
    expected = {*reference.labels.tolist()}
    for split, other in others:
        if foreign := {*other.labels.tolist()} - expected:
            raise UserError(f"the shards of {split} in {source.root!r} have class {min(foreign)}, which {first}'s lack")
    return DatasetInfo(num_classes=max(expected) + 1, image_size=None, at_least=True)


def open_split(source: Source, split: str, num_classes: int, rank: int, world_size: int) -> ShardedImages:
    """Return the images of one split, in the order in which they lie.

    Args:
        source: where they are.
        split: 'train' or 'val'.
        num_classes: class indices must be below it.
        rank: of this process.
        world_size: number of processes.

    Raises:
        UserError: as `describe`; an order that the shards do not allow.
    """
    if source.shuffle not in SHUFFLES:
        raise unknown("order (DATA.SHUFFLE)", source.shuffle, SHUFFLES)
    found = _Split(source, split)
    together = next((path for path, of in zip(found.shards, found.indices, strict=True) if len(of.groups)), None)
    if together is None and source.shuffle != "blocks":
        return ShardedImages(found, num_classes)
    if together is not None and source.shuffle == "global":
        raise UserError(
            f"DATA.SHUFFLE global reads images one by one, and those in {found.store.name(together)!r} are compressed "
            "together, or in a store without their index: DATA.SHUFFLE blocks, or shards of scripts/make_shards.py"
        )
    images = BlockedImages(found, num_classes, world_size)
    if split == "train":
        _warn_of_order(images)
    return images


def _warn_of_order(images: BlockedImages) -> None:
    """Say where the images of a block are of one class, so that an order by blocks mixes few."""
    same = (images.labels[1:] == images.labels[:-1]).double().mean()
    expected = (images.labels.bincount().double() / len(images)).square().sum()
    if len(images) > 1 and same > (1 + expected) / 2:
        logger.warning(
            "the shards are sorted by class, and are read by blocks (DATA.SHUFFLE): a batch will have images of few "
            "classes. Better: scripts/make_shards.py --shuffle"
        )


class _Split:
    """The shards of a split.

    Attributes:
        store: where they lie.
        form: of the shards.
        shards: their paths and sizes, in the order of their paths.
        indices: of each.
        classes: names of the classes, by index.
        labels: int64 [N], of all images.
    """

    def __init__(self, source: Source, split: str) -> None:
        self.store, self.form = Store(source.root), form_of(source)
        files = self.store.files()
        self.shards = _shards_of(files, self.form.ending, split, source.root)
        self.indices = index.of_shards(self.store, self.shards, files, self.form.read_index, self.form.read_as)
        names = self.form.class_names(self.store, files, self.shards)
        self.classes = (source.classes or names) if names else ()
        self.labels = np.concatenate([of_shard.labels for of_shard in self.indices])
        if not len(self.labels):
            raise UserError(f"the shards of {split} in {source.root!r} have no images")
        for path, of_shard in zip(self.shards, self.indices, strict=True):
            wrong = (of_shard.labels < 0) | (of_shard.labels >= (len(names) or np.inf))
            if wrong.any():
                image = int(wrong.argmax())
                raise UserError(
                    f"{of_shard.name(image)!r} in {self.store.name(path)!r} has the class {of_shard.labels[image]}, "
                    + (f"and there are {len(names)} names of classes" if names else "which is none")
                )
        if names and source.classes:
            if foreign := sorted({*names} - {*source.classes}):
                raise UserError(
                    f"the shards in {source.root!r} have a class {shown(foreign[0])}, which is no class of those that "
                    f"the network was trained on ({len(foreign)} of {len(names)} are none)"
                )
            self.labels = np.array([source.classes.index(name) for name in names], np.int64)[self.labels]


def _shards_of(files: Mapping[str, Entry], ending: str, split: str, root: str) -> dict[str, Entry]:
    """Return the shards of a split: a folder or the file's name says which it is, by a word of `OTHER_NAMES`."""
    shards = {path: _split_word(path) for path in files if path.endswith(ending)}
    for word in OTHER_NAMES[split]:
        if chosen := {path: files[path] for path, found in shards.items() if found == word}:
            return chosen
    others = ", ".join(sorted({word for word in shards.values() if word}))
    packed = next((path for path in files if re.search(rf"{ending}\.\w+$|\.tgz$", path) and ending == tar.ENDING), None)
    hint = f"; {packed!r} has to be unpacked: there is no way into the middle of it" if packed else ""
    raise UserError(
        f"no shards of {split!r} in {root!r}: expected files such as {split}-00000{ending} or {split}/00000{ending}, "
        f"and there are {len(shards)} of {ending}{f' of {others}' if others else ''}{hint}"
    )


def _split_word(path: str) -> str | None:
    """Return the first word for a split in a file's name, or else in the name of the folder nearest to it."""
    known = {word for words in OTHER_NAMES.values() for word in words}
    parts = [PurePosixPath(path).name, *(parent.name for parent in PurePosixPath(path).parents)]
    words = itertools.chain.from_iterable(re.findall("[a-z]+", part.lower()) for part in parts)
    return next((word for word in words if word in known), None)


class ShardedImages(EncodedImages):
    """The images of a split in shards, each read by itself.

    A process (each of a loader's workers is one) holds the encoded images of one batch.

    Raises:
        UserError: a class index is too large.
    """

    _capacity = 0  # pieces that are held beyond those of a batch; here a piece is an image

    def __init__(self, split: _Split, num_classes: int) -> None:
        if split.labels.max() >= num_classes:
            raise UserError(f"{split.store.root!r} has class index {split.labels.max()}, not below {num_classes}")
        self.labels = torch.from_numpy(split.labels)
        self._store, self._indices = split.store, split.indices
        self._shards = [(path, entry.size) for path, entry in split.shards.items()]
        self._shard_ends = np.cumsum([len(of_shard) for of_shard in split.indices])
        self._held: OrderedDict[int, list[bytes | OSError]] = OrderedDict()  # by piece, the last used last

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_held": OrderedDict()}

    @override
    def __len__(self) -> int:
        return len(self.labels)

    @override
    def name(self, index: int) -> str:
        shard, own = self._place_of(index)
        return f"{self._store.name(self._shards[shard][0])}@/{self._indices[shard].name(own)}"

    @override
    def read(self, index: int) -> bytes:
        piece = self._piece_of(index)
        if piece not in self._held:
            self.prefetch([index])
        found = self._held[piece][index - self._first_of(piece)]
        if isinstance(found, OSError):
            raise OSError(str(found))
        return found

    @override
    def prefetch(self, indices: Sequence[int]) -> None:
        wanted = dict.fromkeys(self._piece_of(index) for index in indices)
        missing = [piece for piece in wanted if piece not in self._held]
        for piece in wanted.keys() - {*missing}:
            self._held.move_to_end(piece)
        while self._held and len(self._held) + len(missing) > max(self._capacity, len(wanted)):
            self._held.popitem(last=False)
        contents = self._store.read([self._range_of(piece) for piece in missing])
        for piece, content in zip(missing, contents, strict=True):
            self._held[piece] = self._unpacked(piece, content)

    def _place_of(self, index: int) -> tuple[int, int]:
        """Return the shard of an image and its number in it."""
        shard = int(self._shard_ends.searchsorted(index, side="right"))
        return shard, index - int(self._shard_ends[shard]) + len(self._indices[shard])

    def _piece_of(self, index: int) -> int:
        """Return the number of the piece that is read for an image."""
        return index

    def _first_of(self, piece: int) -> int:
        """Return the number of the first image of a piece."""
        return piece

    def _range_of(self, piece: int) -> Range:
        """Return where the bytes of a piece lie."""
        shard, own = self._place_of(piece)
        found = self._indices[shard]
        return Range(self._shards[shard][0], int(found.starts[own]), int(found.ends[own]))

    def _unpacked(self, piece: int, content: bytes | OSError) -> list[bytes | OSError]:
        """Return the images of a piece."""
        return [content]


class BlockedImages(ShardedImages):
    """The same, read with those that lie beside them: row groups, or some megabytes.

    A process holds as many blocks as the order by blocks mixes in its share of the images (`Blocks.held`): where there
    is one process, 80 of up to 8 MB; of larger row groups fewer, 24 at least.

    Args:
        split: whose images.
        num_classes: class indices must be below it.
        world_size: number of processes that share the images.
    """

    def __init__(self, split: _Split, num_classes: int, world_size: int) -> None:
        super().__init__(split, num_classes)
        self._groups = parquet.Groups(split.store, split.form.image)
        # Of each block: its last image's number + 1, its shard, where its bytes begin and end, its row group or -1.
        self._table = np.concatenate([self._blocks_of(shard) for shard in range(len(self._indices))])
        largest = int((self._table[:, 3] - self._table[:, 2]).max())
        window = min(_WINDOW, max(1, _HELD_BYTES // (LANES * max(1, largest))))
        self.blocks = Blocks(torch.from_numpy(self._table[:, 0].copy()), window)
        self._capacity = self.blocks.held(world_size)

    def _blocks_of(self, shard: int) -> np.ndarray:
        index, last = self._indices[shard], int(self._shard_ends[shard])
        if len(index.groups):
            ends, starts, stops = index.groups.T
            numbers = np.arange(len(ends))
        else:
            ends = np.flatnonzero(np.diff(index.starts // _BLOCK_BYTES, append=-1)) + 1
            first = np.concatenate([[0], ends[:-1]])
            starts, stops = np.minimum.reduceat(index.starts, first), np.maximum.reduceat(index.ends, first)
            numbers = np.full(len(ends), -1)
        table = np.stack([last - len(index) + ends, np.full(len(ends), shard), starts, stops, numbers], 1)
        return table[np.diff(ends, prepend=0) > 0]  # row groups may be empty

    @override
    def _piece_of(self, index: int) -> int:
        return int(self._table[:, 0].searchsorted(index, side="right"))

    @override
    def _first_of(self, piece: int) -> int:
        return int(self._table[piece - 1, 0]) if piece else 0

    @override
    def _range_of(self, piece: int) -> Range:
        _, shard, start, end, _ = self._table[piece].tolist()
        return Range(self._shards[shard][0], start, end)

    @override
    def _unpacked(self, piece: int, content: bytes | OSError) -> list[bytes | OSError]:
        last, shard, start, _, group = self._table[piece].tolist()
        count, first = last - self._first_of(piece), self._place_of(self._first_of(piece))[1]
        if isinstance(content, OSError):
            return [content] * count
        if group >= 0:
            try:
                images = self._groups.images(*self._shards[shard], group=group, start=start, content=content)
            except OSError as error:
                return [error] * count
            return images if len(images) == count else [OSError(f"row group {group} has not {count} rows")] * count
        index = self._indices[shard]
        places = zip(
            index.starts[first : first + count].tolist(), index.ends[first : first + count].tolist(), strict=True
        )
        return [content[one - start : other - start] for one, other in places]
