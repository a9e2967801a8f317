"""What a trained network finds in picture files."""

from __future__ import annotations

import glob
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from overlays import colored, outlined
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS
from tqdm import tqdm

from data.decode import to_pillow
from repopt import segmentation
from repopt.errors import UserError, one_line
from repopt.load import Loaded
from train.keys import CLASSIFY, DETECT, SEGMENT


class Answer(NamedTuple):
    """What was found in a picture.

    Attributes:
        picture: its path.
        found: of a classifier its most likely classes, of a segmentation network the classes of the pixels, of a
            detector the objects: texts and numbers by name, the same names for all.
        error: why the picture cannot be read; else None.
    """

    picture: str
    found: list[dict[str, Any]]
    error: str | None = None


class _Picture(NamedTuple):
    pixels: Tensor  # uint8 (3, H, W)
    network_input: Tensor  # float32 (C, h, w)


class _Pictures(Dataset):
    """Pictures, or why they cannot be read."""

    def __init__(self, paths: Sequence[str], transform: Callable[[Image.Image], Tensor]) -> None:
        self._paths, self._transform = paths, transform

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> _Picture | str:
        try:
            image = to_pillow(Path(self._paths[index]).read_bytes())
        except OSError as error:
            return one_line(error)
        return _Picture(torch.from_numpy(np.array(image)).permute(2, 0, 1), self._transform(image))


class Finder:
    """Asks a network, and draws what it finds.

    Args:
        loaded: the network.
        top_k: how many classes of a picture a classifier names.
        min_score: of objects that a detector names.
        draw: called with the number of a picture and the drawn one, uint8 (3, H, W); not of a classifier.
    """

    def __init__(self, loaded: Loaded, *, top_k: int, min_score: float, draw: Callable[[int, Tensor], None]) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.network = loaded.network.to(self.device)
        self.loaded, self._top_k, self._min_score, self._draw = loaded, top_k, min_score, draw
        self._find = {CLASSIFY: self._classes, SEGMENT: self._regions, DETECT: self._objects}[loaded.task]

    @torch.inference_mode()
    def __call__(self, paths: Sequence[str], *, batch_size: int, workers: int) -> Iterator[Answer]:
        """Yield what is found in picture files, in their order, and show the progress on a terminal."""
        pictures = _Pictures(paths, self.loaded.transform)
        size = batch_size if self.loaded.task == CLASSIFY else 1  # pictures differ in size
        loader = DataLoader(pictures, batch_size=size, num_workers=workers, collate_fn=list)
        done = 0
        for batch in tqdm(loader, unit="batch", leave=False, disable=None):
            readable = {done + k: picture for k, picture in enumerate(batch) if not isinstance(picture, str)}
            found = self._find(readable) if readable else iter(())
            for number, picture in enumerate(batch, start=done):
                unreadable = isinstance(picture, str)
                yield Answer(paths[number], [] if unreadable else next(found), picture if unreadable else None)
            done += len(batch)

    def name(self, index: int) -> str:
        """Return what a class is called, its index where it has no name."""
        return self.loaded.classes[index] if index < len(self.loaded.classes) else str(index)

    def _classes(self, pictures: dict[int, _Picture]) -> Iterator[list[dict[str, Any]]]:
        images = torch.stack([picture.network_input for picture in pictures.values()]).to(self.device)
        scores = self.network(images).float().softmax(1)
        best = scores.topk(min(self._top_k, scores.shape[1]))
        for values, indices in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            yield [{"class": self.name(index), "score": value} for value, index in zip(values, indices, strict=True)]

    def _regions(self, pictures: dict[int, _Picture]) -> Iterator[list[dict[str, Any]]]:
        for number, picture in pictures.items():
            labels = _segment(self.network, picture.network_input[None].to(self.device)).argmax(1)[0].cpu()
            count = max(len(self.loaded.classes), int(labels.max()) + 1)
            shares = (labels.flatten().bincount(minlength=count) / labels.numel()).tolist()
            self._draw(number, colored(picture.pixels, labels, count))
            order = sorted(range(count), key=lambda index: -shares[index])
            yield [{"class": self.name(index), "share": shares[index]} for index in order if shares[index]]

    def _objects(self, pictures: dict[int, _Picture]) -> Iterator[list[dict[str, Any]]]:
        for number, picture in pictures.items():
            (found,) = self.network([picture.network_input.to(self.device)])
            names = [self.name(index) for index in range(max([len(self.loaded.classes), *found["labels"].tolist()]))]
            self._draw(number, outlined(picture.pixels, found, names, self._min_score))
            rows = zip(found["labels"].tolist(), found["scores"].tolist(), found["boxes"].tolist(), strict=True)
            yield [
                {"class": names[label - 1], "score": score, **dict(zip(("x1", "y1", "x2", "y2"), box, strict=True))}
                for label, score, box in rows
                if score >= self._min_score
            ]


def _segment(network: nn.Module, images: Tensor) -> Tensor:
    """Return logits (N, num_classes, H, W); a network for one size sees windows of it, and padded pictures."""
    height, width = images.shape[2:]
    window = getattr(network, "input_shape", (None,))[1:]  # of an ONNX file
    if not window:
        return segmentation.predict(network, images)
    missing = max(0, window[1] - width), max(0, window[0] - height)
    padded = nn.functional.pad(images, (0, missing[0], 0, missing[1]))
    return segmentation.predict(network, padded, window)[:, :, :height, :width]


def find_pictures(patterns: Sequence[str]) -> list[str]:
    """Return the paths of pictures: files as they are named, those in folders sorted, without hidden ones.

    Raises:
        UserError: nothing is there.
    """
    found: list[str] = []
    for pattern in patterns:
        root = Path(pattern)
        if root.is_dir():
            below = sorted(path for path in root.rglob("*") if path.suffix.lower() in IMG_EXTENSIONS and path.is_file())
            own = [str(p) for p in below if not any(part.startswith(".") for part in p.relative_to(root).parts)]
        elif root.is_file():
            own = [pattern]
        else:
            there = glob.glob(pattern, recursive=True)  # noqa: PTH207 (Path's takes hidden folders)
            own = sorted(path for path in there if Path(path).is_file())
        if not own:
            raise UserError(f"there are no pictures at {pattern!r}")
        found += own
    return list(dict.fromkeys(found))
