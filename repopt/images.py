"""How a picture becomes what a network takes in evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image
from torch import Tensor
from torchvision import transforms as T

from repopt.errors import UserError, shown

INTERPOLATIONS = ("bilinear", "bicubic")

_LUMA = (0.299, 0.587, 0.114)  # of red, green and blue in grey, as Pillow weights them (ITU-R 601-2)


_TURNS: dict[object, Image.Transpose] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""By EXIF's orientation, what shows the stored pixels; Pillow's exif_transpose fails where other tags are damaged."""


@dataclass(frozen=True)
class Preprocessing:
    """What an evaluation does to a picture.

    Attributes:
        mean, std: of normalization, per channel (three, or one of grey), of values in 0..1.
        size: height and width of the centre that is cut out; None = pictures stay as large as they are.
        short_side: to which the shorter side is resized before, in pixels.
        long_side: of a detector, which resizes by itself: what the longer side is at most; None = it does not say.
        interpolation: of resizing, one of `INTERPOLATIONS`.

    Raises:
        UserError: a value is none of these.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: tuple[int, int] | None = None
    short_side: int = 1
    interpolation: str = "bilinear"
    long_side: int | None = None

    def __post_init__(self) -> None:
        numbers = [*self.mean, *self.std]
        sizes = [*(self.size or ()), self.short_side]
        long_side = self.short_side if self.long_side is None else self.long_side
        if (
            len(self.mean) not in (1, 3)
            or len(self.mean) != len(self.std)
            or not all(type(number) in (int, float) for number in numbers)
            or not all(std > 0 for std in self.std)
            or len(sizes) not in (1, 3)
            or not all(type(side) is int and 0 < side < 2**16 for side in (*sizes, long_side))
            or self.interpolation not in INTERPOLATIONS
        ):
            raise UserError(f"this is no way to make images: {shown(vars(self))}")

    @classmethod
    def of(cls, content: object) -> Preprocessing:
        """Return what `as_data` has made plain data of.

        Raises:
            UserError: it is something else.
        """
        try:
            fields: dict[str, Any] = dict(content)  # type: ignore[call-overload]
            lists = {key: tuple(value) for key, value in fields.items() if isinstance(value, list)}
            return cls(**fields | lists)
        except (TypeError, ValueError):
            raise UserError(f"this is no way to make images: {shown(content)}") from None

    def as_data(self) -> dict[str, Any]:
        """Return the attributes as plain data, for a file."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in vars(self).items()}

    def resized(self, size: tuple[int, int]) -> Preprocessing:
        """Return what cuts out a centre of another size: pictures are resized as much more or less."""
        if self.size is None:
            return self
        return replace(self, size=size, short_side=round(self.short_side * min(size) / min(self.size)))

    def __call__(self, image: Image.Image) -> Tensor:
        """Return a Pillow image as float32 (C, H, W), normalized."""
        image = to_rgb(image)
        if self.size is not None:
            image = resize_and_crop(self.size, self.short_side, self.interpolation)(image)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        return Normalization(self.mean, self.std)(pixels.to(torch.float32))


def resize_and_crop(size: tuple[int, int], short_side: int, interpolation: str) -> T.Compose:
    """Return what brings an RGB Pillow image to a size; see `Preprocessing`."""
    return T.Compose([T.Resize(short_side, T.InterpolationMode(interpolation)), T.CenterCrop(size)])


class Normalization:
    """(x / 255 - mean) / std per channel; one channel is the luma of red, green and blue.

    Args:
        mean, std: per channel, of values in 0..1.
        device: of the images.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], device: torch.device | str | None = None) -> None:
        means, stds = torch.tensor([mean, std], dtype=torch.float64)
        self._scale = (1 / (255 * stds)).float().view(-1, 1, 1).to(device)
        self._shift = (-means / stds).float().view(-1, 1, 1).to(device)
        self._luma = torch.tensor(_LUMA, device=device).view(3, 1, 1)

    def __call__(self, images: Tensor) -> Tensor:
        """Return float images (..., 3, H, W) with values in 0..255, which are written over, as (..., C, H, W)."""
        if len(self._scale) == 1:
            images = (images * self._luma).sum(-3, keepdim=True)
        return images.mul_(self._scale).add_(self._shift)


def to_rgb(image: Image.Image) -> Image.Image:
    """Return an RGB image as viewers show it (`turned`); of 16 bits in one channel, as of 16 in three, the upper 8.

    Raises:
        ValueError: its values have no range (32 bits or floating point in one channel).
    """
    image.load()
    turn = turn_of(image)  # now: as Pillow loads a TIFF, it turns it by itself
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"values without a range, in Pillow's mode {image.mode}: convert them to 8 or 16 bits")
    image = image.convert("RGB")
    # A new image, without the tag: else whoever does this again would turn it again.
    return image if turn is None else Image.fromarray(np.asarray(image.transpose(turn)))


def turned(image: Image.Image) -> Image.Image:
    """Return an image as viewers show it: turned or mirrored where its EXIF tag says so."""
    turn = turn_of(image)
    return image if turn is None else image.transpose(turn)


def turn_of(image: Image.Image) -> Image.Transpose | None:
    """Return what an image's tag says is done to its pixels; None where it has none, or one that cannot be read."""
    try:
        return _TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # nothing but Pillow runs here, whose parsers raise many kinds at damaged bytes
        return None
