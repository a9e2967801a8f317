"""Data sets that are fetched where they are absent, once per node."""

from __future__ import annotations

import os
from collections.abc import Callable
from http.client import HTTPException

import torch.distributed as dist

from repopt.errors import UserError, one_line


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
