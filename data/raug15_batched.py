"""raug15's operations on batches of uint8 images [N, 3, H, W], on any device: the pixels of data.raug15, up to a level.

An operation's arguments are those that `raug15.draw` gives, as float64 [N, 1, 1, 1]. Images are grouped by operation:
one by one they would start as many kernels each as a group does.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
from PIL import Image
from torch import Tensor

from data import raug15


def apply(images: Tensor, drawn: Sequence[Sequence[raug15.Drawn]]) -> Tensor:
    """Return uint8 [N, 3, H, W] after each image's operations, one after the other."""
    images = images.clone()
    for step in zip(*drawn, strict=True):
        groups: defaultdict[str, list[int]] = defaultdict(list)
        for number, (name, _) in enumerate(step):
            groups[name].append(number)
        for name, numbers in groups.items():
            rows = torch.tensor([step[number][1] for number in numbers], dtype=torch.float64)
            arguments = rows.T[..., None, None, None].to(images.device)
            images[numbers] = OPERATIONS[name](images[numbers], *arguments)
    return images


def _truncated(values: Tensor) -> Tensor:
    return values.clamp(0, 255).to(torch.uint8)


def _looked_up(images: Tensor, table: Tensor) -> Tensor:
    """Return uint8 images of a table [N, 3, 256]."""
    return _truncated(table).gather(2, images.flatten(2).long()).view(images.shape)


def _autocontrast(images: Tensor) -> Tensor:
    low, high = (bound[..., None].double() for bound in (images.amin((2, 3)), images.amax((2, 3))))
    levels = torch.arange(256, device=images.device)
    scale = 255 / (high - low)
    return _looked_up(images, torch.where(high > low, levels * scale + -low * scale, levels))


def _equalize(images: Tensor) -> Tensor:
    count, channels = images.shape[:2]
    own = 256 * torch.arange(count * channels, device=images.device)[:, None]
    levels = (images.reshape(count * channels, -1) + own).flatten()
    histogram = torch.bincount(levels, minlength=count * channels * 256).view(count, channels, 256)
    last = histogram.gather(2, images.amax((2, 3))[..., None].long())
    step = (histogram.sum(2, keepdim=True) - last) // 255
    spread = (step // 2 + histogram.cumsum(2) - histogram) // step.clamp(min=1)
    return _looked_up(images, torch.where(step > 0, spread, torch.arange(256, device=images.device)))


def _solarize_add(images: Tensor, addend: Tensor) -> Tensor:
    return torch.where(images < 128, _truncated(images + addend), images)


def _grey(images: Tensor) -> Tensor:
    """Return the luma int32 [N, 1, H, W], rounded as Pillow does it."""
    red, green, blue = images.int().split(1, 1)
    return (19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16


def _blend(degenerate: Tensor | int, images: Tensor, factor: Tensor) -> Tensor:
    return _truncated(degenerate + factor.float() * (images.int() - degenerate))


def _contrast(images: Tensor, factor: Tensor) -> Tensor:
    mean = _grey(images).double().mean((1, 2, 3), keepdim=True)
    return _blend((mean + 0.5).int(), images, factor)


def _sharpness(images: Tensor, factor: Tensor) -> Tensor:
    wide = images.int()
    across = wide[..., :-2] + wide[..., 1:-1] + wide[..., 2:]
    box = across[..., :-2, :] + across[..., 1:-1, :] + across[..., 2:, :] + 4 * wide[..., 1:-1, 1:-1]
    smooth = (2 * box + 13) // 26
    sharp = images.clone()
    sharp[..., 1:-1, 1:-1] = _blend(smooth, images[..., 1:-1, 1:-1], factor)
    return sharp


def _cutout(images: Tensor, top: Tensor, left: Tensor, side: Tensor) -> Tensor:
    height, width = images.shape[2:]
    y = torch.arange(height, device=images.device)[:, None]
    x = torch.arange(width, device=images.device)
    cut = (y >= top) & (y < top + side) & (x >= left) & (x < left + side)
    colour = torch.tensor(raug15.CUTOUT, dtype=torch.uint8, device=images.device)[:, None, None]
    return torch.where(cut, colour, images)


Coordinates = tuple[Tensor, Tensor]
"""x and y float64, which broadcast to [N, 1, H, W]; the first pixel's centre is 0.5."""


def _rotated(x: Tensor, y: Tensor, height: int, width: int, degrees: Tensor) -> Coordinates:
    cos, sin = degrees.deg2rad().cos(), degrees.deg2rad().sin()
    x, y = x - width / 2, y - height / 2
    return cos * x - sin * y + width / 2, sin * x + cos * y + height / 2


def _fetched(source: Callable[[Tensor, Tensor, int, int, Tensor], Coordinates]) -> Callable[..., Tensor]:
    """Return the operation whose pixel (x, y) comes from `source(x, y, height, width, amount)` of its input.

    As in Pillow, places whose centre is outside are filled, taps beyond the border are the border's pixel, and values
    are truncated.
    """

    def operation(images: Tensor, amount: Tensor, kind: Tensor) -> Tensor:
        height, width = images.shape[2:]
        x = torch.arange(width, dtype=torch.float64, device=images.device) + 0.5
        y = torch.arange(height, dtype=torch.float64, device=images.device)[:, None] + 0.5
        x, y = torch.broadcast_tensors(*source(x, y, height, width, amount))
        inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
        left, across = _taps(x, kind)
        top, down = _taps(y, kind)
        flat = images.flatten(2)

        def tap(row: int, column: int) -> Tensor:
            places = (top + row).clamp(0, height - 1) * width + (left + column).clamp(0, width - 1)
            places = places.expand(len(images), 3, height, width).flatten(2)
            return flat.gather(2, places).view(images.shape).float()

        def mixed(of: Callable[[int], Tensor], weights: dict[int, Tensor]) -> Tensor:
            base = of(0)  # as differences, so that what is even stays what it is
            return sum((weight * (of(offset) - base) for offset, weight in weights.items()), base)

        found = _truncated(mixed(lambda row: mixed(lambda column: tap(row, column), across), down))
        return torch.where(inside, found, raug15.FILL[0])

    return operation


def _taps(places: Tensor, kind: Tensor) -> tuple[Tensor, dict[int, Tensor]]:
    """Return the pixel before each place, and the weights of its neighbours by their offset from it."""
    first = (places - 0.5).floor()
    distance = (places - 0.5 - first).float()
    bilinear, bicubic = raug15.bilinear(distance), raug15.bicubic(distance)
    is_bicubic = kind == Image.Resampling.BICUBIC
    return first.long(), {k: torch.where(is_bicubic, weight, bilinear.get(k, 0)) for k, weight in bicubic.items()}


OPERATIONS: dict[str, Callable[..., Tensor]] = {
    "AutoContrast": _autocontrast,
    "Equalize": _equalize,
    "Invert": lambda images: ~images,
    "Rotate": _fetched(_rotated),
    "Posterize": lambda images, mask: images & mask.to(torch.uint8),
    "Solarize": lambda images, least: torch.where(images >= least, ~images, images),
    "SolarizeAdd": _solarize_add,
    "Color": lambda images, factor: _blend(_grey(images), images, factor),
    "Contrast": _contrast,
    "Brightness": lambda images, factor: _blend(0, images, factor),
    "Sharpness": _sharpness,
    "ShearX": _fetched(lambda x, y, height, width, slope: (x + slope * y, y)),
    "ShearY": _fetched(lambda x, y, height, width, slope: (x, y + slope * x)),
    "TranslateXRel": _fetched(lambda x, y, height, width, share: (x + share * width, y)),
    "TranslateYRel": _fetched(lambda x, y, height, width, share: (x, y + share * height)),
    "Cutout": _cutout,
}
