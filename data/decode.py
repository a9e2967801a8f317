"""Encoded bytes -> an image, by Pillow; or of plain JPEGs the same pixels, sooner, by simplejpeg.

In every task an image is what viewers show: where a tag in the file (EXIF's orientation) says that the stored pixels
are to be turned or mirrored, they are. Boxes, masks and label images are of that image.
"""

from __future__ import annotations

import contextlib
import io
import struct
import warnings
from collections.abc import Callable
from typing import TypeVar

import numpy as np
import simplejpeg
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from repopt.images import to_rgb, turn_of, turned

T = TypeVar("T")

_FRAMES = {0xC0, 0xC1, 0xC2}  # markers of the frames that are not lossless, arithmetically coded or hierarchical
_METADATA = 0xE1  # EXIF or XMP
_SCAN = 0xDA
_BEFORE = {0xC4, 0xDB, 0xDD, *range(0xE0, 0xF0), 0xFE}  # of what stands before a scan: tables, applications' data
_FRAME = struct.Struct(">BHHB")  # bits, height, width, components


def to_pillow(data: bytes) -> Image.Image:
    """Return an RGB image; of 16 bits in one channel, as of 16 in three, the upper 8.

    Raises:
        OSError: the bytes are no image that Pillow can decode, one of more pixels than Pillow's limit, or one whose
            values have no range (32 bits or floating point in one channel).
    """
    return _decoded(data, to_rgb)


def to_values(data: bytes) -> np.ndarray:
    """Return what the file holds for each pixel: of a greyscale or palette image its values or indices, uint8 [H, W].

    Raises:
        OSError: as `to_pillow`.
    """

    def values(image: Image.Image) -> np.ndarray:
        image.load()  # its error is Pillow's
        return np.array(turned(image))

    return _decoded(data, values)


def advice_on_size(data: bytes) -> str:
    """Return what a message about an image's size ends with: nothing, unless a tag in the file turns the image."""
    if not _is_turned(data):
        return ""
    return "; its EXIF tag turns it: annotate it as viewers show it, or store it turned, without the tag"


def _is_turned(data: bytes) -> bool:
    return _decoded(data, turn_of) is not None


def _decoded(data: bytes, decode: Callable[[Image.Image], T]) -> T:
    try:
        with warnings.catch_warnings(action="ignore"):  # of damaged tags
            image = Image.open(io.BytesIO(data))
            pixels = image.width * image.height
            if pixels <= _max_pixels():
                return decode(image)
    except UnidentifiedImageError as error:  # its own message is a memory address
        raise OSError("no image of a format that Pillow knows") from error
    except Exception as error:  # nothing but Pillow runs here, whose decoders raise many kinds at damaged bytes
        raise OSError(f"{type(error).__name__}: {error}") from error
    raise OSError(f"{pixels} pixels, more than the limit of {_max_pixels()}")  # where Pillow only warns


def to_pixels(data: bytes) -> Tensor:
    """Return uint8 [H, W, 3], the pixels of `to_pillow`.

    Raises:
        OSError: as `to_pillow`.
    """
    if plain_jpeg_size(data):
        with contextlib.suppress(ValueError):  # it is damaged, and Pillow says how
            return torch.from_numpy(simplejpeg.decode_jpeg(data))
    return torch.from_numpy(np.array(to_pillow(data)))


def plain_jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Return height and width of a JPEG in grey or colours that is shown as it is stored; None for all else."""
    bits, height, width, components, tagged = _jpeg_frame(data)
    plain = bits == 8 and components in (1, 3) and height * width <= _max_pixels()
    return (height, width) if plain and not (tagged and _is_turned(data)) else None


def _max_pixels() -> float:
    return Image.MAX_IMAGE_PIXELS or float("inf")


def _jpeg_frame(data: bytes) -> tuple[int, int, int, int, bool]:
    """Return what a JPEG declares before its first scan; zeros for what is none, or no plain one.

    Returns:
        Bits, height, width, components, and whether there may be a tag that turns the image.
    """
    at, frame, tagged = 2, (0, 0, 0, 0), False
    while data[:2] == b"\xff\xd8" and at + 4 + _FRAME.size <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == _SCAN:
            return *frame, tagged
        if marker in _FRAMES and not any(frame):
            frame = _FRAME.unpack_from(data, at + 4)
        elif marker not in _BEFORE:  # decoders skip bytes that fill, for example, and might come to another frame
            break
        tagged |= marker == _METADATA
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return 0, 0, 0, 0, False
