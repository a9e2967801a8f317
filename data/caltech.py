"""Caltech-256 as torchvision unpacks (and downloads) it: `<root>/caltech256/256_ObjectCategories/<class>/*.jpg`.

257 classes with the clutter, whose folders' sorted names give their indices. There is no official split. Ours is the
common protocol of 60 training images per class, here the first in the order of their names' hashes, so the same on
every machine; all others are for testing. Which split the published searches used (arXiv 2205.15242) is not said.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from data.folder import Files, class_folders
from data.obtain import fetch
from repopt.errors import UserError, shown

NUM_CLASSES = 257
TRAIN_PER_CLASS = 60


def open_split(root: str, split: str) -> Files:
    """Return the images of 'train' or 'val', class by class, sorted by name.

    A set that is absent from `root` is downloaded into it, by the first process of each node while the others wait.

    Raises:
        UserError: no root was given; the set is neither there nor to be had; it is not whole; a name that is no text.
    """
    from torchvision.datasets import Caltech256

    folder = Path(root, "caltech256", "256_ObjectCategories")
    # An absolute path, in which torchvision expands no ~.
    absent = fetch("caltech256", root, lambda: folder.is_dir() or Caltech256(str(Path(root).absolute()), download=True))
    if absent or not folder.is_dir():
        raise UserError(f"Caltech-256 is not in {root!r}{absent}")
    classes = [name for name in class_folders(folder) if not name.startswith(".")]
    if len(classes) != NUM_CLASSES:
        raise UserError(
            f"{str(folder)!r} has {len(classes)} class folders, not {NUM_CLASSES}: if its unpacking was interrupted, "
            "remove it and it is unpacked again"
        )
    shares = [_share(folder / name, split) for name in classes]
    labels = [label for label, share in enumerate(shares) for _ in share]
    return Files(folder, [path for share in shares for path in share], labels)


def _share(folder: Path, split: str) -> list[str]:
    """Return the paths of a class's images of one split, sorted."""
    from torchvision.datasets.folder import is_image_file

    names = [
        path.name  # not of other files and folders, which some have
        for path in folder.iterdir()
        if is_image_file(path.name) and not path.name.startswith(".") and path.is_file()
    ]
    if unreadable := [name for name in names if not name.isprintable()]:
        raise UserError(f"{shown(str(folder))} has an image whose name is no text: {shown(min(unreadable))}")
    if len(names) <= TRAIN_PER_CLASS:
        raise UserError(
            f"{shown(str(folder))} has {len(names)} images, not more than training takes ({TRAIN_PER_CLASS})"
        )
    shuffled = sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())
    share = {"train": shuffled[:TRAIN_PER_CLASS], "val": shuffled[TRAIN_PER_CLASS:]}[split]
    return [str(folder / name) for name in sorted(share)]
