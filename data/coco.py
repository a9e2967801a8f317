"""COCO's layout: `<split>2017/*.jpg` and `annotations/instances_<split>2017.json`."""

from __future__ import annotations

import itertools
import json
import marshal
import math
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from repopt.errors import UserError, one_line, shown

_MAX_PIXELS = 2**28  # of an image; of more, masks would be an attack on the memory
_MAX_COORDINATE = 1e9  # of a box


class Split:
    """The annotations of a split, read whole and checked, their columns as arrays.

    Attributes:
        file: the annotation file.
        folder: of the images.
        content: the file's.
        category_ids: the label k stands for the k-th, counted from 1: ascending, or in the order of given classes.
        class_names: of the same.
        image_ids: int64 [N].
        names: of the N image files, relative to the folder.
        sizes: int64 [N, 2], width and height.
        annotation_ids: int64 [A].
        images: int64 [A], which image an annotation is of, 0..N-1.
        labels: int64 [A], 1..K.
        crowd: bool [A].
        boxes: float64 [A, 4], left, top, right and bottom, as far as they lie in the image.

    Args:
        root: the folder of the data set.
        split: "train" or "val".
        classes: names in the order of the labels; empty = the categories in the order of their ids. A class that is no
            category of the file has an id that the file does not have.

    Raises:
        UserError: there are none, or they are not sound, or name images that the folder does not have, or a category
            that is none of the classes.
    """

    def __init__(self, root: Path, split: str, classes: Sequence[str] = ()) -> None:
        self.file, self.folder = root / "annotations" / f"instances_{split}2017.json", root / f"{split}2017"
        self.content = _parse(self.file)
        images, annotations, categories = (
            _Records(self.file, self.content, kind) for kind in ("images", "annotations", "categories")
        )
        category_ids, class_names = categories.ids(), categories.column("name", _is_text, "text")
        by_id = np.argsort(category_ids)
        self.category_ids = tuple(category_ids[by_id].tolist())
        self.class_names = tuple(class_names[k] for k in by_id)
        if classes:
            self.category_ids, self.class_names = self._ids_of(classes), tuple(classes)

        self.image_ids = images.ids()
        self.names = images.column("file_name", _is_text, "text")
        self.sizes = np.stack([images.integers("width", 1), images.integers("height", 1)], 1)
        if (large := self.sizes.astype(float).prod(1) > _MAX_PIXELS).any():
            raise UserError(f"{self.file}: image {self.image_ids[large][0]} has more than {_MAX_PIXELS} pixels")
        self._check_files()

        self.annotation_ids = annotations.ids(1)  # pycocotools takes others for no annotation
        self.images = self._places("image", annotations.integers("image_id"), self.image_ids)
        self.labels = 1 + self._places("category", annotations.integers("category_id"), np.array(self.category_ids))
        self.crowd = annotations.integers("iscrowd", 0) > 0
        annotations.column("area", _is_number, "a number")
        corners = np.array(annotations.column("bbox", _is_box, "four numbers"), np.float64).reshape(-1, 2, 2)
        corners[:, 1] += corners[:, 0]
        self.boxes = np.clip(corners, 0, self.sizes[self.images][:, None]).reshape(-1, 4)

    def check_masks(self, chosen: Iterable[int]) -> None:
        """Refuse annotations without a mask, and masks that pycocotools crashes on.

        Raises:
            UserError: naming the first.
        """
        for k in chosen:
            width, height = self.sizes[self.images[k]].tolist()
            segmentation = self.content["annotations"][k].get("segmentation")
            if reason := _invalid_reason(segmentation, width, height):
                where = f"{self.file}: annotation {self.annotation_ids[k]}"
                raise UserError(f"{where}: its segmentation {reason}: {shown(segmentation)}")

    def _check_files(self) -> None:
        if not self.folder.is_dir():
            raise UserError(f"no folder {str(self.folder)!r}, whose images {self.file.name} lists")
        found = {entry.name for entry in os.scandir(self.folder)}  # sooner than asking for every file
        if lacking := [name for name in self.names if name not in found and not self._is_below(name)]:
            raise UserError(
                f"{str(self.folder)!r} lacks {len(lacking)} of {len(self.names)} images that {self.file} lists: "
                f"{shown(lacking[0])}"
            )

    def _ids_of(self, classes: Sequence[str]) -> tuple[int, ...]:
        """Return the categories' ids in the order of classes with their names."""
        own = dict(zip(self.class_names, self.category_ids, strict=True))
        if foreign := [name for name in own if name not in classes]:
            raise UserError(
                f"{self.file}: category {foreign[0]!r} is no class of those that the network was trained on "
                f"({len(foreign)} of {len(own)} categories are none)"
            )
        if len(own) < len(self.class_names):
            raise UserError(f"{self.file}: two categories have one name, and are to be matched by name")
        others = itertools.count(max(self.category_ids) + 1)
        return tuple(own[name] if name in own else next(others) for name in classes)

    def _is_below(self, name: str) -> bool:
        return not Path(name).is_absolute() and ".." not in Path(name).parts and (self.folder / name).is_file()

    def _places(self, kind: str, wanted: np.ndarray, known: np.ndarray) -> np.ndarray:
        """Return where in `known` each annotation's id of its image or category stands."""
        order = np.argsort(known)
        places = order[np.searchsorted(known, wanted, sorter=order).clip(max=len(known) - 1)]
        if (foreign := known[places] != wanted).any():
            raise UserError(
                f"{self.file}: annotation {self.annotation_ids[foreign][0]} is of {kind} {wanted[foreign][0]}, "
                f"which the file does not list ({foreign.sum()} such)"
            )
        return places


class Masks:
    """The masks of some annotations, undecoded.

    Args:
        split: the annotations.
        chosen: which of them, int64 [M].

    Raises:
        UserError: one has no mask, or one that pycocotools cannot decode; pycocotools is absent.
    """

    def __init__(self, split: Split, chosen: np.ndarray) -> None:
        tools()
        split.check_masks(chosen.tolist())
        annotations = split.content["annotations"]
        # In one piece rather than as many objects, which reference counts would copy into every worker.
        packed = [marshal.dumps(annotations[k]["segmentation"]) for k in chosen.tolist()]
        self._packed = b"".join(packed)
        self._ends = np.cumsum([0, *map(len, packed)])

    def decode(self, index: int, height: int, width: int) -> np.ndarray:
        """Return uint8 [height, width], 1 in the mask of the annotation chosen[index]."""
        mask = tools().mask
        found = mask.frPyObjects(marshal.loads(self._packed[self._ends[index] : self._ends[index + 1]]), height, width)
        return mask.decode(mask.merge(found) if isinstance(found, list) else found)


def tools() -> ModuleType:
    """Return the package pycocotools.

    Raises:
        UserError: it is absent.
    """
    try:
        import pycocotools.coco
        import pycocotools.mask
    except ImportError:
        raise UserError("detection needs pycocotools (pip install 'repopt[downstream]')") from None
    return pycocotools


def _parse(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"no annotation file {str(file)!r}: the data folder is not in COCO's layout") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is no JSON: {one_line(error)}") from None
    if not isinstance(content, dict):
        raise UserError(f"{file} holds {shown(content)}, not images, annotations and categories")
    return content


class _Records:
    """One of the lists of a file, whose records have values of known kinds."""

    def __init__(self, file: Path, content: dict[str, Any], kind: str) -> None:
        records = content.get(kind)
        if not isinstance(records, list):
            raise UserError(f"{file} has no list {kind!r}")
        if not records and kind != "annotations":
            raise UserError(f"{file}: the list {kind!r} is empty")
        self._file, self._kind, self._records = file, kind, records

    def column(self, key: str, fits: Callable[[Any], bool], expected: str) -> list[Any]:
        """Return a value of each record."""
        for number, record in enumerate(self._records):
            if not (isinstance(record, dict) and key in record and fits(record[key])):
                raise UserError(f"{self._file}: {self._kind}[{number}] lacks {key!r} ({expected}): {shown(record)}")
        return [record[key] for record in self._records]

    def integers(self, key: str, min_value: int = -(2**62)) -> np.ndarray:
        """Return an integer of each record, int64."""
        expected = "an integer" if min_value < 0 else f"an integer from {min_value} on"
        return np.array(self.column(key, lambda v: type(v) is int and min_value <= v <= 2**62, expected), np.int64)

    def ids(self, min_value: int = -(2**62)) -> np.ndarray:
        """Return the ids of the records, no two of which are the same."""
        found = self.integers("id", min_value)
        values, counts = np.unique(found, return_counts=True)
        if (twice := counts > 1).any():
            raise UserError(f"{self._file}: {self._kind} has the id {values[twice][0]} more than once")
        return found


def _is_text(value: Any) -> bool:
    return type(value) is str


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def _are_integers(values: Any) -> bool:
    return type(values) is list and set(map(type, values)) <= {int}


def _is_box(value: Any) -> bool:
    return (
        type(value) is list
        and len(value) == 4
        and all(_is_number(v) and -_MAX_COORDINATE < v < _MAX_COORDINATE for v in value)
    )


def _invalid_reason(segmentation: Any, width: int, height: int) -> str:
    """Return why pycocotools would crash on a mask of an image, or nothing."""
    match segmentation:
        case None:
            return "is missing"
        case [[_, _, _, _, _, _, *_], *_]:
            return next(filter(None, (_polygon_reason(polygon, max(width, height)) for polygon in segmentation)), "")
        case list():
            return "has no polygon of three points or more"
        case {"size": size, "counts": counts}:
            if not _are_integers(size) or size != [height, width]:
                return f"is not of the image's size, {[height, width]}"
            if type(counts) is str:
                return "has compressed run lengths, where polygons or a list of run lengths are expected"
            if not _are_integers(counts) or min(counts, default=0) < 0 or sum(counts) != width * height:
                return "has run lengths that are not those of the image's pixels"
            return ""
    return "is neither polygons nor run lengths"


def _polygon_reason(polygon: Any, side: int) -> str:
    if type(polygon) is not list or len(polygon) % 2 or not polygon or not set(map(type, polygon)) <= {int, float}:
        return "has a polygon that is no list of x, y, x, y ..."
    if not (-side <= min(polygon) and max(polygon) <= 2 * side) or math.isnan(sum(polygon)):
        return "has a polygon far outside the image"  # whose outline would be followed pixel by pixel
    return ""
