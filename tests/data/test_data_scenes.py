"""Scenes of handwritten digits, in COCO's and in Cityscapes' format."""

import json
import multiprocessing
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from downstream import make_scenes
from PIL import Image
from pycocotools.coco import COCO

from data import digits, scenes
from repopt.errors import UserError

FEW = {"train": 3, "val": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("scenes") / "made"
    scenes.make(root)
    return root


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(scenes, "_COUNTS", FEW)


def contents(root):
    """Every file's bytes by its path."""
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def started(root):
    """A process that makes the scenes."""
    process = multiprocessing.get_context("fork").Process(target=scenes.make, args=(root,))
    process.start()
    return process


def loaded(folder, split):
    """(annotations, image paths, label image paths) of a split; the n-th image is the same in both formats."""
    found = COCO(folder / "coco" / "annotations" / f"instances_{split}2017.json")
    images = sorted((folder / "cityscapes" / "leftImg8bit" / split / "scenes").iterdir())
    labels = sorted((folder / "cityscapes" / "gtFine" / split / "scenes").iterdir())
    assert [p.name.replace("leftImg8bit", "gtFine_labelIds") for p in images] == [p.name for p in labels]
    return found, images, labels


def test_two_processes_at_once_make_the_same_bytes_and_leave_nothing_beside(few, folder, tmp_path):
    root = tmp_path / "made"
    processes = [started(root) for _ in range(2)]
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]
    assert [path.name for path in tmp_path.iterdir()] == ["made"]
    scenes.make(tmp_path / "here")
    made = contents(root)
    assert made == contents(tmp_path / "here")
    all_of_them = contents(folder)
    assert all(made[name] == all_of_them[name] for name in made if name.startswith("cityscapes"))


@pytest.mark.parametrize("split", ("train", "val"))
def test_both_formats_say_the_same(folder, split):
    found, images, labels = loaded(folder, split)
    count = {"train": scenes.NUM_TRAIN, "val": scenes.NUM_VAL}[split]
    assert len(found.imgs) == len(images) == len(labels) == count
    assert {c["id"]: c["name"] for c in found.cats.values()} == {d + 1: str(d) for d in range(10)}
    for info, image, label in zip(found.imgs.values(), images, labels, strict=True):
        assert (folder / "coco" / f"{split}2017" / info["file_name"]).read_bytes() == image.read_bytes()
        assert (
            np.asarray(Image.open(image)).shape == (info["height"], info["width"], 3) == (scenes.SIZE, scenes.SIZE, 3)
        )
        classes = np.asarray(Image.open(label))
        assert (classes.shape, classes.dtype) == ((scenes.SIZE, scenes.SIZE), np.uint8)
        annotations = found.imgToAnns[info["id"]]
        assert scenes._DIGITS[0] <= len(annotations) <= scenes._DIGITS[1]
        masks = np.stack([found.annToMask(annotation) for annotation in annotations])
        assert masks.sum(0).max() == 1  # a pixel is of one digit
        counted = classes != 255
        expected = sum(mask * a["category_id"] for mask, a in zip(masks, annotations, strict=True))
        assert np.array_equal(expected[counted], classes[counted])
        for mask, annotation in zip(masks, annotations, strict=True):
            rows, columns = mask.nonzero()
            left, top, width, height = annotation["bbox"]
            assert (left, top) == (columns.min(), rows.min())
            assert (left + width, top + height) == (columns.max() + 1, rows.max() + 1)
            assert annotation["area"] == mask.sum() >= 20
            assert annotation["iscrowd"] == 0
            assert height <= scenes._HEIGHTS[1]


def test_what_is_ignored_is_little(folder):
    labels = np.stack([np.asarray(Image.open(path)) for path in loaded(folder, "val")[2]])
    assert 0 < (labels == 255).sum() < 0.5 * ((labels > 0) & (labels < 255)).sum()


def test_digits_are_of_every_class_and_of_many_sizes(folder):
    low, high = scenes._HEIGHTS
    for split in ("train", "val"):
        annotations = loaded(folder, split)[0].anns.values()
        assert {a["category_id"] for a in annotations} == set(range(1, 11))
        heights = [a["bbox"][3] for a in annotations]
        assert min(heights) <= low + 2
        assert max(heights) >= high - 2


def test_digits_are_brighter_than_the_background(folder):
    found, images, labels = loaded(folder, "train")
    for image_id, image, label in zip(found.imgs, images, labels, strict=True):
        brightness = np.asarray(Image.open(image)) @ np.array([0.299, 0.587, 0.114])
        background = brightness[np.asarray(Image.open(label)) == 0]
        for annotation in found.imgToAnns[image_id]:
            assert np.median(brightness[found.annToMask(annotation) > 0]) - background.mean() > 40


def test_each_split_has_digits_of_its_own(few, monkeypatch, tmp_path):
    def load(split):
        images, labels = kept(split)
        chosen = labels == {"train": 3, "val": 5}[split]
        return images[chosen], labels[chosen]

    kept = digits.load
    monkeypatch.setattr(digits, "load", load)
    scenes.make(tmp_path / "made")
    for split, digit in (("train", 3), ("val", 5)):
        content = json.loads((tmp_path / "made" / "coco" / "annotations" / f"instances_{split}2017.json").read_text())
        assert {a["category_id"] for a in content["annotations"]} == {digit + 1}


def test_a_digit_that_would_hide_another_is_not_placed():
    images = torch.full((1, 32, 32), 255, dtype=torch.uint8).numpy()  # squares, which hide whatever they lie on
    for seed in range(30):
        scene = scenes.draw(images, np.array([0]), np.random.default_rng(seed))
        for mask in scene.masks:
            rows, columns = mask.nonzero()
            side = max(np.ptp(rows), np.ptp(columns)) + 1
            assert mask.sum() >= 0.5 * side**2 - 1e-9


def test_nothing_half_done_is_left(few, monkeypatch, tmp_path):
    root = tmp_path / "made"
    with monkeypatch.context() as patch:
        patch.setattr(scenes, "_annotations", lambda *_: os._exit(3))
        process = started(root)
    process.join(120)
    assert process.exitcode == 3
    assert not root.exists()
    assert scenes.find(str(root)) == root
    assert len(list((root / "coco" / "train2017").iterdir())) == FEW["train"]


def test_a_failure_leaves_nothing_at_all(few, monkeypatch, tmp_path):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(scenes, "_annotations", fail)
    with pytest.raises(OSError, match="No space"):
        scenes.make(tmp_path / "made")
    assert list(tmp_path.iterdir()) == []


def test_they_are_made_once(few, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert scenes.find("") == Path("output/scenes")
    before = contents(Path("output/scenes"))
    monkeypatch.setattr(scenes, "_write", None)
    assert scenes.find("") == scenes.find("output/scenes")
    assert contents(Path("output/scenes")) == before


def test_an_empty_folder_is_filled(few, tmp_path):
    (tmp_path / "made").mkdir()
    scenes.make(tmp_path / "made")
    assert (tmp_path / "made" / "coco").is_dir()


@pytest.mark.parametrize("what", ("other version", "other things", "file"))
def test_other_content_is_refused(few, what, tmp_path):
    root = tmp_path / "made"
    if what == "file":
        root.write_text("")
    else:
        root.mkdir()
        (root / "version.txt" if what == "other version" else root / "photo.jpg").write_text("scenes 0\n")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(
        UserError, match=r"made' holds other things than scenes \d+: remove it, or name another folder$"
    ):
        scenes.find(str(root))
    assert sorted(tmp_path.rglob("*")) == before


def test_the_command(few, capsys, in_one_line, tmp_path):
    assert make_scenes.main([str(tmp_path / "made")]) == 0
    assert (
        capsys.readouterr().out
        == f"{tmp_path / 'made'}: {scenes.NUM_TRAIN} scenes to train on, {scenes.NUM_VAL} to test\n"
    )
    (tmp_path / "made" / "version.txt").unlink()
    assert make_scenes.main([str(tmp_path / "made")]) == 2
    in_one_line("make_scenes.py", "{root}' holds other things than scenes", {"root": tmp_path / "made"})
