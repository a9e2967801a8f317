"""Images per second of raug15's training input by DATA.DECODE: what a core makes, and what the device makes itself.
Beside them stands what RepOpt-VGG-B1 takes on an H100 at 60 % of its peak.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch
from reproduction.experiment import multiply_adds

from benchmarks.arguments import add_rounds, positive, rounds_of
from benchmarks.data import IMAGE_SIZE, InMemory
from benchmarks.photographs import described, of_one_size
from benchmarks.report import Row, Table
from benchmarks.timing import Rounds, Step, interleave
from data import Augmentation
from data.classification import ClassificationDataset
from data.decoded import Unreadable, collate, raise_on_bad
from data.gpu_decode import EncodedDataset, Packed, decode_jpegs, pack, unpack, vary
from data.transforms import CropAndFlip

H100_PEAK = 989e12  # operations per second, bf16, dense
MFU = 0.6


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this subject's arguments."""
    parser.add_argument("--batch-size", type=positive, default=256, help="(default: %(default)s)")
    add_rounds(parser, 20)


def run(arguments: argparse.Namespace, device: torch.device) -> Iterator[Table]:
    """Yield the tables; one thread does everything on the CPU."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rounds, encoded = rounds_of(arguments), of_one_size(arguments.batch_size)
        yield f"JPEGs of {described(encoded)}, batches of {len(encoded)}, on a core", on_a_core(encoded, rounds)
        yield "The same on the device, where DATA.DECODE is gpu", on_the_device(encoded, device, rounds)
    finally:
        torch.set_num_threads(threads)


def needed() -> float:
    """Return the images/s of RepOpt-VGG-B1 at 60 % of an H100's peak: an addition is an operation, and a multiplication
    is one, and the backward pass takes two of a forward pass.
    """
    return MFU * H100_PEAK / (multiply_adds("RepOpt-VGG-B1-target", IMAGE_SIZE) * 1e9 * 2 * 3)


def on_a_core(encoded: list[bytes], rounds: Rounds) -> list[Row]:
    """Return rows of what a worker does."""
    images, transform, items = InMemory(encoded), raug15(), [(0, index) for index in range(len(encoded))]
    cpu, gpu = ClassificationDataset(images, transform, 0), EncodedDataset(images, transform, 0)
    steps: dict[str, Step] = {
        "cpu: decoded and augmented": lambda: collate(cpu.__getitems__(items), raise_on_bad),
        "gpu: read and drawn": lambda: pack(gpu.__getitems__(items)),
    }
    return rows_of(interleave(steps, torch.device("cpu"), rounds=rounds), len(encoded), "DATA.DECODE", "cores")


def on_the_device(encoded: list[bytes], device: torch.device, rounds: Rounds) -> list[Row]:
    """Return rows of what the training's process does, whole and its two parts."""
    dataset, size = EncodedDataset(InMemory(encoded), raug15(), 0), IMAGE_SIZE
    packed = pack(dataset.__getitems__([(0, index) for index in range(len(encoded))]))
    assert isinstance(packed, Packed)
    jpegs = [*packed.buffer.split(packed.sizes)]
    drawn = [sample[0] for sample in packed.samples if not isinstance(sample, Unreadable)]
    decoded = list(zip(decode_jpegs(jpegs, device), drawn, strict=True))
    steps: dict[str, Step] = {
        "all": lambda: collate(unpack(packed, dataset, device), raise_on_bad),
        "decoded": lambda: decode_jpegs(jpegs, device),
        "cropped and augmented": lambda: vary(decoded, size),
    }
    return rows_of(interleave(steps, device, rounds=rounds), len(encoded), "step", "devices")


def raug15() -> CropAndFlip:
    """Return what is drawn and done."""
    return CropAndFlip(IMAGE_SIZE, "bilinear", Augmentation(preset="raug15"))


def rows_of(seconds: dict[str, float], count: int, first: str, units: str) -> list[Row]:
    """Return rows of times of `count` images, with how many cores or devices make what is needed."""
    need = needed()
    return [
        {
            first: name,
            "images/s": count / own,
            "ms per image": 1e3 * own / count,
            f"{units} for {need:,.0f} images/s": need * own / count,
        }
        for name, own in seconds.items()
    ]
