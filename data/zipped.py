"""Images in a zip: `<split>.zip` (or one zip with both splits) and `<split>_map.txt`, lines of path, tab, class index.

The zip is data: entries are read into memory, never extracted to files.
"""

from __future__ import annotations

import io
import logging
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.folder import data_folder
from data.types import DatasetInfo, EncodedImages
from repopt import archive
from repopt.errors import UserError, one_line, shown, unknown

logger = logging.getLogger("repopt")

CACHE_MODES = ("no", "full", "part")

_SPLIT_ZIPS = ("train.zip", "val.zip")
_CLASS_INDEX = re.compile("[0-9]{1,6}")
# More is an attack on the memory: of an encoded image, of a map file, of its lines, of unpacked to packed images.
_MAX_IMAGE_BYTES = 2**28
_MAX_MAP_BYTES = 2**30
_MAX_LINES = 2**25
_MAX_RATIO = 100
_SIZE = 2  # the column of an entry's unpacked size
Map = tuple[str, list[str], list[int]]
"""Of a map file what messages call it, and the names in the zip and class indices of its lines."""

_LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, lengths of the name and of the extra field that follow it


def describe(root: str, splits: Sequence[str]) -> DatasetInfo:
    """Read the map files: the number of classes is the greatest index + 1, and all splits' classes must be train's.

    Raises:
        UserError: a zip or map file is missing or malformed, or a split has classes that the first does not have.
    """
    maps = {split: _read_map(root, split, _find_zip(root, split)) for split in splits}
    (first, (reference, _, labels)), *others = maps.items()
    expected = set(labels)
    for _, (file, _, found) in others:
        if foreign := set(found) - expected:
            raise UserError(f"{file} has class {min(foreign)}, which {first} does not have ({reference})")
    return DatasetInfo(num_classes=max(expected) + 1, image_size=None, at_least=True)


class ZippedImages(EncodedImages):
    """The images of one split, in the order of its map file.

    A `zipfile.ZipFile` takes 10 s and 0.8 GB for ImageNet's entries, and each worker process would need its own. So it
    is read once, here, into arrays that workers share, whether forked or spawned, and an entry is read by its place.

    Args:
        root: the folder with the zip.
        split: 'train' or 'val'.
        num_classes: class indices must be below it.
        cache_mode: 'no' reads from the zip; 'full' holds every image's encoded bytes in memory; 'part' those of the
            images rank::world_size.
        rank: of this process.
        world_size: number of processes.

    Raises:
        UserError: a zip or map file is missing or malformed; an unknown cache mode.
    """

    def __init__(self, root: str, split: str, *, num_classes: int, cache_mode: str, rank: int, world_size: int) -> None:
        if cache_mode not in CACHE_MODES:
            raise unknown("cache mode", cache_mode, CACHE_MODES)
        self._path = _find_zip(root, split)
        map_file, listed, labels = _read_map(root, split, self._path)
        for line, label in enumerate(labels, 1):
            if label >= num_classes:
                raise UserError(f"{map_file}, line {line}: class index {label} is not below {num_classes}")
        self.labels = torch.tensor(labels)
        infos = _find_entries(self._path, split, map_file, listed)
        names = [info.filename.encode() for info in infos]
        # In one piece: an array of names would be as wide as the longest one.
        self._names, self._name_ends = b"".join(names), np.cumsum([len(name) for name in names])
        self._entries = np.array(
            [(i.header_offset, i.compress_size, i.file_size, i.CRC, i.compress_type) for i in infos], np.int64
        )
        self._file: io.FileIO | None = None
        count = len(infos)
        cached = {"no": range(0), "full": range(count), "part": range(rank, count, world_size)}
        self._fill_cache(cached[cache_mode])

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_file": None}  # another process opens its own

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int) -> bytes:
        """Return the encoded bytes of one image; OSError where they are not what the zip's directory says."""
        if index not in self._cached or index in self._unreadable:
            return self._read_entry(index)
        slot = self._cached.index(index)
        return self._cache[self._cache_starts[slot] : self._cache_starts[slot + 1]].numpy().tobytes()

    def name(self, index: int) -> str:
        """Return the zip and the path within."""
        start, end = self._name_ends[index - 1] if index else 0, self._name_ends[index]
        return f"{self._path}@/{self._names[start:end].decode()}"

    def _read_entry(self, index: int) -> bytes:
        at, packed, size, crc, method = self._entries[index].tolist()
        if self._file is None:
            self._file = io.FileIO(self._path)
        # Positional reads: forked processes share a descriptor's position.
        file = self._file.fileno()
        signature, *lengths = _LOCAL_HEADER.unpack(os.pread(file, _LOCAL_HEADER.size, at).ljust(_LOCAL_HEADER.size))
        data = os.pread(file, packed, at + _LOCAL_HEADER.size + sum(lengths))
        if signature != b"PK\3\4":
            raise OSError("the zip's directory points to no entry")
        if method == zipfile.ZIP_DEFLATED:
            try:
                data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, size + 1)
            except zlib.error as error:
                raise OSError(str(error)) from error
        if len(data) != size or zlib.crc32(data) != crc:
            raise OSError("size or checksum differs from the zip's directory")
        return data

    def _fill_cache(self, indices: range) -> None:
        """Read images into one buffer; those that cannot be read are asked for again when they are wanted."""
        self._cached, self._unreadable = indices, set[int]()
        self._cache_starts = np.cumsum([0, *self._entries[indices, _SIZE]])
        total = int(self._cache_starts[-1])
        try:
            self._cache = torch.empty(total, dtype=torch.uint8)
        except RuntimeError:
            raise UserError(f"{total / 1e9:.1f} GB of images do not fit in memory: set DATA.CACHE_MODE no") from None
        if indices:
            logger.info("reading %d images (%.1f GB) into memory", len(indices), total / 1e9)
        view = self._cache.numpy()
        for index, start, end in zip(indices, self._cache_starts, self._cache_starts[1:], strict=False):
            try:
                view[start:end] = np.frombuffer(self._read_entry(index), np.uint8)
            except OSError:
                self._unreadable.add(index)


def _find_entries(path: Path, split: str, map_file: str, names: list[str]) -> list[zipfile.ZipInfo]:
    """Return the zip's entry of every line of a map file."""
    with archive.open_zip(path) as zip_file:
        infos = {info.filename: info for info in zip_file.infolist()}
    found = []
    for line, name in enumerate(names, 1):
        info = infos.get(name) or infos.get(f"{split}/{name}")
        where = f"{map_file}, line {line}"
        if info is None or info.is_dir():
            raise UserError(f"{where}: no image {shown(name)} in {str(path)!r}")
        if reason := archive.invalid_reason(info):
            raise UserError(f"{where}: {shown(name)} {reason}")
        if info.file_size > _MAX_IMAGE_BYTES:
            raise UserError(f"{where}: {shown(name)} is no image, it has {info.file_size} bytes")
        found.append(info)
    unpacked, packed = sum(info.file_size for info in found), sum(info.compress_size for info in found)
    if unpacked > _MAX_RATIO * max(1, packed):
        raise UserError(f"{str(path)!r} is refused: its images unpack to {unpacked / 1e9:.1f} GB")
    return found


def _find_zip(root: str, split: str) -> Path:
    folder = data_folder(root)
    if (path := folder / f"{split}.zip").is_file():
        return path
    zips = [path for path in sorted(folder.glob("*.zip")) if path.name not in _SPLIT_ZIPS]
    if len(zips) != 1:
        raise UserError(f"neither {split}.zip nor one single zip with both splits in {root!r} ({len(zips)} other zips)")
    return zips[0]


def _read_map(root: str, split: str, path: Path) -> Map:
    """Return the map file beside the zip, or else the one in it."""
    beside = Path(root, f"{split}_map.txt")
    if beside.is_file():
        _check_map_size(str(beside), beside.stat().st_size)
        return _parse_map(str(beside), beside.read_bytes())
    with archive.open_zip(path) as zip_file:
        inside = [info for info in zip_file.infolist() if Path(info.filename).name == beside.name]
        if len(inside) != 1:
            raise UserError(f"no {beside.name} in {root!r} or in {path.name} (lines of: path, tab, class index)")
        name = f"{path}@/{shown(inside[0].filename)[1:-1]}"
        _check_map_size(name, inside[0].file_size)
        if reason := archive.invalid_reason(inside[0]):
            raise UserError(f"cannot read {name!r}: it {reason}")
        try:
            content = zip_file.read(inside[0])
        except archive.ERRORS as error:  # corrupt
            raise UserError(f"cannot read {name!r}: {one_line(error)}") from None
    return _parse_map(name, content)


def _check_map_size(file: str, size: int) -> None:
    if size > _MAX_MAP_BYTES:
        raise UserError(f"{file} is no map file: it has {size} bytes, and {_MAX_MAP_BYTES} are allowed")


def _parse_map(file: str, content: bytes) -> Map:
    names, labels = [], []
    if content.count(b"\n") > _MAX_LINES:
        raise UserError(f"{file} has more than {_MAX_LINES} lines")
    try:
        lines = content.decode().rstrip().splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 text: {one_line(error)}") from None
    for number, line in enumerate(lines, 1):
        name, tab, label = line.partition("\t")
        if not name or not tab or not _CLASS_INDEX.fullmatch(label):
            raise UserError(f"{file}, line {number}: expected path, tab, class index; found {shown(line)}")
        names.append(name.rpartition("@/")[2])  # some map files write 'train.zip@/n01440764/x.JPEG'
        labels.append(int(label))
    if not names:
        raise UserError(f"{file} is empty")
    return file, names, labels
