"""Cityscapes' layout: `leftImg8bit/<split>/<city>/*_leftImg8bit.png`, `gtFine/<split>/<city>/*_gtFine_labelIds.png`."""

from __future__ import annotations

from pathlib import Path

from data.folder import Files
from repopt.errors import UserError, one_line

IGNORED = 255  # of a label image: what is not evaluated

_IMAGE_FOLDER, _LABEL_FOLDER = "leftImg8bit", "gtFine"
_IMAGE = "_leftImg8bit.png"


def class_names() -> tuple[str, ...]:
    """Return the names of the 19 classes that are evaluated."""
    from torchvision.datasets import Cityscapes

    evaluated = [c for c in Cityscapes.classes if not c.ignore_in_eval]
    return tuple(c.name for c in sorted(evaluated, key=lambda c: c.train_id))


def class_indices() -> tuple[int, ...]:
    """Return, for each value of a label image from 0 on, its class, or `IGNORED`."""
    from torchvision.datasets import Cityscapes

    # The id -1, of license plates, is the byte 255.
    return tuple(c.train_id for c in sorted(Cityscapes.classes, key=lambda c: c.id) if c.id >= 0)


def open_split(root: Path, split: str) -> tuple[Files, Files]:
    """Return the images of a split, sorted by path, and the label image of each.

    Raises:
        UserError: a folder is missing or empty, or an image has no label image.
    """
    from torchvision.datasets import Cityscapes

    for folder in (_IMAGE_FOLDER, _LABEL_FOLDER):
        if not (root / folder / split).is_dir():  # torchvision would unpack archives that lie there
            raise UserError(f"no folder {folder}/{split}/ in {str(root)!r}: it is not in Cityscapes' layout")
    try:
        found = Cityscapes(str(root), split, "fine", "semantic")
    except OSError as error:
        raise UserError(f"{str(root)!r} is not in Cityscapes' layout: {one_line(error)}") from None
    pairs = sorted(
        (image, label) for image, (label,) in zip(found.images, found.targets, strict=True) if image.endswith(_IMAGE)
    )
    images = root / _IMAGE_FOLDER / split
    if not pairs:
        raise UserError(f"no images in {str(images)!r}: <city>/*{_IMAGE} are expected")
    if lacking := [(image, label) for image, label in pairs if not Path(label).is_file()]:
        image, label = lacking[0]
        more = f" (nor have {len(lacking) - 1} more images theirs)" if len(lacking) > 1 else ""
        raise UserError(f"image {image!r} has no label image {label!r}{more}")
    return (
        Files(images, [image for image, _ in pairs]),
        Files(root / _LABEL_FOLDER / split, [label for _, label in pairs]),
    )
