"""Data sets that are made where they are absent, each in a folder of its own that is whole or not there."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from repopt.errors import UserError

_MARKER = "version.txt"


def make(root: Path, version: str, write: Callable[[Path], None]) -> None:
    """Make a data set, unless it is there.

    It is written beside and gets its name when it is whole, so that several processes may do it at once.

    Args:
        root: its folder.
        version: of the content, "name number": another one with every change of what is drawn or written.
        write: fills an empty folder with it.

    Raises:
        UserError: the folder holds something else, or the set in another version.
    """
    if stands(root, version):
        return
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{root.name}-", dir=root.parent) as beside:
        made = Path(beside, "made")
        made.mkdir()
        write(made)
        (made / _MARKER).write_text(f"{version}\n")
        try:
            made.rename(root)
        except OSError:
            if not stands(root, version):  # another process was faster
                raise


def stands(root: Path, version: str) -> bool:
    """Return whether the data set is in its folder, which may be absent or empty if not.

    Raises:
        UserError: the folder holds something else, or the set in another version.
    """
    marker = root / _MARKER
    if marker.is_file() and marker.read_bytes() == f"{version}\n".encode():
        return True
    if root.exists() and not (root.is_dir() and not any(root.iterdir())):
        raise UserError(f"{str(root)!r} holds other things than {version}: remove it, or name another folder")
    return False
