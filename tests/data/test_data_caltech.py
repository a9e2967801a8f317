"""Caltech-256, read from small files in the real layout."""

import shutil
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
from data_helpers import eval_loader, train_loader
from PIL import Image
from torchvision import transforms as T
from torchvision.datasets import caltech as torchvisions

from data import Augmentation, DatasetInfo, Source, caltech, describe
from repopt.errors import UserError

CPU = torch.device("cpu")
COUNTS = {"001.ak47": 6, "002.american-flag": 7, "056.dog": 9}
TRAIN = 4
COMMON = {"image_size": 24, "interpolation": "bilinear", "num_classes": 3, "device": CPU, "num_workers": 0}
TEXTBOOK = T.Compose(
    [T.Resize(24), T.CenterCrop(24), T.ToTensor(), T.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]
)


@pytest.fixture
def root(tmp_path, photograph, monkeypatch):
    """Three classes, of which four images each are for training; the first is greyscale; with what is no image."""
    monkeypatch.setattr(caltech, "NUM_CLASSES", len(COUNTS))
    monkeypatch.setattr(caltech, "TRAIN_PER_CLASS", TRAIN)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    folder = folder_in(tmp_path)
    for label, (name, count) in enumerate(COUNTS.items()):
        (folder / name).mkdir(parents=True)
        for k in range(1, count + 1):
            image = photograph(100 * label + k, 40 + 3 * k, 52 - 2 * k)
            image = image if label else image.convert("L")
            image.save(folder / name / f"{name[:3]}_{k:04}.jpg")
    (folder / "056.dog" / "greg" / "osu").mkdir(parents=True)
    shutil.copy(folder / "056.dog" / "056_0001.jpg", folder / "056.dog" / "greg" / "osu" / "056_0100.jpg")
    (folder / "056.dog" / "056_0101.jpg").mkdir()
    for stray in ("056.dog/RENAME2", "056.dog/._056_0001.jpg", ".DS_Store", "notes.txt"):
        (folder / stray).write_bytes(b"no image")
    (folder / ".thumbnails").mkdir()
    return tmp_path


def folder_in(root):
    return root / "caltech256" / "256_ObjectCategories"


def names(images):
    return [images.name(i) for i in range(len(images.labels))]


def make_train(root, augmentation, batch_size=4):
    return train_loader(
        Source("caltech256", str(root)), augmentation, batch_size=batch_size, label_smoothing=0.1, **COMMON
    )


def make_eval(root, **changes):
    return eval_loader(Source("caltech256", str(root)), batch_size=4, crop=False, **(COMMON | changes))


def test_the_splits_are_disjoint_and_complete(root):
    train, val = (caltech.open_split(str(root), split) for split in ("train", "val"))
    expected = [str(path) for name in COUNTS for path in sorted((folder_in(root) / name).glob("[0-9]*_00*.jpg"))]
    assert sorted(names(train) + names(val)) == expected
    assert train.labels.bincount().tolist() == [TRAIN] * 3
    assert val.labels.bincount().tolist() == [2, 3, 5]
    for images in (train, val):
        assert names(images) == sorted(names(images))
        assert [list(COUNTS)[label] for label in images.labels] == [Path(name).parent.name for name in names(images)]
        assert images.read(2) == Path(names(images)[2]).read_bytes()


def test_the_split_follows_from_the_names_alone(root, tmp_path, monkeypatch):
    train = caltech.open_split(str(root), "train")
    chosen = [Path(name).name for name in names(train)]
    assert chosen[:TRAIN] == [f"001_{k:04}.jpg" for k in (1, 2, 3, 6)]
    assert chosen[TRAIN : 2 * TRAIN] == [f"002_{k:04}.jpg" for k in (1, 2, 4, 5)]
    listed = Path.iterdir
    monkeypatch.setattr(Path, "iterdir", lambda folder: sorted(listed(folder), reverse=True))
    assert names(caltech.open_split(str(root), "train")) == names(train)
    shutil.copytree(root / "caltech256", tmp_path / "elsewhere" / "caltech256")
    for path in folder_in(tmp_path / "elsewhere").glob("*/*.jpg"):
        if path.is_file():
            path.write_bytes(b"another content")
    assert [Path(name).name for name in names(caltech.open_split(str(tmp_path / "elsewhere"), "train"))] == chosen


def test_the_whole_sets_numbers(tmp_path):
    for label in range(1, 258):
        (folder := folder_in(tmp_path) / f"{label:03}.class").mkdir(parents=True)
        for k in range(1, 62 + label % 2):
            (folder / f"{label:03}_{k:04}.jpg").touch()
    source = Source("caltech256", str(tmp_path))
    assert describe(source) == DatasetInfo(num_classes=257, image_size=None)
    train, val = (caltech.open_split(str(tmp_path), split) for split in ("train", "val"))
    assert train.labels.bincount().tolist() == [60] * 257
    assert val.labels.bincount().tolist() == [1 + label % 2 for label in range(1, 258)]


def test_evaluation_equals_the_textbook_pipeline(root):
    loader = make_eval(root)
    assert (len(loader), loader.num_images) == (3, 10)
    images, labels = map(torch.cat, zip(*loader, strict=True))
    files = caltech.open_split(str(root), "val")
    assert torch.equal(labels, files.labels)
    expected = torch.stack([TEXTBOOK(Image.open(name).convert("RGB")) for name in names(files)])
    torch.testing.assert_close(images, expected, rtol=1e-5, atol=1e-5)
    assert sum(len(targets) for _, targets in make_eval(root, split="train")) == 3 * TRAIN


@pytest.mark.parametrize("preset", ("weak", "none", "raug15", None))
def test_training_takes_every_training_image_colour_or_not(root, preset):
    loader = make_train(root, Augmentation(preset=preset, auto_augment="none", color_jitter=0.0, reprob=0.0))
    assert (len(loader), loader.num_images) == (3, 12)
    images, labels = map(torch.cat, zip(*loader, strict=True))
    assert (images.shape, loader.unreadable) == ((12, 3, 24, 24), {})
    assert sorted(labels.tolist()) == sorted([0, 1, 2] * TRAIN)
    if preset != "raug15":  # which may colour what is grey
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        pixels = images.movedim(1, 3) * std + mean
        grey = (pixels - pixels[..., :1]).abs().amax((1, 2, 3)) < 1e-5
        assert torch.equal(grey, labels == 0)


def test_an_absent_set_is_downloaded(root, tmp_path, monkeypatch):
    unpacked = []

    def unpack(url, to, filename, md5):
        unpacked.append(filename)
        (folder_in(root) / ".DS_Store").unlink()  # which torchvision itself would take for a class
        (folder_in(root) / "notes.txt").unlink()
        shutil.copytree(folder_in(root), Path(to) / filename.removesuffix(".tar"))

    monkeypatch.setattr(torchvisions, "download_and_extract_archive", unpack)
    for split, count in (("train", 12), ("val", 10)):
        assert len(caltech.open_split(str(tmp_path / "fresh"), split).labels) == count
    assert unpacked == ["256_ObjectCategories.tar"]


def test_one_line_where_it_cannot_be_downloaded(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise URLError("no\nnetwork")

    monkeypatch.setattr(torchvisions, "download_and_extract_archive", fail)
    with pytest.raises(UserError, match=r"Caltech-256 is not in '.*fresh' and could not be downloaded: .*") as error:
        make_eval(tmp_path / "fresh")
    assert "\n" not in str(error.value)
    monkeypatch.setenv("LOCAL_RANK", "1")  # which leaves that to the node's first process
    with pytest.raises(UserError, match=r"Caltech-256 is not in '.*other'$"):
        make_eval(tmp_path / "other")
    assert not (tmp_path / "other").exists()


def remove(*places):
    def change(folder):
        for place in places:
            shutil.rmtree(folder / place) if (folder / place).is_dir() else (folder / place).unlink()

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (remove("002.american-flag"), r"'.*256_ObjectCategories' has 2 class folders, not 3: .* remove it"),
        (remove(*COUNTS, ".thumbnails"), r"no class folders in '.*256_ObjectCategories'"),
        (
            remove("001.ak47/001_0001.jpg", "001.ak47/001_0006.jpg"),
            r"'.*001.ak47' has 4 images, not more than training takes \(4\)",
        ),
        (lambda folder: (folder / "004.bat").mkdir(), r"has 4 class folders, not 3"),
        (
            lambda folder: (folder / "056.dog" / "056\n_0001.jpg").touch(),
            r"'.*056.dog' has an image whose name is no text: '056\\n_0001.jpg'",
        ),
        (
            lambda folder: (folder / "056.dog" / b"056_\xff.jpg".decode(errors="surrogateescape")).touch(),
            r"whose name is no text: '056_\\udcff.jpg'",
        ),
    ],
)
def test_a_set_that_is_not_whole_is_an_error_in_one_line(root, change, message):
    change(folder_in(root))
    for make in (lambda: make_train(root, Augmentation()), lambda: make_eval(root)):
        with pytest.raises(UserError, match=message) as error:
            make()
        assert "\n" not in str(error.value)


def test_other_errors(root):
    with pytest.raises(UserError, match=r"caltech256 needs a folder .*: give --data-path"):
        make_eval("")
    with pytest.raises(UserError, match="--zip is for imagenet and folder: data set 'caltech256'"):
        describe(Source("caltech256", str(root), zip_mode=True))
    with pytest.raises(UserError, match="3 classes, the model 2"):
        make_eval(root, num_classes=2)
