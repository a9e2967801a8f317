"""Images in class folders: `<root>/train/<class>/...` and `<root>/val/<class>/...`, as ImageNet is usually unpacked."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from data.types import DatasetInfo
from repopt.errors import UserError

OTHER_NAMES = {"train": ("training",), "val": ("valid", "validation", "test")}  # that people give the splits


def describe(root: str, splits: Sequence[str]) -> DatasetInfo:
    """Count the class folders, which must be the same in all `splits`.

    Raises:
        UserError: a folder is missing or has no class folders, or the splits' classes differ.
    """
    classes = {split: find_classes(root, split) for split in splits}
    (first, expected), *others = classes.items()
    for split, found in others:
        if differing := sorted(set(expected) ^ set(found)):
            raise UserError(
                f"{first}/ and {split}/ in {root!r} have different classes ({len(expected)} and {len(found)}; "
                f"{differing[0]!r} is in one only)"
            )
    return DatasetInfo(num_classes=len(expected), image_size=None, classes=tuple(expected))


def data_folder(root: str) -> Path:
    """Return the folder of a data set.

    Raises:
        UserError: there is none.
    """
    if not root or not Path(root).is_dir():
        raise UserError(f"data folder {root!r} does not exist: give --data-path")
    return Path(root)


def find_classes(root: str, split: str) -> list[str]:
    """Return the names of the class folders, sorted: a class's index is its position.

    Raises:
        UserError: the folder is missing or has no class folders.
    """
    folder = data_folder(root) / split
    if not folder.is_dir():
        other = next((name for name in OTHER_NAMES.get(split, ()) if (folder.parent / name).is_dir()), None)
        hint = f" (there is {other}/: rename it, or link it under that name)" if other else ""
        raise UserError(f"no folder {split}/ in {root!r}: one folder per class is expected in it{hint}")
    return class_folders(folder)


def class_folders(folder: Path) -> list[str]:
    """Return the names of a folder's folders, sorted, but for hidden ones.

    Raises:
        UserError: it has none.
    """
    classes = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    if not classes:
        raise UserError(f"no class folders in {str(folder)!r}")
    return classes


def open_split(root: str, split: str) -> Files:
    """Return the images of one split, class by class, sorted by path; what is hidden is passed over.

    Raises:
        UserError: as `find_classes`, and where a class has no images.
    """
    from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

    classes = find_classes(root, split)
    folder = Path(root, split)

    def is_image(path: str) -> bool:
        return path.lower().endswith(IMG_EXTENSIONS) and f"{os.sep}." not in path[len(str(folder)) :]

    try:
        found = make_dataset(str(folder), {c: i for i, c in enumerate(classes)}, is_valid_file=is_image)
    except FileNotFoundError as error:  # it lists the classes without images
        raise UserError(f"{str(folder)!r}: {error}") from error
    return Files(folder, *zip(*found, strict=True))


class Files:
    """Image files below one folder; `data.types.EncodedImages`.

    Args:
        folder: the folder.
        paths: of the files; they start with the folder's.
        labels: of the images, where they have one each.
    """

    def __init__(self, folder: Path, paths: Sequence[str], labels: Sequence[int] = ()) -> None:
        self.labels = torch.tensor(labels, dtype=torch.int64)
        self._folder = os.fsencode(folder)
        # One array rather than a million objects, which reference counts would copy into every worker.
        self._paths = np.array([os.fsencode(path)[len(self._folder) :] for path in paths])

    def __len__(self) -> int:
        return len(self._paths)

    def read(self, index: int) -> bytes:
        """Return the bytes of one file."""
        return Path(self.name(index)).read_bytes()

    def name(self, index: int) -> str:
        """Return the file's path."""
        return os.fsdecode(self._folder + self._paths[index])
