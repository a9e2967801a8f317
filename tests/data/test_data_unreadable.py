"""Images that cannot be read: skipped or an error, in folders and zips, in training and evaluation."""

import logging
import shutil
import struct
import zipfile
import zlib

import pytest
import torch
from data_helpers import error_of, eval_loader, train_loader

from data import Augmentation, Source, describe
from repopt.errors import UserError
from train.logging import logger

CPU = torch.device("cpu")
COMMON = {"image_size": 24, "interpolation": "bilinear", "num_classes": 12, "device": CPU}
AUGMENTATION = Augmentation(reprob=0.5)


def png_of(width, height):
    """A PNG that claims a size, and ends where its pixels begin."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        for name, content in chunks
    )


DAMAGES = {  # what becomes of a file's content, and what the reason says
    "truncated": (lambda content: content[:-40], "truncated"),
    "empty": (lambda content: b"", "no image of a format"),
    "text": (lambda content: b"<html>404 not found</html>\n", "no image of a format"),
    "bomb": (lambda content: png_of(60_000, 60_000), "pixels"),
    "half a bomb": (lambda content: png_of(12_000, 12_000), "pixels"),  # Pillow only warns
    "broken header": (lambda content: content[:200] + b"\xff\xc0\x00" + content[203:], ""),
}


class Images:
    """A copy of the image folder, as folders or in zips, some of whose images are damaged."""

    def __init__(self, folder, root, zipped):
        shutil.copytree(folder, root / "folders")
        self._folders, self._zips = root / "folders", root / "zips" if zipped else None
        self.root = self._zips or self._folders
        self.paths = {split: sorted((self._folders / split).glob("*/*")) for split in ("train", "val")}
        if zipped:
            self._pack()

    def _pack(self):
        self._zips.mkdir(exist_ok=True)
        for split, paths in self.paths.items():
            names = [path.relative_to(self._folders / split).as_posix() for path in paths]
            with zipfile.ZipFile(self._zips / f"{split}.zip", "w") as archive:
                for path, name in zip(paths, names, strict=True):
                    archive.write(path, name)
            labels = "".join(f"{name}\t{int(name[5:7])}\n" for name in names)
            (self._zips / f"{split}_map.txt").write_text(labels)

    def damage(self, split, indices, how):
        for index in indices:
            path = self.paths[split][index]
            path.write_bytes(how(path.read_bytes()))
        if self._zips:
            self._pack()

    def name(self, split, index):
        path = self.paths[split][index]
        return f"{self._zips / split}.zip@/{path.relative_to(self._folders / split)}" if self._zips else str(path)

    def loader(self, split, on_bad_image="skip", workers=0, batch_size=8, augmentation=AUGMENTATION):
        source = Source("folder", str(self.root), self._zips is not None, "part", on_bad_image)
        settings = COMMON | {"batch_size": batch_size, "num_workers": workers}
        if split == "val":
            return eval_loader(source, crop=False, **settings)
        return train_loader(source, augmentation, label_smoothing=0.1, **settings)


@pytest.fixture(params=(False, True), ids=("folder", "zip"))
def images(request, image_folder, tmp_path):
    return Images(image_folder, tmp_path, request.param)


@pytest.fixture
def folder(image_folder, tmp_path):
    return Images(image_folder, tmp_path, zipped=False)


@pytest.fixture
def warnings(caplog, monkeypatch):
    monkeypatch.setattr(logger, "propagate", True)
    caplog.set_level(logging.WARNING, logger.name)
    return lambda: [record.getMessage() for record in caplog.records if record.name == logger.name]


def by_index(loader):
    """(index, image, target) in the order of the batches, batch by batch."""
    return [
        list(zip(indices.tolist(), *batch, strict=True))
        for indices, batch in zip(loader._sampler.batches(0), loader, strict=True)
    ]


@pytest.mark.parametrize("workers", (0, 2))
@pytest.mark.parametrize("damage", DAMAGES)
def test_another_image_of_the_batch_takes_its_place_in_training(images, warnings, damage, workers):
    intact = by_index(images.loader("train"))
    second = [index for index, _, _ in intact[1]]
    bad = {intact[0][2][0], second[0], second[3], second[4], second[7]}  # one in the middle, several round the end
    how, reason = DAMAGES[damage]
    images.damage("train", bad, how)
    loader = images.loader("train", workers=workers)
    actual = by_index(loader)
    for batch, whole in zip(actual, intact, strict=True):
        for k, (_, image, target) in enumerate(batch):
            _, expected, label = next(item for item in whole[k:] + whole[:k] if item[0] not in bad)
            assert torch.equal(image, expected)
            assert target == label
    assert loader.unreadable.keys() == {images.name("train", index) for index in bad}
    assert all(reason in r and "\n" not in r for r in loader.unreadable.values())
    list(loader)
    assert warnings() == [f"cannot read image {name!r} ({r})" for name, r in loader.unreadable.items()]


@pytest.mark.parametrize("workers", (0, 2))
@pytest.mark.parametrize("damage", DAMAGES)
def test_it_stays_in_the_evaluation_as_an_image_without_a_label(images, warnings, damage, workers):
    intact = by_index(images.loader("val", batch_size=5))
    black = images.loader("val")._normalize(torch.zeros(1, 3, 24, 24, dtype=torch.uint8))[0]
    how, reason = DAMAGES[damage]
    images.damage("val", (0, 10, 11), how)  # the last batch has no other
    loader = images.loader("val", workers=workers, batch_size=5)
    for batch, whole in zip(by_index(loader), intact, strict=True):
        assert len(batch) == len(whole)
        for (index, image, target), (_, expected, label) in zip(batch, whole, strict=True):
            assert torch.equal(image, black if index in (0, 10, 11) else expected)
            assert target == (-100 if index in (0, 10, 11) else label)
    assert list(loader.unreadable) == [images.name("val", index) for index in (0, 10, 11)]
    assert all(reason in r for r in loader.unreadable.values())
    assert len(warnings()) == 3


@pytest.mark.parametrize("workers", (0, 2))
@pytest.mark.parametrize("split", ("train", "val"))
@pytest.mark.parametrize("damage", DAMAGES)
def test_it_is_named_in_one_line_where_it_is_an_error(images, warnings, damage, split, workers):
    how, reason = DAMAGES[damage]
    images.damage(split, (7,), how)
    message = error_of(images.loader(split, "raise", workers))
    assert message.startswith(f"cannot read image {images.name(split, 7)!r} (")
    assert reason in message
    assert "\n" not in message
    assert not warnings()


@pytest.mark.parametrize("workers", (0, 2))
def test_a_missing_file(folder, workers):
    training, evaluation, strict = (
        folder.loader("train", workers=workers),
        folder.loader("val", workers=workers),
        folder.loader("val", "raise", workers),
    )
    for split in ("train", "val"):
        folder.paths[split][3].unlink()
    assert sum(len(targets) for _, targets in training) == 24
    assert torch.cat([targets for _, targets in evaluation]).tolist() == [0, 1, 2, -100, *range(4, 12)]
    for loader, split in ((training, "train"), (evaluation, "val")):
        assert list(loader.unreadable) == [folder.name(split, 3)]
        assert "No such file" in loader.unreadable[folder.name(split, 3)]
    assert "No such file" in error_of(strict)


@pytest.mark.parametrize("workers", (0, 2))
def test_a_training_batch_without_a_readable_image_is_an_error(images, workers):
    loader = images.loader("train", workers=workers)
    indices = loader._sampler.batches(0)[1].tolist()
    images.damage("train", indices, lambda content: b"")
    loader = images.loader("train", workers=workers)
    message = error_of(loader)
    assert message.startswith(f"cannot read image {images.name('train', indices[0])!r} (")
    assert message.endswith(" and 7 more of its batch")


def test_neither_positions_nor_shapes_change(folder):
    folder.damage("train", (2, 3, 20), lambda content: b"")
    augmentation = Augmentation(mixup=0.8, cutmix=1.0, reprob=0.5)
    loader = folder.loader("train", batch_size=4, augmentation=augmentation)
    whole = list(loader)
    assert {(images.shape, targets.shape) for images, targets in whole} == {((4, 3, 24, 24), (4, 12))}
    fresh = folder.loader("train", batch_size=4, augmentation=augmentation, workers=2)
    fresh.set_epoch(0, loader.position_after(2))
    for actual, expected in zip(fresh, whole[2:], strict=True):
        assert all(map(torch.equal, actual, expected))


def failing(error):
    def transform(image):
        raise error

    return transform


def test_an_error_of_pillow_in_the_transform_is_the_images(folder):
    loader = folder.loader("val")
    loader._workers.dataset._transform = failing(ValueError("height and\nwidth must be > 0"))
    assert all((targets == -100).all() for _, targets in loader)
    assert set(loader.unreadable.values()) == {"height and width must be > 0"}


def test_an_error_of_the_program_is_not(folder):
    for error in (TypeError("x"), AssertionError("x"), AttributeError("x"), IndexError("x")):
        loader = folder.loader("train")
        loader._workers.dataset._transform = failing(error)
        with pytest.raises(type(error), match="x"):
            list(loader)
        assert loader.unreadable == {}


@pytest.mark.parametrize("dataset", ("folder", "digits"))
def test_unknown_way(folder, dataset):
    with pytest.raises(UserError, match=r"unknown way with unreadable images 'skipp'; did you mean 'skip'"):
        describe(Source(dataset, str(folder.root), on_bad_image="skipp"))


def test_sets_that_are_not_decoded_have_none():
    assert (
        train_loader(
            Source("digits", on_bad_image="raise"),
            Augmentation(),
            label_smoothing=0.0,
            batch_size=8,
            **(COMMON | {"image_size": 32}),
        ).unreadable
        == {}
    )
