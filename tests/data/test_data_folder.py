"""Class folders as people have them: one folder alone, other names, classes that are missing, an order of their own."""

import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

import data
from data import folder
from data.types import Source
from repopt.errors import UserError

COUNTS = {"ant": 10, "bee": 5, "cat": 2, "dog": 1}


def make(root, counts=COUNTS):
    for name, count in counts.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            Image.new("RGB", (8, 8)).save(root / name / f"{number}.png")
    return root


def names(files):
    return [str(Path(files.name(index)).relative_to(Path(files.name(index)).parents[1])) for index in range(len(files))]


@pytest.fixture
def alone(tmp_path):
    """The classes' folders alone."""
    return Source("folder", str(make(tmp_path / "alone")), val_fraction=0.2)


def test_a_part_of_every_class_is_held_out(alone):
    train, val = (folder.open_split(alone, split) for split in ("train", "val"))
    assert Counter(val.labels.tolist()) == {0: 2, 1: 1, 2: 1}  # a fifth, one at least, and no class's only image
    assert Counter(train.labels.tolist()) == {0: 8, 1: 4, 2: 1, 3: 1}
    assert not set(names(train)) & set(names(val))
    assert len(train) + len(val) == sum(COUNTS.values())
    assert data.describe(alone).classes == tuple(COUNTS)


def test_the_part_is_the_same_from_train_alone_and_stays_where_images_are_added(alone, tmp_path):
    held = set(names(folder.open_split(alone, "val")))
    below = tmp_path / "below"
    make(below / "train")
    (tmp_path / "below" / "other").mkdir()  # which is no class
    assert set(names(folder.open_split(replace(alone, root=str(below)), "val"))) == held
    make(Path(alone.root), {"bee": 6})
    assert {name for name in held if not name.startswith("bee")} <= set(names(folder.open_split(alone, "val")))


def test_another_process_holds_out_the_same(alone):
    script = (
        "import sys; from data import folder; from data.types import Source\n"
        "files = folder.open_split(Source('folder', sys.argv[1], val_fraction=0.2), 'val')\n"
        "print(*(files.name(index) for index in range(len(files))), sep='\\n')"
    )
    root = Path(__file__).resolve().parents[2]
    run = subprocess.run(
        [sys.executable, "-c", script, alone.root], cwd=root, capture_output=True, text=True, check=True
    )
    files = folder.open_split(alone, "val")
    assert run.stdout.split() == [files.name(index) for index in range(len(files))]


def test_a_val_folder_goes_before(alone, tmp_path):
    root = tmp_path / "both"
    make(root / "train")
    make(root / "val", {"ant": 3})
    both = replace(alone, root=str(root))
    assert len(folder.open_split(both, "train")) == sum(COUNTS.values())
    assert len(folder.open_split(both, "val")) == 3


def test_a_val_that_lacks_a_class_has_the_labels_of_train(tmp_path, caplog):
    make(tmp_path / "train")
    make(tmp_path / "val", {"dog": 2, "bee": 1})
    (tmp_path / "val" / "cat").mkdir()  # no picture
    source = Source("folder", str(tmp_path))
    assert data.describe(source).num_classes == 4
    assert folder.open_split(source, "val").labels.tolist() == [1, 3, 3]
    assert "no images of 2 classes in val/, such as 'ant'" in caplog.text


def test_classes_have_the_order_of_the_network(tmp_path):
    """Whoever evaluates has the folders of some classes, in an order of their own."""
    make(tmp_path / "val", {"bee": 1, "ant": 2})
    source = Source("folder", str(tmp_path), classes=("cat", "bee", "ant"))
    assert data.describe(source, splits=("val",)).num_classes == 3
    assert folder.open_split(source, "val").labels.tolist() == [2, 2, 1]


@pytest.mark.parametrize(
    ("folders", "fraction", "split", "message"),
    [
        (["train/a", "validation/a"], 0.2, "val", r"no folder val/ in .*\(there is validation/: rename it"),
        (["training/a", "test/a"], 0.2, "train", r"no folder train/ in .*\(there is training/: rename it"),
        (["train/a"], 0.0, "val", r"no folder val/ in .*\(DATA.VAL_FRACTION holds a part of train/ out\)"),
        (["a", "b"], 0.0, "train", r"no folder train/ in .*\(are the classes' folders in it\? DATA.VAL_FRACTION"),
        (["train/a", "val/b"], 0.2, "val", r"val/ in .* has a folder 'b', which is no class of train's"),
    ],
)
def test_what_is_missing_is_said(tmp_path, folders, fraction, split, message):
    for path in folders:
        (tmp_path / path).mkdir(parents=True)
    with pytest.raises(UserError, match=message):
        data.describe(Source("folder", str(tmp_path), val_fraction=fraction), splits=(split,))


def test_a_class_of_the_network_without_a_folder_is_not_trained(tmp_path):
    make(tmp_path / "train")
    make(tmp_path / "val")
    source = Source("folder", str(tmp_path), classes=(*COUNTS, "eel"))
    with pytest.raises(UserError, match=r"train/ in .* has no folder of 1 classes, such as 'eel'"):
        data.describe(source)


def test_grey_images_are_normalized_by_one_number(tmp_path):
    for split in ("train", "val"):
        (tmp_path / split / "a").mkdir(parents=True)
        Image.new("L", (8, 8), 100).save(tmp_path / split / "a" / "0.png")
        Image.new("RGB", (8, 8), (10, 20, 30)).save(tmp_path / split / "a" / "1.png")
    source = Source("folder", str(tmp_path), channels=1, mean=(0.5,), std=(0.25,))
    images = data.Classification(source, image_size=8, num_classes=1)
    ((batch, _),) = data.eval_loader(images, batch_size=2, device=torch.device("cpu"), num_workers=0, pin_memory=False)
    assert batch.shape == (2, 1, 8, 8)
    luma = 0.299 * 10 + 0.587 * 20 + 0.114 * 30
    for image, value in zip(batch, (100, luma), strict=True):
        assert image.unique().tolist() == pytest.approx([(value / 255 - 0.5) / 0.25])
    assert data.Classification(replace(source, mean=None), image_size=8, num_classes=1).spec.mean == pytest.approx(
        (sum(data.registry.IMAGENET_MEAN) / 3,)
    )


@pytest.mark.parametrize("numbers", [{"mean": (0.5,)}, {"std": (0.2, 0.2, 128.0)}, {"std": (0.0, 0.0, 0.0)}])
def test_numbers_of_normalization_that_are_none(numbers):
    with pytest.raises(UserError, match=r"normalized by as many numbers|this is no way to make images"):
        assert data.Classification(Source("folder", "x", **numbers), image_size=8, num_classes=1).preprocessing
