"""Where shards lie: a folder of this machine, or one that fsspec knows by its URL (s3://, gs://, hf://, https://...)."""

from __future__ import annotations

import functools
import io
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple, TypeVar

from typing_extensions import Buffer, override

from data.folder import data_folder
from repopt.errors import UserError, one_line

T = TypeVar("T")

WAITS = (0.1, 0.3, 1.0, 3.0)  # seconds before another try; there is one try more than there are waits
_BUFFER = 2**20  # bytes of one request, where a shard of a store is read from its beginning to its end


class Entry(NamedTuple):
    """A file of a store: its size in bytes, and what differs when it is written anew (empty: not known)."""

    size: int
    stamp: str


class Range(NamedTuple):
    """Bytes of a file: from `start` to before `end`."""

    path: str
    start: int
    end: int


class Store:
    """A folder with shards.

    Reads from an object store are done several at once. One that fails is tried again, up to five times in all; then a
    UserError names the file, for the store is gone rather than an image. A process that is forked opens its own.

    Args:
        root: path or URL.

    Raises:
        UserError: the folder does not exist, or its URL is of no kind that fsspec can open here.
    """

    def __init__(self, root: str) -> None:
        self.is_remote = "://" in root or "::" in root
        self.root = root.rstrip("/") if self.is_remote else str(data_folder(root))
        self._opened: tuple[int, Any, str] | None = None  # by which process, fsspec's file system, its root

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_opened": None}

    def name(self, path: str) -> str:
        """Return what messages call a file."""
        return f"{self.root}/{path.lstrip('/')}"

    def files(self) -> dict[str, Entry]:
        """Return all files, at any depth but for hidden folders, by their path below the root, sorted."""
        if not self.is_remote:
            return dict(sorted(self._local_files()))
        files, root = self._file_system()
        found: dict[str, dict[str, Any]] = {}
        folders = [root]
        while folders:  # fsspec's `find` passes over folders that cannot be listed
            folder = folders.pop()
            for info in self._attempt(folder[len(root) :], functools.partial(files.ls, folder, detail=True)):
                path = info["name"].rstrip("/")
                if info["type"] == "directory" and path != folder and not PurePosixPath(path).name.startswith("."):
                    folders.append(path)
                elif info["type"] != "directory" and "?" not in path:  # which sorts a web server's list
                    found[path] = info
        sizes = {path: info.get("size") for path, info in found.items()}
        if unknown := [path for path, size in sizes.items() if size is None]:
            sizes |= zip(unknown, self._attempt("", lambda: files.sizes(unknown)), strict=True)
        stamps = ("ETag", "etag", "LastModified", "last_modified", "mtime", "updated", "blob_id")
        return {
            path[len(root) :].lstrip("/"): Entry(
                sizes[path] or 0, next((str(info[key]) for key in stamps if info.get(key)), "")
            )
            for path, info in sorted(found.items())
        }

    def _local_files(self) -> list[tuple[str, Entry]]:
        found = []
        for folder, below, names in os.walk(self.root, followlinks=True):
            below[:] = [name for name in below if not name.startswith(".")]
            for name in names:
                path = Path(folder, name)
                if path.is_file() and not name.startswith("."):
                    found.append((path.relative_to(self.root).as_posix(), _entry(path)))
        return found

    def read(self, ranges: Sequence[Range]) -> list[bytes | OSError]:
        """Return the bytes of each range, or why they cannot be read from this machine's disk."""
        return self._read_remote(ranges) if self.is_remote else [_read_local(self.root, wanted) for wanted in ranges]

    def read_one(self, wanted: Range) -> bytes:
        """Return the bytes of a range; OSError where they cannot be read from this machine's disk."""
        (data,) = self.read([wanted])
        if isinstance(data, OSError):
            raise data
        return data

    def open(self, path: str, size: int) -> BinaryIO:
        """Return a file, open to be read."""
        if not self.is_remote:
            return Path(self.root, path).open("rb")
        return io.BufferedReader(_RemoteFile(self, path, size), _BUFFER)

    def _read_remote(self, ranges: Sequence[Range]) -> list[bytes | OSError]:
        files, root = self._file_system()
        found: dict[Range, bytes] = {wanted: b"" for wanted in ranges if wanted.start == wanted.end}

        def read_missing() -> None:
            missing = [wanted for wanted in ranges if wanted not in found]
            paths, starts, ends = ([*values] for values in zip(*missing, strict=True))
            answers = files.cat_ranges([f"{root}/{path}" for path in paths], starts, ends, on_error="return")
            failure: Exception | None = None
            for wanted, answer in zip(missing, answers, strict=True):
                if isinstance(answer, Exception):
                    failure = answer
                elif len(answer) != wanted.end - wanted.start:
                    failure = OSError(f"{len(answer)} bytes came instead of {wanted.end - wanted.start}")
                else:
                    found[wanted] = answer
            if failure is not None:
                raise failure

        if len(found) < len({*ranges}):
            self._attempt(next(wanted.path for wanted in ranges if wanted not in found), read_missing)
        return [found[wanted] for wanted in ranges]

    def _file_system(self) -> tuple[Any, str]:
        """Return fsspec's file system of this process, and the root in it."""
        if self._opened is None or self._opened[0] != os.getpid():
            import fsspec

            try:
                files, root = fsspec.core.url_to_fs(self.root)
            except (ImportError, ValueError, OSError) as error:  # it says what to install, or which kinds there are
                raise UserError(f"cannot open {self.root!r}: {one_line(error)}") from None
            self._opened = os.getpid(), files, root.rstrip("/")
        return self._opened[1:]

    def _attempt(self, path: str, action: Callable[[], T]) -> T:
        """Return what an action does; only a library's requests run in it, which raises many kinds of errors."""
        for wait in (*WAITS, None):
            try:
                return action()
            except Exception as error:
                if wait is None:
                    tries = len(WAITS) + 1
                    raise UserError(
                        f"cannot read {self.name(path)!r}, tried {tries} times: {one_line(error)}"
                    ) from None
                time.sleep(wait)
        raise AssertionError


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Yield a file beside the path, which gets its name when it is whole; OSError where that is not allowed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".", dir=path.parent) as folder:
        yield Path(folder, path.name)
        Path(folder, path.name).replace(path)


def _entry(path: Path) -> Entry:
    status = path.stat()
    return Entry(status.st_size, str(status.st_mtime_ns))


def _read_local(root: str, wanted: Range) -> bytes | OSError:
    try:
        with open(os.path.join(root, wanted.path), "rb", buffering=0) as file:  # noqa: PTH118, PTH123  # once per image
            data = os.pread(file.fileno(), wanted.end - wanted.start, wanted.start)
    except OSError as error:
        return error
    if len(data) != wanted.end - wanted.start:
        return OSError("the shard ends within the image")
    return data


class _RemoteFile(io.RawIOBase):
    """A file of a store, read by ranges."""

    def __init__(self, store: Store, path: str, size: int) -> None:
        self._store, self._path, self._size, self._at = store, path, size, 0

    @override
    def readable(self) -> bool:
        return True

    @override
    def seekable(self) -> bool:
        return True

    @override
    def tell(self) -> int:
        return self._at

    @override
    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence])
        return self._at

    @override
    def readinto(self, buffer: Buffer) -> int:
        view = memoryview(buffer)
        count = max(0, min(len(view), self._size - self._at))
        view[:count] = self._store.read_one(Range(self._path, self._at, self._at + count))
        self._at += count
        return count
