"""WebDataset's form: tars whose files of one key are one sample, an image and its class as a number.

A key is a path up to the first point of its last part: `n01440764/10026.jpg` and `n01440764/10026.cls` are one sample.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import BinaryIO

import numpy as np
from torchvision.datasets.folder import IMG_EXTENSIONS

from data.shards import index
from data.shards.index import ShardIndex
from data.shards.store import Entry, Range, Store
from repopt.errors import UserError, one_line, shown

ENDING = ".tar"
CLASSES = "classes.txt"

_LABELS = (
    "cls",
    "cls.txt",
    "label",
    "label.txt",
    "json",
)  # endings of what holds a sample's class, the first that is there
_LABEL_KEYS = ("label", "cls")  # in json
_MAX_LABEL_BYTES = 2**20


def read_index(store: Store, path: str, size: int) -> ShardIndex:
    """Return the index of a tar.

    Raises:
        ValueError, OSError: it is damaged.
        UserError: an image has no class, or a sample has two images.
    """
    samples: dict[str, dict[str, tarfile.TarInfo]] = {}
    images: dict[str, tarfile.TarInfo] = {}
    labels: list[int] = []
    with store.open(path, size) as file:
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for member in tar:
                    if not member.isreg() or PurePosixPath(member.name).name.startswith("."):
                        continue  # what is hidden, as beside pictures of a Mac
                    key, ending = _split(member.name)
                    if f".{ending.rpartition('.')[2]}" not in IMG_EXTENSIONS:
                        samples.setdefault(key, {})[ending] = member
                    elif key in images:
                        raise UserError(f"{store.name(path)!r} has two images of the sample {shown(key)}")
                    else:
                        images[key] = member
                _check_end(tar, file.seek(0, 2))
            for key in images:
                labels.append(_label(file, samples.get(key, {}), f"the sample {shown(key)} in {store.name(path)!r}"))
        except tarfile.TarError as error:
            raise ValueError(f"it is no tar, or ends early ({error})") from None
    members = [*images.values()]
    starts = np.array([member.offset_data for member in members], np.int64)
    sizes = np.array([member.size for member in members], np.int64)
    names = [member.name.encode(errors="replace") for member in members]
    return index.of_rows(names, np.array(labels, np.int64), starts, starts + sizes)


def _split(name: str) -> tuple[str, str]:
    """Return the key of a file's sample and the file's ending, in small letters."""
    path = PurePosixPath(name)
    stem, _, ending = path.name.partition(".")
    return str(path.with_name(stem)), ending.lower()


def _check_end(tar: tarfile.TarFile, size: int) -> None:
    """Raise a ValueError where tarfile ended at something that is no end, which it passes over in silence."""
    if tar.offset > size:
        raise ValueError(f"it has {size} bytes, and its last file would end at {tar.offset}")
    assert tar.fileobj is not None
    tar.fileobj.seek(tar.offset)
    if any(tar.fileobj.read(tarfile.BLOCKSIZE)):
        raise ValueError(f"there is no file's header at byte {tar.offset}")


def _label(file: BinaryIO, files: Mapping[str, tarfile.TarInfo], where: str) -> int:
    ending = next((ending for ending in _LABELS if ending in files), None)
    if ending is None:
        raise UserError(f"{where} has no class: expected one of .{', .'.join(_LABELS)} beside its image")
    member = files[ending]
    if member.size > _MAX_LABEL_BYTES:
        raise UserError(f"the .{ending} of {where} has {member.size} bytes")
    file.seek(member.offset_data)
    content = file.read(member.size)
    try:
        found = json.loads(content) if ending == "json" else int(content)
        if isinstance(found, dict):
            found = next(found[key] for key in _LABEL_KEYS if key in found)
        if type(found) is not int:
            raise ValueError
    except (ValueError, StopIteration, RecursionError):
        raise UserError(f"the .{ending} of {where} holds no number of a class: {shown(content[:100])}") from None
    return found


def class_names(store: Store, files: Mapping[str, Entry], shards: Mapping[str, Entry]) -> tuple[str, ...]:
    """Return the names in classes.txt, one a line, by their number; none where there is no such file.

    Raises:
        UserError: it cannot be read.
    """
    if CLASSES not in files:
        return ()
    try:
        content = store.read_one(Range(CLASSES, 0, files[CLASSES].size))
    except OSError as error:
        raise UserError(f"cannot read {store.name(CLASSES)!r}: {one_line(error)}") from None
    return tuple(content.decode(errors="replace").splitlines())
