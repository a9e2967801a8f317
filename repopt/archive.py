"""Zip archives of others: opened only where the directory is one that a writer of zips makes; nothing is extracted."""

from __future__ import annotations

import os
import stat
import struct
import zipfile
import zlib
from collections import Counter

from repopt.errors import UserError, one_line, shown

# What opening or reading a damaged or hostile archive raises.
ERRORS = (
    zipfile.BadZipFile,
    zipfile.LargeZipFile,
    OSError,
    EOFError,
    ValueError,
    RuntimeError,
    OverflowError,
    MemoryError,
    struct.error,
    zlib.error,
)
MAX_RATIO = 1032  # of deflate: no entry unpacks to more than so many times its packed size
_HEADER = 30  # bytes before an entry's name
_UNREADABLE = 0x1 | 0x20 | 0x40  # flags: encrypted, a patch, strongly encrypted


def open_zip(path: str | os.PathLike[str]) -> zipfile.ZipFile:
    """Return a zip archive, open for reading.

    Raises:
        UserError: it is no zip, or two of its entries share a name or bytes (small files that unpack to large ones).
    """
    try:
        archive = zipfile.ZipFile(path)
    except ERRORS as error:
        raise UserError(f"cannot read {os.fspath(path)!r} as a zip: {one_line(error)}") from None
    try:
        _check_directory(archive)
    except UserError as error:
        archive.close()
        raise UserError(f"{os.fspath(path)!r} is refused: {error}") from None
    return archive


def invalid_reason(info: zipfile.ZipInfo) -> str | None:
    """Return why an entry is not read; None if it is a plain file, stored or deflated, of a size that can be true."""
    if info.is_dir():
        return "is a folder"
    if stat.S_ISLNK(info.external_attr >> 16):
        return "is a symbolic link"
    if info.flag_bits & _UNREADABLE or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return "is encrypted or compressed otherwise than by deflate"
    if info.compress_type == zipfile.ZIP_STORED and info.file_size != info.compress_size:
        return f"is stored in {info.compress_size} bytes and said to have {info.file_size}"
    if info.file_size > MAX_RATIO * info.compress_size:
        return f"cannot unpack from {info.compress_size} to {info.file_size} bytes"
    return None


def _check_directory(archive: zipfile.ZipFile) -> None:
    infos = archive.infolist()
    if len(archive.NameToInfo) < len(infos):
        twice, _ = Counter(info.filename for info in infos).most_common(1)[0]
        raise UserError(f"two of its entries are named {shown(twice)}")
    free = 0
    for info in sorted(infos, key=lambda info: info.header_offset):
        if info.header_offset < free:
            raise UserError(f"its entry {shown(info.filename)} shares bytes with another one")
        free = info.header_offset + _HEADER + info.compress_size
    if free > archive.start_dir:
        raise UserError("its last entry is longer than the file")
