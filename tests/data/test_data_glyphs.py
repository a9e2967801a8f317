"""Characters drawn in matplotlib's fonts."""

import multiprocessing
import unicodedata

import numpy as np
import pytest
import torch
from data_helpers import eval_loader, train_loader
from fontTools.ttLib import TTFont

import main_repopt
from data import Augmentation, DatasetInfo, Source, describe, glyphs
from data.on_device import Normalize
from repopt.errors import UserError

CPU = torch.device("cpu")
COMMON = {"image_size": 32, "interpolation": "bilinear", "num_classes": 100, "device": CPU}


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(glyphs, "PER_CLASS", {"train": 2, "val": 1})
    monkeypatch.setattr(glyphs, "_CHUNK", 30)  # which does not divide their numbers


@pytest.fixture
def made(few, tmp_path):
    root = tmp_path / "made"
    glyphs.make(root, workers=0)
    return root


def contents(root):
    return {path.name: path.read_bytes() for path in root.iterdir()}


@pytest.mark.parametrize("workers", (1, 2))
def test_the_images_are_the_same_for_any_number_of_workers(made, tmp_path, workers):
    glyphs.make(tmp_path / "again", workers)
    assert contents(tmp_path / "again") == contents(made)
    assert contents(made).keys() == {"train.npy", "val.npy", "version.txt"}


@pytest.mark.parametrize("split", ("train", "val"))
def test_an_image_is_a_function_of_its_split_and_index(made, split):
    images, labels = glyphs.load(str(made), split)
    for index in (0, 31, len(images) - 1):
        assert np.array_equal(images[index].permute(1, 2, 0), glyphs.draw(split, index))
        assert labels[index] == index % 100
    assert (images.shape, images.dtype, labels.dtype) == ((len(labels), 3, 32, 32), torch.uint8, torch.int64)


def test_every_class_has_as_many_images(made):
    assert glyphs.PER_CLASS == {"train": 2, "val": 1}
    for split, count in glyphs.PER_CLASS.items():
        assert glyphs.load(str(made), split)[1].bincount().tolist() == [count] * 100


def test_the_whole_set_has_the_shape_of_cifar_100():
    assert glyphs.PER_CLASS == {"train": 500, "val": 100}
    assert describe(Source("glyphs")) == DatasetInfo(num_classes=100, image_size=32)


def test_no_image_comes_twice(made):
    images = np.concatenate([glyphs.load(str(made), split)[0] for split in ("train", "val")])
    assert len({image.tobytes() for image in images}) == len(images) == 300


def test_characters_are_in_the_fonts_in_which_they_are_drawn():
    assert len(set(glyphs.CHARACTERS)) == 100
    assert len({unicodedata.normalize("NFKC", c) for c in glyphs.CHARACTERS}) == 100
    assert min(len(set(glyphs.fonts_of(c))) for c in glyphs.CHARACTERS) >= 16
    for font in {font for c in glyphs.CHARACTERS for font in glyphs.fonts_of(c)}:
        drawn = [c for c in glyphs.CHARACTERS if font in glyphs.fonts_of(c)]
        names = TTFont(glyphs._file_of(font))["cmap"].getBestCmap()
        assert {ord(c) for c in drawn} <= names.keys()
        assert len({names[ord(c)] for c in drawn}) == len(drawn)
        masks = [glyphs._glyph(c, font) for c in drawn]
        assert min(np.asarray(mask).max() for mask in masks) > 200
        assert len({(mask.size, mask.tobytes()) for mask in masks}) == len(drawn)


def test_a_character_is_brighter_than_what_it_lies_on():
    for seed in range(50):
        ground, ink = (glyphs._brightness(colour) for colour in glyphs._colours(np.random.default_rng(seed)))
        assert ground <= glyphs._MAX_BRIGHTNESS
        assert ink - ground >= glyphs._MIN_CONTRAST


def test_training_images_are_cropped_and_not_mirrored(made):
    source = Source("glyphs", str(made))
    loader = train_loader(source, Augmentation(), batch_size=20, label_smoothing=0.1, **COMMON)
    assert (len(loader), loader.num_images) == (10, 200)
    images, targets = map(torch.cat, zip(*loader, strict=True))
    raw, labels = glyphs.load(str(made), "train")
    order = torch.cat(tuple(loader._sampler.batches(0)))
    assert torch.equal(targets, labels[order])
    normalize = Normalize(glyphs.MEAN, glyphs.STD, CPU, torch.contiguous_format)
    (ys, xs), _ = loader._crop.draw(0)
    padded = torch.nn.functional.pad(raw, [4] * 4)
    for image, i in zip(images[:60], order[:60], strict=True):
        assert torch.equal(image, normalize(padded[i, :, ys[i] : ys[i] + 32, xs[i] : xs[i] + 32][None])[0])
    images, targets = map(torch.cat, zip(*eval_loader(source, crop=False, batch_size=30, **COMMON), strict=True))
    raw, labels = glyphs.load(str(made), "val")
    assert torch.equal(images, normalize(raw))
    assert torch.equal(targets, labels)


def test_they_are_made_once_and_where_no_folder_is_named(few, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    images, _ = glyphs.load("", "val")
    monkeypatch.setattr(glyphs, "_write", None)
    assert torch.equal(glyphs.load("output/glyphs", "val")[0], images)


def test_two_processes_at_once_make_them_and_leave_nothing_beside(made, tmp_path):
    root = tmp_path / "both" / "made"
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=glyphs.make, args=(root, 0)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]
    assert contents(root) == contents(made)
    assert [path.name for path in root.parent.iterdir()] == ["made"]


def test_only_the_first_process_of_a_node_makes_them(few, monkeypatch, tmp_path):
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(UserError, match=r"made' is absent: the first process of this node could not make it$"):
        glyphs.load(str(tmp_path / "made"), "val")
    assert list(tmp_path.iterdir()) == []


def damaged(name):
    def damage(root):
        content = (root / "val.npy").read_bytes()
        bad = {
            "cut off": content[:-1],
            "empty": b"",
            "another file": b"text" * 100,
            "fewer images": (lambda: np.save(root / "val.npy", np.zeros((9, 3, 32, 32), np.uint8))),
            "floats": (lambda: np.save(root / "val.npy", np.zeros((100, 3, 32, 32)))),
            "absent": (root / "val.npy").unlink,
        }[name]
        bad() if callable(bad) else (root / "val.npy").write_bytes(bad)

    return damage


@pytest.mark.parametrize("name", ("cut off", "empty", "another file", "fewer images", "floats", "absent"))
def test_damage_is_refused(made, name):
    damaged(name)(made)
    with pytest.raises(UserError, match=r"^'val.npy' in .*made' is damaged: remove the folder, and it is made anew$"):
        glyphs.load(str(made), "val")
    assert len(glyphs.load(str(made), "train")[0]) == 200


@pytest.mark.parametrize("version", ("glyphs 0\n", ""))
def test_another_version_is_refused_by_the_command(made, in_one_line, version):
    (made / "version.txt").write_text(version)
    arguments = ["--arch", "RepOpt-VGG-nano-hs", "--data-path", str(made), "--output", str(made.parent / "runs")]
    assert main_repopt.main([*arguments, "--opts", "DATA.DATASET", "glyphs"]) == 2
    in_one_line("main_repopt.py", "{root}' holds other things than glyphs 1: remove it, or name", {"root": made})


def test_fonts_that_are_not_there(few, monkeypatch, tmp_path):
    monkeypatch.setattr(glyphs, "_font_folder", lambda: tmp_path / "fonts")
    with pytest.raises(UserError, match=r"in matplotlib's fonts, and '.*fonts/DejaVuSans.ttf' is not there$"):
        glyphs.make(tmp_path / "made")
    assert list(tmp_path.iterdir()) == []
