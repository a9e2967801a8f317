"""Scenes of scikit-learn's handwritten digits: for segmentation and detection without a download.

Digits of many sizes and colours lie over a darker background, later ones over earlier ones. Training scenes have the
digits that `data.digits` trains on, the others the others. The same images stand in two formats:

    coco/        train2017/*.png, val2017/*.png, annotations/instances_{train,val}2017.json
    cityscapes/  leftImg8bit/{train,val}/scenes/*_leftImg8bit.png, gtFine/{train,val}/scenes/*_gtFine_labelIds.png

A pixel of a label image is 0 (background), 1 + the digit, or 255 (the soft edge of a digit, which is ignored).
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data import digits, obtain
from data.cityscapes import IGNORED

DEFAULT = "output/scenes"
NUM_TRAIN, NUM_VAL = 192, 96
SIZE = 96
CLASS_NAMES = ("background", *map(str, range(digits.NUM_CLASSES)))

_VERSION = "scenes 1"
_COUNTS = {"train": NUM_TRAIN, "val": NUM_VAL}
_DIGITS = (2, 6)  # in a scene
_HEIGHTS = (20, 56)  # of a digit
_SOFT = (108, 148)  # grey levels of a digit between which a pixel is half transparent
_MIN_VISIBLE = 0.5  # of a digit's pixels
_MIN_CONTRAST = 64  # by which a digit is at least brighter than all that it covers
_MAX_BACKGROUND_CONTRAST = 40  # greatest difference in brightness within a background
_MAX_BACKGROUND_BRIGHTNESS = 120  # greatest one
_TRIES = 100

Pixels = np.ndarray


def find(root: str) -> Path:
    """Return the folder of the scenes, `DEFAULT` where `root` is empty; they are made where they are absent.

    Raises:
        UserError: the folder holds something else, or scenes of another version.
    """
    folder = Path(root or DEFAULT)
    make(folder)
    return folder


def make(root: Path) -> None:
    """Write the scenes, unless they are there; the bytes are the same every time.

    Raises:
        UserError: the folder holds something else, or scenes of another version.
    """
    obtain.make(root, _VERSION, _write)


@dataclass(frozen=True)
class Scene:
    """A scene.

    Attributes:
        image: uint8 [SIZE, SIZE, 3].
        labels: uint8 [SIZE, SIZE].
        digits: the digits, the lowest first.
        masks: for each digit bool [SIZE, SIZE], the pixels where it is seen.
    """

    image: Pixels
    labels: Pixels
    digits: Sequence[int]
    masks: Sequence[Pixels]


def draw(images: Pixels, labels: Pixels, rng: np.random.Generator) -> Scene:
    """Return a scene of digits taken from grey images uint8 [N, H, W] with labels [N]."""
    canvas = _background(rng)  # integers from here on, so that it is the same on every machine
    classes = np.zeros((SIZE, SIZE), np.uint8)
    chosen: list[int] = []
    masks: list[Pixels] = []
    areas: list[int] = []
    for _ in range(rng.integers(_DIGITS[0], _DIGITS[1] + 1)):
        for _ in range(_TRIES):
            which = rng.integers(len(images))
            opacity = _placed(images[which], rng)
            covers = opacity >= 128
            left = [mask & ~covers for mask in masks]
            hides = any(mask.sum() < _MIN_VISIBLE * area for mask, area in zip(left, areas, strict=True))
            colour = rng.integers(0, 256, 3)
            below = _brightness(canvas[opacity > 0])
            if hides or _brightness(colour) - below.max() < _MIN_CONTRAST:
                continue
            canvas = (canvas * (255 - opacity[..., None]) + colour * opacity[..., None] + 127) // 255
            classes[opacity > 0] = IGNORED
            classes[opacity == 255] = 1 + labels[which]
            masks = [*left, covers]
            areas.append(covers.sum())
            chosen.append(int(labels[which]))
            break
    return Scene(canvas.astype(np.uint8), classes, chosen, masks)


def _placed(image: Pixels, rng: np.random.Generator) -> Pixels:
    """Return a digit cut out, enlarged and put somewhere: its opacity, 0..255, int64 [SIZE, SIZE]."""
    (rows, columns) = (image > _SOFT[0]).nonzero()
    cut = Image.fromarray(image[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1])
    height = int(rng.integers(_HEIGHTS[0], _HEIGHTS[1] + 1))
    width = max(1, cut.width * height // cut.height)
    grey = np.asarray(cut.resize((width, height), Image.Resampling.BICUBIC)).astype(np.int64)
    low, high = _SOFT
    top, left = rng.integers(0, SIZE - height + 1), rng.integers(0, SIZE - width + 1)
    opacity = np.zeros((SIZE, SIZE), np.int64)
    opacity[top : top + height, left : left + width] = ((grey - low) * 255 // (high - low)).clip(0, 255)
    return opacity


def _background(rng: np.random.Generator) -> Pixels:
    """Return a gradient, clouds or stripes between two colours of about the same brightness, int64 [SIZE, SIZE, 3]."""
    while True:
        one, other = colours = rng.integers(0, 256, (2, 3))
        low, high = sorted(_brightness(colours))
        if high <= _MAX_BACKGROUND_BRIGHTNESS and high - low <= _MAX_BACKGROUND_CONTRAST:
            break
    y, x = np.mgrid[:SIZE, :SIZE]
    slope = rng.integers(-3, 4, 2)
    along = y * slope[0] + x * slope[1]
    along -= along.min()
    match rng.integers(3):
        case 0:
            share = along * 255 // max(1, along.max())
        case 1:
            coarse = rng.integers(0, 256, (6, 6)).astype(np.uint8)
            share = np.asarray(Image.fromarray(coarse).resize((SIZE, SIZE), Image.Resampling.BICUBIC)).astype(np.int64)
        case _:
            share = along // rng.integers(8, 33) % 2 * 255
    return one + (other - one) * share[..., None] // 255


def _brightness(colours: Pixels) -> Pixels:
    """Return the brightness of RGB colours [..., 3]."""
    return colours @ np.array([299, 587, 114]) // 1000


def _write(root: Path) -> None:
    coco, cityscapes = root / "coco", root / "cityscapes"
    (coco / "annotations").mkdir(parents=True)
    image_id = 0
    for number, (split, count) in enumerate(_COUNTS.items()):
        images, labels = (tensor.numpy() for tensor in digits.load(split))
        folders = (coco / f"{split}2017", *(cityscapes / f / split / "scenes" for f in ("leftImg8bit", "gtFine")))
        for folder in folders:
            folder.mkdir(parents=True)
        listed, annotations = [], []
        for index in range(count):
            scene = draw(images[:, 0], labels, np.random.default_rng((number, index)))
            image_id += 1
            name, frame = f"{image_id:012}.png", f"scenes_{index:06}_000000"
            encoded = _png(scene.image)
            (folders[0] / name).write_bytes(encoded)
            (folders[1] / f"{frame}_leftImg8bit.png").write_bytes(encoded)
            (folders[2] / f"{frame}_gtFine_labelIds.png").write_bytes(_png(scene.labels))
            listed.append({"id": image_id, "file_name": name, "width": SIZE, "height": SIZE})
            annotations += _annotations(scene, image_id)
        content = {
            "images": listed,
            "annotations": [{"id": k, **annotation} for k, annotation in enumerate(annotations, 1)],
            "categories": [{"id": 1 + d, "name": str(d), "supercategory": "digit"} for d in range(digits.NUM_CLASSES)],
        }
        (coco / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(content))


def _png(pixels: Pixels) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def _annotations(scene: Scene, image_id: int) -> list[dict[str, Any]]:
    found = []
    for digit, mask in zip(scene.digits, scene.masks, strict=True):
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        top, left = int(rows[0]), int(columns[0])
        found.append(
            {
                "image_id": image_id,
                "category_id": 1 + digit,
                "bbox": [left, top, int(columns[-1]) + 1 - left, int(rows[-1]) + 1 - top],
                "area": int(mask.sum()),
                "iscrowd": 0,
                "segmentation": {"size": [SIZE, SIZE], "counts": _run_lengths(mask)},
            }
        )
    return found


def _run_lengths(mask: Pixels) -> list[int]:
    """Return lengths of the runs of a mask's columns one after the other, beginning with one outside the mask."""
    flat = np.concatenate([[False], mask.flatten("F"), [not mask[-1, -1]]])
    changes = np.flatnonzero(flat[1:] != flat[:-1])
    return np.diff(changes, prepend=0).tolist()
