"""A file that knows whether it is whole: a zip archive (such as torch writes) that ends with its own SHA-256.

The digest stands in the comment that a zip archive may end with, so every reader of zip archives reads a sealed one,
and there is no second file that could go astray.
"""

from __future__ import annotations

import hashlib
import os
import struct
from typing import BinaryIO

_MARK = b"sha256:"
_COMMENT = len(_MARK) + 2 * hashlib.sha256().digest_size
_LENGTH = struct.Struct("<H")  # of the comment; the last field of the archive's end record
_RECORD = 22  # bytes of the end record, length of the comment included
_SIGNATURE = b"PK\5\6"
_BLOCK = 2**20


def seal(file: BinaryIO) -> None:
    """Append the digest to an archive without a comment, open for reading and writing.

    Raises:
        ValueError: the file does not end as such an archive does.
    """
    size = file.seek(0, os.SEEK_END)
    record = _tail(file, size, _RECORD)
    if not record.startswith(_SIGNATURE) or not record.endswith(_LENGTH.pack(0)):
        raise ValueError("only a zip archive without a comment can be sealed")
    digest = _digest(file, size - _LENGTH.size)
    file.seek(size - _LENGTH.size)
    file.write(_LENGTH.pack(_COMMENT) + _MARK + digest)


def is_broken(file: BinaryIO) -> bool:
    """Whether a file has a seal that is not its own; a file without a seal is not known to be broken."""
    size = file.seek(0, os.SEEK_END)
    tail = _tail(file, size, _RECORD + _COMMENT)
    record, comment = tail[:_RECORD], tail[_RECORD:]
    sealed = record.startswith(_SIGNATURE) and record.endswith(_LENGTH.pack(_COMMENT)) and comment.startswith(_MARK)
    return sealed and _digest(file, size - _COMMENT - _LENGTH.size) != comment.removeprefix(_MARK)


def _tail(file: BinaryIO, size: int, length: int) -> bytes:
    file.seek(max(0, size - length))
    return file.read(length)


def _digest(file: BinaryIO, length: int) -> bytes:
    """Of the first `length` bytes, in hexadecimal digits."""
    digest = hashlib.sha256()
    file.seek(0)
    while length > 0 and (block := file.read(min(_BLOCK, length))):
        digest.update(block)
        length -= len(block)
    return digest.hexdigest().encode()
