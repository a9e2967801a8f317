"""What a worker does to an image: encoded bytes -> uint8 [H, W, 3]; randomness from the global generators."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch import Tensor

from data import raug15
from data.decode import to_pillow, to_pixels
from data.types import Augmentation
from repopt.errors import UserError, unknown
from repopt.images import resize_and_crop

Transform = Callable[[bytes], Tensor]

RANDOM = "random"  # training draws bilinear or bicubic per image
DETERMINISTIC = {"bilinear": "bilinear", "bicubic": "bicubic", RANDOM: "bicubic"}

PRESETS = ("weak", "raug15", "none")

_CROP_RATIO = (3 / 4, 4 / 3)


def check_interpolation(name: str) -> None:
    """Raise a UserError for a name that is none of 'bilinear', 'bicubic', 'random'."""
    if name not in DETERMINISTIC:
        raise unknown("interpolation", name, DETERMINISTIC)


@dataclass(frozen=True)
class OnPillow:
    """A transform of Pillow's images."""

    transform: Callable[[Image.Image], Image.Image]

    def __call__(self, data: bytes) -> Tensor:
        """Return uint8 [H, W, 3]."""
        return torch.from_numpy(np.array(self.transform(to_pillow(data))))


@dataclass(frozen=True)
class Variation:
    """What was drawn for an image.

    Attributes:
        top, left, height, width: of the crop.
        interpolation: 'bilinear' or 'bicubic'.
        mirrored: left and right.
        operations: that follow.
    """

    top: int
    left: int
    height: int
    width: int
    interpolation: str
    mirrored: bool
    operations: Sequence[raug15.Drawn]


@dataclass(frozen=True)
class CropAndFlip:
    """A random resized crop, mirrored or not, and the preset's operations.

    Attributes:
        image_size: side in pixels.
        interpolation: a key of `DETERMINISTIC`.
        augmentation: how large the crops are, how often they are mirrored, and the preset.
    """

    image_size: int
    interpolation: str
    augmentation: Augmentation

    def __call__(self, data: bytes) -> Tensor:
        """Return uint8 [H, W, 3]."""
        pixels = to_pixels(data)
        return self.vary(pixels, self.draw(*pixels.shape[:2]))

    def draw(self, height: int, width: int) -> Variation:
        """Draw for an image of a size, from the global generators."""
        size, augmentation = self.image_size, self.augmentation
        shape_only = torch.empty(()).expand(3, height, width)
        top, left, *crop = RandomResizedCropAndInterpolation.get_params(shape_only, augmentation.crop_area, _CROP_RATIO)
        crop_height, crop_width = (max(1, side) for side in crop)  # of an image of a pixel or two it may be less
        return Variation(
            min(top, height - crop_height),
            min(left, width - crop_width),
            crop_height,
            crop_width,
            random.choice(("bilinear", "bicubic")) if self.interpolation == RANDOM else self.interpolation,
            bool(torch.rand(1) < augmentation.hflip),  # from the generator that torchvision draws from
            raug15.draw(size, size) if augmentation.preset == "raug15" else (),
        )

    def vary(self, pixels: Tensor, drawn: Variation) -> Tensor:
        """Return uint8 [size, size, 3] of [H, W, 3], in the decoder's own memory: Pillow would copy the crop."""
        crop = pixels[drawn.top : drawn.top + drawn.height, drawn.left : drawn.left + drawn.width]
        pixels = _resize(crop, self.image_size, drawn.interpolation)
        if drawn.mirrored:
            pixels = pixels.flip(1)
        return torch.from_numpy(raug15.apply(pixels.numpy(), drawn.operations)) if drawn.operations else pixels


def _resize(pixels: Tensor, size: int, mode: str) -> Tensor:
    """Return uint8 [size, size, 3] of [H, W, 3], as Pillow does it."""
    batch = pixels[None].permute(0, 3, 1, 2)  # channels_last
    return F.interpolate(batch, (size, size), mode=mode, antialias=True)[0].permute(1, 2, 0)


def short_side(image_size: int, *, crop: bool) -> int:
    """Return the short side of an image before the centre square of `image_size` is cut out in evaluation."""
    return image_size * 256 // 224 if crop else image_size


def eval_transform(image_size: int, interpolation: str, *, crop: bool) -> Transform:
    """Resize the short side to `image_size` (with `crop`: to 256/224 of it), then the centre square of `image_size`.

    'random' interpolation, which is for training, is bicubic here.
    """
    side = short_side(image_size, crop=crop)
    return OnPillow(resize_and_crop((image_size, image_size), side, DETERMINISTIC[interpolation]))


def check_preset(name: str | None) -> None:
    """Raise a UserError for a preset that does not exist."""
    if name is not None and name not in PRESETS:
        raise unknown("augmentation preset", name, PRESETS)


def train_transform(augmentation: Augmentation, image_size: int, interpolation: str) -> Transform:
    """Return the transform of `augmentation.preset`.

    Raises:
        UserError: a policy that timm does not know, or crops that are larger than the image, or none.
    """
    smallest, largest = augmentation.crop_area
    if not 0 < smallest <= largest <= 1:
        raise UserError(
            f"crops cover a part of an image above 0 and up to 1, the smaller first, not {augmentation.crop_area}"
        )
    match augmentation.preset:
        case "weak" | "raug15":
            return CropAndFlip(image_size, interpolation, augmentation)
        case "none":
            return eval_transform(image_size, interpolation, crop=False)
    from timm.data import create_transform
    from torchvision import transforms as T

    policy = augmentation.auto_augment
    try:
        varied, augmented, _ = create_transform(
            image_size,
            is_training=True,
            scale=augmentation.crop_area,
            hflip=augmentation.hflip,
            color_jitter=augmentation.color_jitter or None,  # type: ignore[arg-type]  # None is none, as timm says
            auto_augment=None if policy in ("", "none") else policy,
            interpolation=interpolation,
            separate=True,
        )
    except (AssertionError, KeyError, ValueError) as error:
        raise UserError(f"auto-augment policy {policy!r} is none that timm knows ({error!r})") from error
    return OnPillow(T.Compose([varied, augmented]))
