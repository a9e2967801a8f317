"""Training images that a GPU decodes and augments: workers only read files and draw the variations.

What an image gets follows from (seed, epoch, index) as on the CPU, by the same draws; pixels differ by rounding, and by
what decoders make of a JPEG. Evaluation decodes on the CPU always: accuracies rest on Pillow's pixels.

A worker sends the files of a batch as one tensor, since each tensor takes a file descriptor. A thread decodes, crops
and varies the next batch on a stream of its own while the training is at the last one: the decoder lets its caller
wait. What is no plain JPEG a worker decodes and varies as ever.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg
from typing_extensions import override

from data import raug15_batched
from data.decode import plain_jpeg_size, to_pixels
from data.decoded import Collated, DecodedLoader, ImageDataset, Sample, Unreadable
from data.loader import BatchAugmentation
from data.sampler import Sampler
from data.transforms import CropAndFlip, Variation
from data.types import Augmentation, EncodedImages, LoaderConfig
from repopt.errors import UserError, one_line, unknown

DECODE = ("auto", "cpu", "gpu")
PRESETS = ("weak", "raug15")
_CHUNK = 64  # images that lie decoded on the device at a time
# Of an image's sides to what is made of it: larger ones would fill the memory, a kernel's shared one too.
_MAX_SCALE = 16

_END = b"\xff\xd9"
_ADOBE = b"\xff\xee\x00\x0eAdobe"  # begins a segment whose last byte is 0 where three components are red, green, blue
_RED_GREEN = b"R\x11\x00G\x11\x00"  # components of that name


def wanted(decode: str, augmentation: Augmentation, device: torch.device) -> bool:
    """Return whether the device decodes images for training; 'auto' is 'cpu', for 'gpu' is not yet measured.

    Raises:
        UserError: an unknown name; 'gpu' without one, or with an augmentation that is not made there.
    """
    if decode not in DECODE:
        raise unknown("place to decode", decode, DECODE)
    if decode != "gpu":
        return False
    if device.type != "cuda":
        raise UserError(f"DATA.DECODE gpu needs a CUDA device, and this training is on {device}: set auto or cpu")
    if augmentation.preset not in PRESETS:
        raise UserError(
            f"DATA.DECODE gpu makes the augmentations of AUG.PRESET {' and '.join(PRESETS)}, not of "
            f"{augmentation.preset}: set one of them, or DATA.DECODE cpu"
        )
    return True


def decode_jpegs(encoded: list[Tensor], device: torch.device) -> list[Tensor]:
    """Return images uint8 [3, H, W] on the device, of JPEGs uint8 [N] on the CPU; on a GPU nvJPEG decodes them.

    Raises:
        RuntimeError: one is damaged; it is not said which.
    """
    return decode_jpeg(encoded, ImageReadMode.RGB, device)


class Encoded(NamedTuple):
    """A plain JPEG, uint8 [N], and its variation."""

    data: Tensor
    variation: Variation


class Packed(NamedTuple):
    """A batch as a worker sends it.

    Attributes:
        buffer: uint8 [N]; the contents one after the other.
        sizes: bytes of each sample's content.
        samples: with the variation in the place of a JPEG, and None in that of pixels.
    """

    buffer: Tensor
    sizes: list[int]
    samples: list[Sample | Unreadable]


class EncodedDataset(ImageDataset):
    """Images with one label each, which are sent encoded where they are plain JPEGs.

    Attributes:
        transform: what is drawn and done.
    """

    def __init__(self, images: EncodedImages, transform: CropAndFlip, seed: int) -> None:
        super().__init__(images, images.labels, seed)
        self.transform = transform

    @override
    def sample(self, index: int) -> tuple[Tensor | Encoded, int]:
        return self._image(self._images.read(index)), int(self._images.labels[index])

    def _image(self, data: bytes) -> Tensor | Encoded:
        size = plain_jpeg_size(data)
        if size and min(size) > 0 and max(size) <= _MAX_SCALE * self.transform.image_size and _is_sound(data):
            return Encoded(torch.frombuffer(bytearray(data), dtype=torch.uint8), self.transform.draw(*size))
        return self.transform(data)


def _is_sound(data: bytes) -> bool:
    """Return whether decoders agree upon a plain JPEG: it is complete, and not stored as red, green and blue."""
    adobe = data.find(_ADOBE)
    stored_as_rgb = (adobe >= 0 and data[adobe + 15] == 0) or _RED_GREEN in data
    return data.endswith(_END) and not stored_as_rgb


def pack(samples: list[Sample | Unreadable] | UserError) -> Packed | UserError:
    """Return a batch in one tensor; a refusal as it is."""
    if isinstance(samples, UserError):
        return samples
    contents = [torch.empty(0, dtype=torch.uint8)]
    light: list[Sample | Unreadable] = []
    for sample in samples:
        if isinstance(sample, Unreadable):
            light.append(sample)
            continue
        image, target, index = sample
        is_encoded = isinstance(image, Encoded)
        contents.append(image.data if is_encoded else image.flatten())
        light.append((image.variation if is_encoded else None, target, index))
    return Packed(torch.cat(contents), [len(content) for content in contents[1:]], light)


def unpack(packed: Packed, dataset: EncodedDataset, device: torch.device) -> list[Sample | Unreadable]:
    """Return the samples with their images on the device, uint8 [H, W, 3]; where one is damaged, what says so."""
    samples, contents = list(packed.samples), iter(packed.buffer.split(packed.sizes))
    side = dataset.transform.image_size
    waiting: list[tuple[int, Encoded]] = []
    for place, sample in enumerate(packed.samples):
        if isinstance(sample, Unreadable):
            continue
        (drawn, *rest), content = sample, next(contents)
        if drawn is None:
            samples[place] = content.view(side, side, 3).to(device), *rest
        else:
            waiting.append((place, Encoded(content, drawn)))
    for start in range(0, len(waiting), _CHUNK):
        places, encoded = zip(*waiting[start : start + _CHUNK], strict=True)
        for place, image in zip(places, _made(encoded, dataset.transform, device), strict=True):
            _, target, index = samples[place]
            samples[place] = dataset.unreadable(index, image) if isinstance(image, OSError) else (image, target, index)
    return samples


def _made(encoded: Sequence[Encoded], transform: CropAndFlip, device: torch.device) -> Iterator[Tensor | OSError]:
    """Yield images uint8 [H, W, 3]; one that the device cannot decode is the CPU's, as is what is wrong with it."""
    decoded = _decoded([data for data, _ in encoded], device)
    sound = [(image, drawn) for (_, drawn), image in zip(encoded, decoded, strict=True) if image is not None]
    varied = iter(vary(sound, transform.image_size) if sound else ())
    for (data, drawn), image in zip(encoded, decoded, strict=True):
        if image is not None:
            yield next(varied).permute(1, 2, 0)
            continue
        try:
            yield transform.vary(to_pixels(data.numpy().tobytes()), drawn).to(device)
        except OSError as error:
            yield error


def _decoded(encoded: list[Tensor], device: torch.device) -> list[Tensor | None]:
    """Return images as `decode_jpegs`, and None for those that it cannot decode."""
    try:
        return [*decode_jpegs(encoded, device)]
    except RuntimeError:
        if len(encoded) == 1:
            return [None]
    return [image for one in encoded for image in _decoded([one], device)]


def vary(images: Sequence[tuple[Tensor, Variation]], size: int) -> Tensor:
    """Return uint8 [N, 3, size, size] of images uint8 [3, H, W], as `CropAndFlip.vary` does it one by one."""
    crops = [
        F.interpolate(
            image[None, :, drawn.top : drawn.top + drawn.height, drawn.left : drawn.left + drawn.width].float(),
            (size, size),  # in uint8 on CPUs only
            mode=drawn.interpolation,
            antialias=True,
        )
        for image, drawn in images
    ]
    batch = torch.cat(crops).add_(0.5).clamp_(0, 255).to(torch.uint8)
    mirrored = torch.tensor([drawn.mirrored for _, drawn in images]).to(batch.device)[:, None, None, None]
    return raug15_batched.apply(torch.where(mirrored, batch.flip(3), batch), [drawn.operations for _, drawn in images])


class EncodedLoader(DecodedLoader):
    """A loader whose images the device decodes, in a thread, one batch ahead.

    Raises:
        UserError: as `DecodedLoader`; the device cannot decode JPEGs.
    """

    def __init__(
        self,
        dataset: EncodedDataset,
        sampler: Sampler,
        normalize: Callable[[Any], Any],
        augmentations: Sequence[BatchAugmentation] = (),
        *,
        collate: Callable[[list[Sample | Unreadable]], Collated],
        cfg: LoaderConfig,
    ) -> None:
        # The decoder reads the bytes on the CPU.
        of_workers = replace(cfg, pin_memory=False)
        super().__init__(dataset, sampler, normalize, augmentations, collate=pack, cfg=of_workers)
        self._encoded, self._collate = dataset, collate
        self._stream = torch.cuda.Stream(cfg.device) if cfg.device.type == "cuda" else None
        _check(cfg.device)

    @override
    def _collated(self) -> Iterator[Collated]:
        with ThreadPoolExecutor(1) as thread:
            ahead: Future[Collated] | None = None
            for packed in self._workers:
                ready, ahead = ahead, thread.submit(self._batch, packed)
                if ready:
                    yield self._received(ready.result())
            if ahead:
                yield self._received(ahead.result())

    def _batch(self, packed: Packed | UserError) -> Collated:
        """Return what `collate` makes of a batch, ready on the device."""
        if isinstance(packed, UserError):
            return packed
        with torch.cuda.stream(self._stream) if self._stream else nullcontext():
            batch = self._collate(unpack(packed, self._encoded, self._device))
        if self._stream:
            self._stream.synchronize()
        return batch

    def _received(self, batch: Collated) -> Collated:
        """Return a batch, whose memory the thread's stream takes again only when the training is done with it."""
        if self._stream and not isinstance(batch, UserError):
            batch[0][0].record_stream(torch.cuda.current_stream(self._device))
        return batch


def _check(device: torch.device) -> None:
    """Raise a UserError where the device cannot decode JPEGs at all."""
    file = io.BytesIO()
    Image.new("RGB", (16, 16)).save(file, "JPEG")
    try:
        decode_jpegs([torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)], device)
    except RuntimeError as error:
        raise UserError(f"DATA.DECODE gpu: torchvision cannot decode a JPEG on {device} ({one_line(error)})") from None
