"""The folder of a run: one process writes to it, and its newest whole checkpoint is resumed."""

from __future__ import annotations

import fcntl
import os
import re
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from repopt import checkpoint
from repopt.errors import UserError
from train.logging import logger


class RunFolder:
    """The files of a run.

    Args:
        path: of the folder, which exists.
        keep: how many of the last checkpoints are kept: ``latest.pth``, ``latest_1.pth`` ...

    Attributes:
        path: of the folder.
    """

    def __init__(self, path: Path, *, keep: int = 2) -> None:
        self.path = path
        self.latest = path / "latest.pth"
        self._keep = keep
        self._lock: IO[str] | None = None

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

    def resumable(self) -> Path | None:
        """The newest checkpoint of the last ones that is whole, or None where there are none at all.

        Damaged ones get another name, so that the next checkpoints do not push the whole ones out. Call it when locked.

        Raises:
            UserError: there are some, and none is whole.
        """
        damaged = []
        pattern = re.compile(rf"{self.latest.stem}(?:_([0-9]+))?{re.escape(self.latest.suffix)}")
        found = {int(match[1] or 0): path for path in self.path.iterdir() if (match := pattern.fullmatch(path.name))}
        for _, path in sorted(found.items()):
            try:
                checkpoint.read(path)
            except UserError as error:
                damaged.append((path, error))
                continue
            for bad, error in damaged:
                aside = bad.with_name(f"{bad.name}.damaged")
                bad.replace(aside)
                logger.warning(f"{error}; it is {aside.name} now, and the one before it is used: {path.name}")
            return path
        if damaged:
            raise UserError(
                f"{damaged[0][1]}; no checkpoint of this run is whole: start with another --tag, anew or from another "
                "checkpoint (--resume)"
            )
        return None

    def save(self, content: Mapping[str, Any], names: Sequence[str] = ()) -> None:
        """Write ``latest.pth``, and before it stands there, the same file under more names.

        Raises:
            UserError: it cannot be written; what was saved before is whole.
        """
        checkpoint.write(content, self.latest, also=[self.path / name for name in names], keep=self._keep)
