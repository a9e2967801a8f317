"""Images in class folders: `<root>/train/<class>/...` and `<root>/val/<class>/...`, as ImageNet is usually unpacked.

Where there is no `val/` and the source says so (`Source.val_fraction`), a part of every class's images is held out
from `train/`, or from the root itself, if the class folders lie there: those whose names' hashes come first, so that it
is the same part on every machine; where images are added, most of it stays.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections import Counter
from collections.abc import Sequence
from itertools import compress
from pathlib import Path

import numpy as np
import torch

from data.types import DatasetInfo, EncodedImages, Source
from repopt.errors import UserError, shown

logger = logging.getLogger("repopt")

# That people give the splits, in small letters.
OTHER_NAMES = {"train": ("train", "training"), "val": ("val", "valid", "validation", "test", "testing")}


def describe(source: Source, splits: Sequence[str]) -> DatasetInfo:
    """Count the classes: `Source.classes`, else the folders of `train/`, else those of the first split.

    Raises:
        UserError: a folder is missing or has no class folders, or there are folders of other classes; or a class has
            no folder to train on.
    """
    classes = _classes(source, splits[0] if splits else "val")
    for split in splits:
        found = class_folders(_locate(source, split))
        if foreign := sorted(set(found) - set(classes)):
            of = "those that the network was trained on" if source.classes else "train's"
            raise UserError(
                f"{split}/ in {source.root!r} has a folder {shown(foreign[0])}, which is no class of {of} "
                f"({len(foreign)} of {len(found)} folders are none)"
            )
        if split == "train" and (lacking := [name for name in classes if name not in found]):
            raise UserError(
                f"train/ in {source.root!r} has no folder of {len(lacking)} classes, such as {lacking[0]!r}"
            )
    if len(classes) == 1 and not source.classes:
        raise UserError(f"{source.root!r} has the one class {classes[0]!r}: are its folders those of classes?")
    return DatasetInfo(num_classes=len(classes), image_size=None, classes=classes)


def _classes(source: Source, split: str) -> tuple[str, ...]:
    """Return the names of the classes: a class's index is its position."""
    if source.classes:
        return source.classes
    has_train = Path(source.root, "train").is_dir()
    return tuple(class_folders(_locate(source, "train" if has_train else split)))


def data_folder(root: str) -> Path:
    """Return the folder of a data set.

    Raises:
        UserError: there is none.
    """
    if not root or not Path(root).is_dir():
        raise UserError(f"data folder {root!r} does not exist: give --data-path")
    return Path(root)


def _is_held_out(source: Source) -> bool:
    """Return whether the split "val" is a part of other images."""
    return bool(source.val_fraction) and not Path(source.root, "val").is_dir()


def _locate(source: Source, split: str) -> Path:
    """Return the folder with the class folders of a split.

    Raises:
        UserError: there is none; the message says by which other name there may be one.
    """
    root = data_folder(source.root)
    names = {entry.name for entry in os.scandir(root) if entry.is_dir()}
    small = {name.lower(): name for name in names}
    other = next((small[name] for name in OTHER_NAMES.get(split, ()) if name in small), None)
    if split in names:
        return root / split
    if _is_held_out(source) and (other is None or "train" not in names):
        if "train" in names:
            return root / "train"
        if not small.keys() & {*OTHER_NAMES["train"], *OTHER_NAMES["val"]}:
            return root
    hint = f" (there is {other}/: rename it, or link it under that name)" if other else ""
    if split == "val" and not other and "train" in names:
        hint = " (DATA.VAL_FRACTION holds a part of train/ out)"
    elif not names & {"train", "val"} and not other and names:
        hint = " (are the classes' folders in it? DATA.VAL_FRACTION holds a part of their images out)"
    raise UserError(f"no folder {split}/ in {source.root!r}: one folder per class is expected in it{hint}")


def class_folders(folder: Path) -> list[str]:
    """Return the names of a folder's folders, sorted, but for hidden ones.

    Raises:
        UserError: it has none.
    """
    classes = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    if not classes:
        raise UserError(f"no class folders in {str(folder)!r}")
    return classes


def open_split(source: Source, split: str) -> Files:
    """Return the images of one split, class by class, sorted by path; what is hidden is passed over.

    Raises:
        UserError: as `describe`, and where a class has no images to train on, or no class has any.
    """
    from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

    folder, classes = _locate(source, split), _classes(source, split)
    own = set(class_folders(folder))
    indices = {name: index for index, name in enumerate(classes) if name in own}

    passed_over: Counter[str] = Counter()

    def is_image(path: str) -> bool:
        if f"{os.sep}." in path[len(str(folder)) :]:  # hidden
            return False
        if not path.lower().endswith(IMG_EXTENSIONS):
            passed_over[Path(path).suffix or "no ending"] += 1
            return False
        return True

    try:
        found = make_dataset(str(folder), indices, is_valid_file=is_image, allow_empty=split != "train")
    except FileNotFoundError as error:  # it lists the classes without images
        raise UserError(f"{str(folder)!r}: {error}") from error
    if passed_over:
        kinds = ", ".join(f"{count} of {kind}" for kind, count in passed_over.most_common(5))
        logger.warning(f"files in {str(folder)!r} that are no pictures of a known kind are passed over: {kinds}")
    if _is_held_out(source):
        found = list(compress(found, _in_share(found, folder, source.val_fraction, held_out=split == "val")))
    if not found:
        raise UserError(f"no images of {split}/ in {str(folder)!r}")
    paths, labels = zip(*found, strict=True)
    if absent := sorted({*range(len(classes))} - {*labels}):
        logger.warning(f"no images of {len(absent)} classes in {split}/, such as {classes[absent[0]]!r}")
    return Files(folder, paths, labels)


def _in_share(images: Sequence[tuple[str, int]], folder: Path, fraction: float, *, held_out: bool) -> list[bool]:
    """Return which images are in the part that is held out, or in the other: both have one of every class of two."""
    names = [os.fsencode(Path(path).relative_to(folder)) for path, _ in images]
    of_class: dict[int, list[bytes]] = {}
    for name, (_, label) in zip(names, images, strict=True):
        of_class.setdefault(label, []).append(name)
    chosen: set[bytes] = set()
    for own in of_class.values():
        count = min(max(1, round(fraction * len(own))), len(own) - 1)
        chosen |= set(sorted(own, key=lambda name: hashlib.sha256(name).digest())[:count])
    return [(name in chosen) == held_out for name in names]


class Files(EncodedImages):
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
