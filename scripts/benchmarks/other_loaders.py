"""Others' pipelines: JPEGs in memory -> random resized crop, flip -> a batch uint8 [N, 3, S, S], on one core."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_loader
from torch import Tensor
from torch.utils.data import Dataset, default_collate
from torchvision.transforms import RandomResizedCrop, v2

from benchmarks.timing import Step

Batches = Iterator[list[int]]
Maker = Callable[[list[bytes], Batches, int], Callable[[], Tensor]]
"""Of encoded images, the indices of one batch after the other, and a side in pixels: what makes the next batch."""

_AREA, _RATIO = (0.08, 1.0), (3 / 4, 4 / 3)


class _Pictures(Dataset):
    """Pillow's images; timm sets the transform."""

    transform: Any

    def __init__(self, encoded: list[bytes]) -> None:
        self.encoded = encoded

    def __len__(self) -> int:
        return len(self.encoded)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.transform(Image.open(io.BytesIO(self.encoded[index])).convert("RGB")), index


def timm_loader(encoded: list[bytes], batches: Batches, side: int) -> Callable[[], Tensor]:
    """timm's loader up to what its prefetcher sends to the device."""
    size = len(next(batches))
    prefetcher = create_loader(
        _Pictures(encoded),  # type: ignore[arg-type]  # it needs no more than a transform to set
        (3, side, side), size, is_training=True, color_jitter=None,  # type: ignore[arg-type]
         interpolation="bilinear",
        num_workers=0, persistent_workers=False, pin_memory=False, device=torch.device("cpu"),
    )  # fmt: skip

    def endless() -> Iterator[Tensor]:
        while True:
            for images, _ in prefetcher.loader:
                yield images

    return endless().__next__


def torchvision_v2(decode: Callable[[bytes], Tensor]) -> Maker:
    """Return torchvision's newer transforms after a decoder to uint8 [3, H, W]."""

    def make(encoded: list[bytes], batches: Batches, side: int) -> Callable[[], Tensor]:
        varied = v2.Compose([v2.RandomResizedCrop(side, _AREA, _RATIO), v2.RandomHorizontalFlip()])
        return lambda: default_collate([varied(decode(encoded[index])) for index in next(batches)])

    return make


def torchvision_decoder() -> Maker:
    """torchvision.io's decoder, which torchvision 0.29 calls deprecated, and its transforms."""
    from torchvision.io import decode_jpeg

    return torchvision_v2(lambda image: decode_jpeg(torch.from_numpy(np.frombuffer(image, np.uint8).copy())))


def torchcodec() -> Maker:
    """torchcodec's decoder and torchvision's transforms."""
    from torchcodec.decoders import decode_jpeg

    return torchvision_v2(decode_jpeg)


def dali() -> Maker:
    """DALI's fused decoder, which decodes no more than the crop's rows, on the CPU."""
    from nvidia.dali import Pipeline, fn, types

    def make(encoded: list[bytes], batches: Batches, side: int) -> Callable[[], Tensor]:
        arrays = [np.frombuffer(image, np.uint8) for image in encoded]
        first = next(batches)
        pipeline = Pipeline(len(first), 1, None, seed=0, prefetch_queue_depth=1, exec_async=False, exec_pipelined=False)
        with pipeline:
            jpegs = fn.external_source(source=lambda: [arrays[index] for index in next(batches)], dtype=types.UINT8)
            crops = fn.decoders.image_random_crop(jpegs, random_area=_AREA, random_aspect_ratio=_RATIO)
            resized = fn.resize(crops, size=(side, side), interp_type=types.INTERP_LINEAR, antialias=True)
            pipeline.set_outputs(fn.flip(resized, horizontal=fn.random.coin_flip()))
        pipeline.build()
        # Copied out: the pipeline's next batch takes its memory.
        return lambda: torch.from_numpy(np.array(pipeline.run()[0].as_tensor())).permute(0, 3, 1, 2)

    return make


def spdl() -> Maker:
    """SPDL: FFmpeg's decoder and filters, in one thread."""
    import spdl.io as io_

    def make(encoded: list[bytes], batches: Batches, side: int) -> Callable[[], Tensor]:
        def frames(image: bytes) -> Any:
            packets = io_.demux_image(image)
            whole = torch.empty(1).expand(3, packets.height, packets.width)  # of no memory: for its shape alone
            top, left, height, width = RandomResizedCrop.get_params(whole, _AREA, _RATIO)
            flip = "hflip," if torch.rand(1) < 0.5 else ""
            crop = f"crop={width}:{height}:{left}:{top}:exact=1"
            return io_.decode_packets(packets, f"{crop},scale={side}:{side}:flags=bilinear,{flip}format=rgb24")

        def step() -> Tensor:
            found = io_.to_torch(io_.convert_frames([frames(encoded[index]) for index in next(batches)]))
            return found.permute(0, 3, 1, 2)

        return step

    return make


_INSTALLED: Mapping[str, tuple[str, Callable[[], Maker]]] = {
    "torchcodec's decoder, torchvision v2": ("torchcodec", torchcodec),
    "DALI": ("nvidia-dali-cuda130", dali),
    "SPDL": ("spdl_io", spdl),
}  # name: the distribution, and what is imported from it


def others(encoded: list[bytes], batches: Callable[[int], Batches], side: int) -> dict[str, Step]:
    """Return what makes the next batch, by name; what is not installed or does not run is named in a line printed."""
    count = len(encoded)
    found: dict[str, Step] = {
        "timm's loader": timm_loader(encoded, batches(count), side),
        "torchvision's decoder, torchvision v2": torchvision_decoder()(encoded, batches(count), side),
    }
    for name, (distribution, load) in _INSTALLED.items():
        try:
            title = f"{name} ({distribution} {version(distribution)})"
            step = load()(encoded, batches(count), side)
            step()  # shared libraries are looked for at the first use
        except (PackageNotFoundError, ImportError, RuntimeError) as error:
            print(f'left out: {name} ({type(error).__name__}: {str(error)[:80]}); pip install -e ".[benchmark]"')
        else:
            found[title] = step
    return found
