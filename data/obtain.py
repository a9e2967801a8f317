"""Data sets that are fetched or made where they are absent."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path

import torch.distributed as dist

from repopt.errors import UserError, one_line

_MARKER = "version.txt"


def fetch(dataset: str, root: str, download: Callable[[], object]) -> str:
    """Call `download` in the first process of each node while the others wait.

    Returns what a message that the set is absent ends with: why it could not be downloaded, or nothing.

    Raises:
        UserError: no root was given.
    """
    if not root:
        raise UserError(f"{dataset} needs a folder to read from or download to: give --data-path")
    try:
        once_per_node(download)
    except (OSError, RuntimeError, HTTPException) as error:  # no network, no right to write, a broken download
        return f" and could not be downloaded: {one_line(error)}"
    return ""


def once_per_node(action: Callable[[], object]) -> None:
    """Call `action` in the first process of each node while the others wait."""
    try:
        if int(os.environ.get("LOCAL_RANK", "0")) == 0:
            action()
    finally:
        if dist.is_available() and dist.is_initialized():
            dist.barrier()


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
