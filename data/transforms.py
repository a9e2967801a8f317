"""What a worker does to a decoded image: PIL image (RGB) -> uint8 [3, H, W]; randomness from the global generators."""

from __future__ import annotations

from collections.abc import Callable

from PIL import Image
from torch import Tensor

from data.types import Augmentation
from repopt.errors import UserError, unknown

Transform = Callable[[Image.Image], Tensor]

RANDOM = "random"  # training draws bilinear or bicubic per image
DETERMINISTIC = {"bilinear": "bilinear", "bicubic": "bicubic", "nearest": "nearest", RANDOM: "bicubic"}


def check_interpolation(name: str) -> None:
    """Raises UserError for a name that is none of 'bilinear', 'bicubic', 'nearest', 'random'."""
    if name not in DETERMINISTIC:
        raise unknown("interpolation", name, DETERMINISTIC)


def eval_transform(image_size: int, interpolation: str, *, crop: bool) -> Transform:
    """Short side to `image_size` (with `crop`: to 256/224 of it), then the centre square of `image_size`.

    'random' interpolation, which is for training, is bicubic here.
    """
    from torchvision import transforms as T

    mode = T.InterpolationMode(DETERMINISTIC[interpolation])
    short_side = image_size * 256 // 224 if crop else image_size
    return T.Compose([T.Resize(short_side, mode), T.CenterCrop(image_size), T.PILToTensor()])


def _crop_and_flip(image_size: int, interpolation: str, *then: Callable[[Image.Image], Image.Image]) -> Transform:
    from timm.data.transforms import RandomResizedCropAndInterpolation
    from torchvision import transforms as T

    crop = RandomResizedCropAndInterpolation(image_size, interpolation=interpolation)
    return T.Compose([crop, T.RandomHorizontalFlip(), *then, T.PILToTensor()])


def _weak(augmentation: Augmentation, image_size: int, interpolation: str) -> Transform:
    return _crop_and_flip(image_size, interpolation)


def _raug15(augmentation: Augmentation, image_size: int, interpolation: str) -> Transform:
    from data.raug15 import raug15

    return _crop_and_flip(image_size, interpolation, raug15)


def _none(augmentation: Augmentation, image_size: int, interpolation: str) -> Transform:
    return eval_transform(image_size, interpolation, crop=False)


def _timm(augmentation: Augmentation, image_size: int, interpolation: str) -> Transform:
    from timm.data import create_transform

    policy = augmentation.auto_augment
    try:
        return create_transform(
            image_size,
            is_training=True,
            color_jitter=augmentation.color_jitter or None,
            auto_augment=None if policy in ("", "none") else policy,
            interpolation=interpolation,
            normalize=False,  # uint8 out; random erasing follows normalisation, on the device
        )
    except (AssertionError, KeyError, ValueError) as error:
        raise UserError(f"auto-augment policy {policy!r} is none that timm knows ({error!r})") from error


PRESETS: dict[str | None, Callable[[Augmentation, int, str], Transform]] = {
    None: _timm,
    "weak": _weak,
    "raug15": _raug15,
    "none": _none,
}


def check_preset(name: str | None) -> None:
    """Raises UserError for a preset that does not exist."""
    if name not in PRESETS:
        raise unknown("augmentation preset", str(name), [p for p in PRESETS if p])


def train_transform(augmentation: Augmentation, image_size: int, interpolation: str) -> Transform:
    """The transform of `augmentation.preset`.

    Raises:
        UserError: a policy that timm does not know.
    """
    return PRESETS[augmentation.preset](augmentation, image_size, interpolation)
