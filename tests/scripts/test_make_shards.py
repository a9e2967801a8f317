"""`make_shards.py`: the shards hold the folder's images; a run that was stopped goes on; mistakes are one line."""

import math
from pathlib import Path

import pytest
from make_shards import main
from PIL import Image

from data import Source, registry
from data.folder import OTHER_NAMES
from data.registry import FileSpec
from data.sampler import LANES
from data.shards import images, index, store, tar, write


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    for split, count in (("train", 7), ("val", 2)):
        for label, name in enumerate(("cat", "dog")):
            (root / split / name).mkdir(parents=True)
            for k in range(count):
                Image.new("RGB", (8, 8), (100 * label, 30 * k, 0)).save(root / split / name / f"{k}.v1.png")
    return root


def images_of(dataset, root, split="train"):
    files = registry.find(Source(dataset, str(root)), FileSpec).open(Source(dataset, str(root)), split, 2, 0, 1)
    return [(files.read(k), int(files.labels[k])) for k in range(len(files))]


@pytest.mark.parametrize("form", ["parquet", "wds"])
@pytest.mark.parametrize("through", ["folder", "shards"])
def test_the_shards_hold_the_images(folder, tmp_path, form, through, capsys):
    source = [str(folder)]
    if through == "shards":
        assert main([str(folder), str(tmp_path / "first"), "--form", "wds", "--images", "4"]) == 0
        source = [str(tmp_path / "first"), "--dataset", "wds"]
    assert main([source[0], str(tmp_path / "to"), *source[1:], "--form", form, "--images", "5"]) == 0
    assert f"{tmp_path / 'to'}: 14 images of train" in capsys.readouterr().out
    for split in ("train", "val"):
        assert images_of(form, tmp_path / "to", split) == images_of("folder", folder, split)


@pytest.mark.parametrize("form", ["parquet", "wds"])
def test_a_run_that_was_stopped_goes_on(folder, tmp_path, form, monkeypatch):
    command, read, asked = [str(folder), str(tmp_path / "to"), "--form", form, "--images", "3"], write._read, []

    def stopped(images, row):
        asked.append(row.number)
        if len(asked) == 8:
            raise KeyboardInterrupt
        return read(images, row)

    monkeypatch.setattr(write, "_read", stopped)
    with pytest.raises(KeyboardInterrupt):
        main(command)
    whole = {path.name: path.read_bytes() for path in (tmp_path / "to").iterdir() if path.suffix != ".npz"}
    assert len(whole) == 2 + (form == "wds")  # with the classes' names
    assert main(command) == 0
    assert asked[8:15] == [6, 7, 8, 9, 10, 11, 12]
    assert {name: (tmp_path / "to" / name).read_bytes() for name in whole} == whole
    assert images_of(form, tmp_path / "to") == images_of("folder", folder)


def test_the_same_images_give_the_same_bytes_and_mixed_ones_others(folder, tmp_path):
    for name, shuffle in (("a", []), ("b", []), ("c", ["--shuffle", "1"])):
        assert main([str(folder), str(tmp_path / name), "--form", "wds", *shuffle]) == 0
    one, other, mixed = ((tmp_path / n / "train-00000-of-00001.tar").read_bytes() for n in "abc")
    assert one == other != mixed
    assert sorted(images_of("wds", tmp_path / "c")) == sorted(images_of("folder", folder))


def test_the_document_says_what_there_is(folder, tmp_path, monkeypatch):
    text = (Path(__file__).resolve().parents[2] / "docs" / "data.md").read_text()
    for words in (OTHER_NAMES["train"], OTHER_NAMES["val"]):
        assert ", ".join(f"`{word}`" for word in words) in text
    assert all(f"`.{ending}`" in text for ending in tar._LABELS)
    assert f"{images._BLOCK_BYTES // 2**20} MB of images" in text
    assert f"up to {images._WINDOW} blocks later than its block, in each of {LANES} lanes" in text
    assert "tried up to five times, with waits of five seconds in all" in " ".join(text.split())
    assert (len(store.WAITS), math.ceil(sum(store.WAITS))) == (4, 5)
    assert index.ENDING in text
    monkeypatch.chdir(tmp_path)
    (tmp_path / "imagenet").symlink_to(folder)
    commands = [line.split()[2:] for line in text.splitlines() if line.startswith("    python scripts/make_shards.py ")]
    commands = [[part.removeprefix("/data/") for part in command] for command in commands]
    assert [main(command) for command in commands] == [0, 0]
    assert [sorted({path.suffix for path in (tmp_path / to).iterdir()}) for _, to, *_ in commands] == [
        [".npz", ".tar", ".txt"],
        [".npz", ".parquet"],
    ]


def test_mistakes_are_one_line_and_exit_code_2(folder, tmp_path, capsys):
    assert main([str(folder), str(tmp_path / "to"), "--form", "wds", "--images", "5"]) == 0
    for arguments, message in (
        (
            [str(folder), str(tmp_path / "to"), "--form", "wds", "--images", "4"],
            "has other shards, such as 'train-00000-",
        ),
        ([str(folder), str(tmp_path / "to"), "--form", "wds", "--images", "5", "--shuffle", "0"], "has other images:"),
        ([str(tmp_path / "no"), str(tmp_path / "to"), "--form", "wds"], "does not exist"),
        ([str(folder), str(tmp_path / "new"), "--form", "wds", "--dataset", "digits"], "unknown data set 'digits'"),
    ):
        capsys.readouterr()
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert images_of("wds", tmp_path / "to") == images_of("folder", folder)
