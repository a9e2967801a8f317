"""The folder of a run: one process writes to it, by a thread, and its newest whole checkpoint is resumed."""

from __future__ import annotations

import fcntl
import itertools
import os
import re
import shutil
import socket
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

from torch import Tensor

from repopt import checkpoint
from repopt.errors import UserError
from train.logging import logger


class RunFolder:
    """The files of a run.

    Args:
        path: of the folder, which exists.
        command: the command line of this start.
        keep: how many of the last checkpoints are kept: ``latest.pth``, ``latest_1.pth`` ...

    Attributes:
        path, command: as given.
        latest: path of the newest checkpoint.
    """

    def __init__(self, path: Path, command: str = "", *, keep: int = 2) -> None:
        self.path, self.command = path, command
        self.latest = path / "latest.pth"
        self._keep = keep
        self._lock: IO[str] | None = None
        self._thread = ThreadPoolExecutor(1, "checkpoint")  # the interpreter does not end before it has written
        self._writing: Future[None] | None = None

    def lock(self) -> None:
        """Be the one process that writes here, until it ends.

        Raises:
            UserError: another one is.
        """
        file = (self.path / ".lock").open("a+")
        try:
            # Data workers do not inherit it, so that it ends with this process, however that ends.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            holder = file.read(200).strip() or "unknown"
            file.close()
            raise UserError(
                f"another run ({holder}) writes to {str(self.path)!r}: wait for it, or give this one another --tag"
            ) from None
        except OSError as error:  # some network file systems have no locks
            logger.warning(f"{str(self.path)!r} cannot be locked ({error.strerror}): start no second run in it")
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        self._lock = file

    def newest(self) -> tuple[Path, dict[str, Any]] | None:
        """Return the newest checkpoint of the last ones that is whole, and its content; None where there are none.

        Damaged ones get another name, so that the next checkpoints do not push the whole ones out. Call it when locked.

        Raises:
            UserError: there are some, and none is whole.
        """
        damaged: list[tuple[Path, UserError]] = []
        pattern = re.compile(rf"{self.latest.stem}(?:_([0-9]+))?{re.escape(self.latest.suffix)}")
        found = {int(match[1] or 0): path for path in self.path.iterdir() if (match := pattern.fullmatch(path.name))}
        for _, path in sorted(found.items()):
            try:
                content = checkpoint.read(path)
            except UserError as error:
                damaged.append((path, error))
                continue
            for bad, reason in damaged:
                aside = bad.with_name(f"{bad.name}.damaged")
                bad.replace(aside)
                logger.warning(f"{reason}; it is {aside.name} now, and the one before it is used: {path.name}")
            return path, content
        if damaged:
            raise UserError(
                f"{damaged[0][1]}; no checkpoint of this run is whole: start with another --tag, anew or from another "
                "checkpoint (--resume)"
            )
        return None

    def save(self, content: Mapping[str, Any], names: Sequence[str] = ()) -> None:
        """Copy a checkpoint to the host's memory, and let the thread write it while training goes on.

        It becomes ``latest.pth``, and before it stands there, the same file has its other names. The one before is
        waited for. `wait` tells that it is written.

        Raises:
            UserError: the one before could not be written; what was saved before that is whole.
        """
        self.wait()

        def keep_others(written: Path) -> None:
            for name in names:
                link_or_copy(written, self.path / name)
            stem = self.latest.stem
            rotated = [self.latest, *(self.latest.with_stem(f"{stem}_{number}") for number in range(1, self._keep))]
            for newer, older in reversed(list(itertools.pairwise(rotated))):
                if newer.is_file():
                    link_or_copy(newer, older)

        self._writing = self._thread.submit(
            checkpoint.write, snapshot(content), self.latest, before_replacing=keep_others
        )

    def wait(self) -> None:
        """Return when what was saved is on the disk.

        Raises:
            UserError: it could not be written; what was saved before is whole.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()


def link_or_copy(file: Path, name: Path) -> None:
    """Make a file known by another name as well, at once: a hard link, or a copy where there are none."""
    if name.is_file() and name.samefile(file):
        return  # renaming one link over another would leave both
    temporary = name.with_name(f"{name.name}.writing")
    temporary.unlink(missing_ok=True)
    try:
        try:
            temporary.hardlink_to(file)
        except OSError:
            shutil.copyfile(file, temporary)
            with temporary.open("r+b") as copy:
                os.fsync(copy.fileno())
        temporary.replace(name)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def snapshot(value: Any) -> Any:
    """Return nested dicts, lists and tuples with a copy of every tensor in the host's memory."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key: snapshot(item) for key, item in value.items()}
    return type(value)(map(snapshot, value)) if isinstance(value, (list, tuple)) else value
