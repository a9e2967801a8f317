"""Images per second of the training input: from JPEGs to uint8 batches on one core, by preset, against the textbook's
and other loaders' pipelines; zipped images, worker processes and threads; small images that live on the device.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import os
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate

import data
from benchmarks import baseline
from benchmarks.arguments import add_rounds, positive, rounds_of
from benchmarks.other_loaders import others, torchvision_v2
from benchmarks.photographs import as_imagenet, described, of_one_size
from benchmarks.report import Row, Table
from benchmarks.timing import Rounds, Step, interleave
from benchmarks.training_step import memory_format_on
from benchmarks.workers import augmented, workers
from data.decode import to_pixels
from data.decoded import collate, raise_on_bad
from data.on_device import Normalize
from data.registry import IMAGENET_MEAN, IMAGENET_STD, FileSpec, InMemorySpec
from data.resident import InMemoryDataset, InMemoryLoader, RandomCropFlip
from data.sampler import TrainSampler
from data.shards.write import WRITERS, write_split
from data.types import EncodedImages
from data.zipped import CACHE_MODES
from repopt.errors import UserError

BATCH = 32
IMAGE_SIZE = 224
SMALL_BATCH = 128  # of images of 32 x 32
SMALL_IMAGES = "small-images"


class InMemory(EncodedImages):
    """Encoded images without a disk; `data.types.EncodedImages`."""

    def __init__(self, encoded: list[bytes]) -> None:
        self.encoded, self.labels = encoded, torch.arange(len(encoded))

    def __len__(self) -> int:
        return len(self.encoded)

    def read(self, index: int) -> bytes:
        """Return the encoded bytes of one image."""
        return self.encoded[index]

    def name(self, index: int) -> str:
        """Return the number of an image."""
        return str(index)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this subject's arguments."""
    parser.add_argument("--images", type=positive, default=256, help="photographs to make (default: %(default)s)")
    parser.add_argument("--small-images", type=positive, default=10_000, help="of 32 x 32 (default: %(default)s)")
    add_rounds(parser, 20)
    parser.add_argument("--only", choices=[SMALL_IMAGES], help="leave out all else, which needs no device")


def run(arguments: argparse.Namespace, device: torch.device) -> Iterator[Table]:
    """Yield the tables; one thread does everything but the worker processes' work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rounds = rounds_of(arguments)
        if arguments.only != SMALL_IMAGES:
            batch = f"{BATCH} x 3 x {IMAGE_SIZE} x {IMAGE_SIZE}"
            for kind, make in {"of one size": of_one_size, "as ImageNet's": as_imagenet}.items():
                encoded = make(max(arguments.images, BATCH))
                title = f"JPEGs {kind}, on average {described(encoded)} -> batches of {batch}, one core"
                with one_core():
                    rows = presets(encoded, rounds)
                yield title, rows
            with image_files(encoded) as root:
                yield "The same images from files: reading them", reading(root, rounds)
                yield (
                    "The same images from files: worker processes and threads",
                    workers(training_images(root), BATCH, IMAGE_SIZE, rounds),
                )
        title = "Images of 32 x 32 -> normalised batches on the device, one core"
        yield title, small_images(arguments.small_images, device, rounds.some(10))
    finally:
        torch.set_num_threads(threads)


@contextlib.contextmanager
def one_core() -> Iterator[None]:
    """Keep this thread, and those that it starts, on one core, where the system can."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(cores)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


def presets(encoded: list[bytes], rounds: Rounds) -> list[Row]:
    """Return rows of a batch by the textbook, by others' loaders, and by ours.

    The textbook's is normalised, by the same core; ours is where the training is, so that it is measured with and
    without.
    """
    seconds = interleave(
        {
            "weak: textbook": one_by_one(encoded, baseline.imagenet()),
            **{f"weak: {name}": step for name, step in others(encoded, batches, IMAGE_SIZE).items()},
            "weak: our decoder, torchvision v2": torchvision_v2(lambda image: to_pixels(image).permute(2, 0, 1))(
                encoded, batches(len(encoded)), IMAGE_SIZE
            ),
            "weak: uint8": ours(encoded, "weak"),
            "weak: normalised": ours(encoded, "weak", normalised=True),
            "raug15: textbook": one_by_one(encoded, baseline.imagenet(baseline.raug15)),
            "raug15: uint8": ours(encoded, "raug15"),
            "raug15: normalised": ours(encoded, "raug15", normalised=True),
        },
        torch.device("cpu"),
        rounds=rounds,
    )
    return [
        {
            "pipeline": name,
            "images/s": BATCH / own,
            "ms per image": 1e3 * own / BATCH,
            "speed / textbook": seconds[f"{name.partition(':')[0]}: textbook"] / own,
        }
        for name, own in seconds.items()
    ]


def batches(count: int) -> Iterator[list[int]]:
    """Yield the indices of one batch after the other, without end."""
    cycle = itertools.cycle(range(count))
    while True:
        yield list(itertools.islice(cycle, BATCH))


def one_by_one(encoded: list[bytes], transform: Callable[[bytes], Tensor]) -> Step:
    """Return what makes the next batch as a loader's worker does that transforms images one by one."""
    indices = batches(len(encoded))
    return lambda: default_collate([(transform(encoded[index]), index) for index in next(indices)])


def ours(encoded: list[bytes], preset: str, *, normalised: bool = False) -> Callable[[], Tensor]:
    """Return what makes the next batch as a worker of our loader does, or as it arrives at the training."""
    dataset, indices, epochs = (
        augmented(InMemory(encoded), preset, IMAGE_SIZE),
        batches(len(encoded)),
        itertools.count(),
    )
    cpu = torch.device("cpu")
    normalize = Normalize(IMAGENET_MEAN, IMAGENET_STD, cpu, torch.contiguous_format)

    def step() -> Tensor:
        epoch = next(epochs)  # other crops and operations every time, as the textbook's generators give
        batch = collate(dataset.__getitems__([(epoch, index) for index in next(indices)]), raise_on_bad)
        assert not isinstance(batch, UserError)
        images = batch[0][0].permute(0, 3, 1, 2)
        return normalize(images) if normalised else images

    return step


@contextlib.contextmanager
def image_files(encoded: list[bytes]) -> Iterator[Path]:
    """Yield a folder with the images in class folders (train/, val/) and in zips with their maps."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        for split, images in (("train", encoded), ("val", encoded[:4])):
            lines = []
            with zipfile.ZipFile(root / f"{split}.zip", "w") as archive:
                for index, image in enumerate(images):
                    path = Path(f"class{index % 4}", f"{index}.jpg")
                    (root / split / path).parent.mkdir(parents=True, exist_ok=True)
                    (root / split / path).write_bytes(image)
                    archive.writestr(str(path), image)
                    lines.append(f"{path}\t{index % 4}\n")
            (root / f"{split}_map.txt").write_text("".join(lines))
        yield root


def reading(root: Path, rounds: Rounds) -> list[Row]:
    """Return rows of reading an image from class folders, a zip in every cache mode and shards, from the page cache."""
    opened = {"class folders": training_images(root)}
    for mode in CACHE_MODES:
        share = " (of 2 processes)" if mode == "part" else ""
        opened[f"zip, cache {mode}{share}"] = training_images(root, zip_mode=True, cache_mode=mode)
    for form in WRITERS:
        write_split(opened["class folders"], (), root / form, "train", form, per_shard=100)
        opened[f"shards, {form}"] = training_images(root / form, form)

    # A process reads those of its own shard, which are what it caches in part.
    shard = range(0, len(opened["class folders"].labels), 2)

    def read(images: EncodedImages) -> None:
        for index in shard:
            images.read(index)

    steps = {name: functools.partial(read, images) for name, images in opened.items()}
    seconds = interleave(steps, torch.device("cpu"), rounds=rounds)
    return [{"images": name, "us per image": 1e6 * own / len(shard)} for name, own in seconds.items()]


def training_images(root: Path, form: str = "folder", **how: Any) -> EncodedImages:
    """Return the training images of a folder, for the first of two processes."""
    source = data.Source(form, str(root), **how)
    return data.registry.find(source, FileSpec).open(source, "train", 4, 0, 2)


def small_images(count: int, device: torch.device, rounds: Rounds) -> list[Row]:
    """Return rows of an epoch by the textbook, image by image on the CPU, and by ours, in batches on the device."""
    pixels = np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
    rows: list[Row] = []
    for name in ("cf100", "digits"):
        contenders = {"textbook": per_image(name, pixels, device), "resident": resident(name, pixels, device)}
        seconds = interleave(contenders, device, rounds=rounds, warm_up=1)
        for pipeline, own in seconds.items():
            speed = seconds["textbook"] / own
            rows.append({"images": name, "pipeline": pipeline, "images/s": count / own, "speed / textbook": speed})
    return rows


def per_image(dataset: str, pixels: np.ndarray, device: torch.device) -> Step:
    """Return an epoch of images that are transformed one by one, and brought to the device in batches."""
    transform = baseline.small(dataset)

    def epoch() -> None:
        for start in range(0, len(pixels) - SMALL_BATCH + 1, SMALL_BATCH):
            default_collate([transform(image) for image in pixels[start : start + SMALL_BATCH]]).to(device)

    return epoch


def resident(dataset: str, pixels: np.ndarray, device: torch.device) -> Step:
    """Return an epoch of our loader."""
    loader, epochs = resident_loader(dataset, pixels, device), itertools.count()

    def epoch() -> None:
        loader.set_epoch(next(epochs))
        for _ in loader:
            pass

    return epoch


def resident_loader(
    dataset: str, pixels: np.ndarray, device: torch.device, batch_size: int = SMALL_BATCH
) -> InMemoryLoader:
    """Return training batches, as of a data set, of images uint8 [N, H, W, 3] on the device; all are of class 0."""
    row = data.registry.find(data.Source(dataset), InMemorySpec)
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous().to(device)
    crop = RandomCropFlip(images, padding=row.padding, flip=row.flip, seed=0)
    return InMemoryLoader(
        InMemoryDataset(images, torch.zeros(len(images), dtype=torch.int64, device=device), crop),
        TrainSampler(len(images), batch_size, 0, 1, 0),
        Normalize(row.mean, row.std, device, memory_format_on(device)),
    )
