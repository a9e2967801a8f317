"""Encoded bytes -> an image, by Pillow; or of plain JPEGs the same pixels, sooner, by simplejpeg."""

from __future__ import annotations

import contextlib
import io
import struct
from collections.abc import Callable
from typing import TypeVar

import numpy as np
import simplejpeg
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from repopt.images import to_rgb

T = TypeVar("T")

_FRAMES = {0xC0, 0xC1, 0xC2}  # markers of the frames that are not lossless, arithmetically coded or hierarchical
_BEFORE = {0xC4, 0xDB, 0xDD, *range(0xE0, 0xF0), 0xFE}  # of what stands before a frame: tables, applications' data
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
        return np.array(image)

    return _decoded(data, values)


def _decoded(data: bytes, decode: Callable[[Image.Image], T]) -> T:
    try:
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
    bits, height, width, components = _jpeg_frame(data)
    if bits == 8 and components in (1, 3) and height * width <= _max_pixels():
        with contextlib.suppress(ValueError):  # it is damaged, and Pillow says how
            return torch.from_numpy(simplejpeg.decode_jpeg(data))
    return torch.from_numpy(np.array(to_pillow(data)))


def _max_pixels() -> float:
    return Image.MAX_IMAGE_PIXELS or float("inf")


def _jpeg_frame(data: bytes) -> tuple[int, int, int, int]:
    """Return bits, height, width and components that a JPEG declares; zeros for what is none, or no plain one."""
    at = 2
    while data[:2] == b"\xff\xd8" and at + 4 + _FRAME.size <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker in _FRAMES:
            return _FRAME.unpack_from(data, at + 4)
        if marker not in _BEFORE:  # decoders skip bytes that fill, for example, and might come to another frame
            break
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return 0, 0, 0, 0
