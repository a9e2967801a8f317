"""Images in zips: the same images as in folders, whatever is cached."""

import multiprocessing
import pickle
import zipfile
from dataclasses import replace

import pytest
import torch
from data_helpers import eval_loader, train_loader

from data import Augmentation, Source, describe
from data.zipped import ZippedImages
from repopt.errors import UserError

CPU = torch.device("cpu")
CACHE_MODES = ("no", "full", "part")
NUM_CLASSES = 12
LAYOUTS = ("zip per split", "deflated", "separator", "one zip", "one zip, maps inside", "one zip, short paths")
COMMON = {"image_size": 24, "interpolation": "bilinear", "num_classes": NUM_CLASSES, "device": CPU, "num_workers": 0}
EVALUATION = COMMON | {"crop": False, "batch_size": 5}
TRAINING = COMMON | {"label_smoothing": 0.1, "batch_size": 4}


def files_of(folder, split):
    """(path below the split's folder, class index), in the order of the folder loader."""
    paths = sorted((folder / split).glob("*/*"))
    return [(path.relative_to(folder / split).as_posix(), int(path.parent.name[5:])) for path in paths]


def pack(folder, root, layout="zip per split"):
    root.mkdir(exist_ok=True)
    method = zipfile.ZIP_DEFLATED if layout == "deflated" else zipfile.ZIP_STORED
    one = layout.startswith("one zip")
    for split in ("train", "val"):
        listed = files_of(folder, split)
        archive = "imagenet.zip" if one else f"{split}.zip"
        prefix = f"{split}/" if one else ""
        with zipfile.ZipFile(root / archive, "a", method) as zip_file:
            zip_file.writestr(f"{split}_readme.txt", "not an image")
            for path, _ in reversed(listed):
                zip_file.write(folder / split / path, prefix + path)
            shown = "" if layout == "one zip, short paths" else prefix
            shown = f"{archive}@/" if layout == "separator" else shown
            lines = "".join(f"{shown}{path}\t{label}\n" for path, label in listed)
            if layout == "one zip, maps inside":
                zip_file.writestr(f"{split}_map.txt", lines)
            else:
                (root / f"{split}_map.txt").write_text(lines)
    return root


@pytest.fixture(scope="module", params=LAYOUTS)
def any_zip(request, image_folder, tmp_path_factory):
    return pack(image_folder, tmp_path_factory.mktemp("zip"), request.param)


@pytest.fixture
def zips(image_folder, tmp_path):
    return pack(image_folder, tmp_path / "zips")


def epoch_of(loader):
    images, targets = zip(*loader, strict=True)
    return torch.cat(images), torch.cat(targets)


def ranks(make, world):
    """Every rank's epoch, back in the order of the data set."""
    loaders = [make(rank=rank, world_size=world) for rank in range(world)]
    order = torch.cat([i for loader in loaders for i in loader._sampler.batches(0)])
    images, targets = map(torch.cat, zip(*map(epoch_of, loaders), strict=True))
    return order.sort().values, images[order.argsort()], targets[order.argsort()]


@pytest.mark.parametrize("cache_mode", CACHE_MODES)
def test_the_zip_gives_the_folders_images(any_zip, image_folder, cache_mode):
    files = Source("imagenet", str(image_folder))
    zipped = Source("imagenet", str(any_zip), zip_mode=True, cache_mode=cache_mode)
    info = describe(zipped)
    assert (info.num_classes, info.image_size) == (NUM_CLASSES, None)
    before = sorted(any_zip.iterdir())
    for world in (1, 2):

        def evaluation(source, **rank):
            return eval_loader(source, **EVALUATION, **rank)

        def training(source, **rank):
            return train_loader(source, Augmentation(preset="weak"), **TRAINING, **rank)

        for make in (evaluation, training):
            expected = ranks(lambda make=make, **rank: make(files, **rank), world)
            actual = ranks(lambda make=make, **rank: make(zipped, **rank), world)
            assert len(expected[0]) == (12 if make is evaluation else 24)
            for a, b in zip(actual, expected, strict=True):
                assert torch.equal(a, b)
    assert sorted(any_zip.iterdir()) == before  # nothing is extracted


@pytest.mark.parametrize("cache_mode", CACHE_MODES)
def test_a_part_cache_draws_from_its_part(zips, cache_mode):
    source = Source("imagenet", str(zips), zip_mode=True, cache_mode=cache_mode)
    for rank in range(2):
        seen = set()
        loader = train_loader(source, Augmentation(preset="none"), **TRAINING, rank=rank, world_size=2)
        for epoch in range(6):
            seen |= set(torch.cat(tuple(loader._sampler.batches(epoch))).tolist())
        assert (seen == set(range(rank, 24, 2))) == (cache_mode == "part")


@pytest.mark.parametrize("cache_mode", CACHE_MODES)
def test_what_is_cached_needs_the_zip_no_more(zips, image_folder, cache_mode):
    images = ZippedImages(str(zips), "train", num_classes=12, cache_mode=cache_mode, rank=1, world_size=3)
    files = [(image_folder / "train" / path).read_bytes() for path, _ in files_of(image_folder, "train")]
    assert [images.read(i) for i in range(24)] == files
    (zips / "train.zip").write_bytes(b"")
    cached = {"no": range(0), "full": range(24), "part": range(1, 24, 3)}[cache_mode]
    for i in range(24):
        if i in cached:
            assert images.read(i) == files[i]
        else:
            with pytest.raises(OSError, match="points to no entry"):
                images.read(i)


@pytest.mark.parametrize("cache_mode", CACHE_MODES)
def test_worker_processes_read_the_same(zips, cache_mode):
    source = Source("imagenet", str(zips), zip_mode=True, cache_mode=cache_mode)
    alone = eval_loader(source, **EVALUATION)
    images, targets = epoch_of(alone)  # the zip is now open here, before the workers are forked
    workers = eval_loader(source, **(EVALUATION | {"num_workers": 2}))
    for _ in range(2):
        actual, labels = epoch_of(workers)
        assert torch.equal(actual, images)
        assert torch.equal(labels, targets)
    list(alone)


def read_all(images):
    return [images.read(i) for i in range(24)]


def read_often(images, expected, equal):
    equal.value = all(read_all(images) == expected for _ in range(300))


def test_forked_processes_share_the_open_zip_without_disturbing_each_other(zips):
    images = ZippedImages(str(zips), "train", num_classes=12, cache_mode="no", rank=0, world_size=1)
    expected = read_all(images)
    fork = multiprocessing.get_context("fork")
    results = [fork.Value("b", False) for _ in range(2)]
    children = [fork.Process(target=read_often, args=(images, expected, equal)) for equal in results]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert [equal.value for equal in results] == [True, True]


@pytest.mark.parametrize("cache_mode", CACHE_MODES)
def test_spawned_processes_read_the_same(zips, cache_mode):
    images = ZippedImages(str(zips), "train", num_classes=12, cache_mode=cache_mode, rank=0, world_size=2)
    expected = read_all(images)
    assert read_all(pickle.loads(pickle.dumps(images))) == expected


def rewrite_map(root, split, edit):
    path = root / f"{split}_map.txt"
    lines = path.read_text().splitlines()
    path.write_text("\n".join(edit(lines)) + "\n")


def replace_line(number, text):
    return lambda lines: [*lines[: number - 1], text, *lines[number:]]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("class03/0.png 3", r"train_map.txt, line 8: expected path, tab, class index; found 'class03/0.png 3'"),
        ("class03/0.png\t", r"train_map.txt, line 8: expected"),
        ("\t3", r"train_map.txt, line 8: expected"),
        ("", r"train_map.txt, line 8: expected"),
        ("class03/0.png\t-3", r"train_map.txt, line 8: expected"),
        ("class03/0.png\tthree", r"train_map.txt, line 8: expected"),
        ("class03/0.png\t3\t3", r"train_map.txt, line 8: expected"),
        ("class03/0.png\t" + "9" * 5000, r"train_map.txt, line 8: expected"),
        ("class03/0.png\t²", r"train_map.txt, line 8: expected"),
        ("class03/9.png\t3", r"train_map.txt, line 8: no image 'class03/9.png' in '.*train.zip'"),
        ("../../etc/passwd\t3", r"train_map.txt, line 8: no image '../../etc/passwd' in '.*train.zip'"),
        ("class03/0.png\t12", r"train_map.txt, line 8: class index 12 is not below 12"),
    ],
)
def test_bad_map_lines_are_named(zips, line, message):
    rewrite_map(zips, "train", replace_line(8, line))
    with pytest.raises(UserError, match=message) as error:
        train_loader(Source("folder", str(zips), zip_mode=True), Augmentation(preset="weak"), **TRAINING)
    assert "\n" not in str(error.value)


def test_other_map_errors(zips):
    source = Source("imagenet", str(zips), zip_mode=True)
    rewrite_map(zips, "val", replace_line(5, "class04/0.JPEG\t99"))
    with pytest.raises(UserError, match=r"val_map.txt has class 99, which train does not have"):
        describe(source)
    assert describe(source, splits=("train",)).num_classes == NUM_CLASSES
    (zips / "val_map.txt").write_text("")
    with pytest.raises(UserError, match=r"val_map.txt is empty"):
        describe(source)
    (zips / "val_map.txt").write_bytes(b"\xff\xfe\t1")
    with pytest.raises(UserError, match=r"val_map.txt is not UTF-8"):
        describe(source)
    (zips / "val_map.txt").unlink()
    with pytest.raises(UserError, match=r"no val_map.txt in '.*' or in val.zip"):
        describe(source)


def test_windows_line_ends_and_trailing_blank_lines_are_fine(zips):
    path = zips / "val_map.txt"
    path.write_bytes(path.read_text().replace("\n", "\r\n").encode() + b"\r\n\r\n")
    assert describe(Source("imagenet", str(zips), zip_mode=True)).num_classes == NUM_CLASSES


def test_zip_errors(zips, tmp_path):
    source = Source("imagenet", str(zips), zip_mode=True)
    for bad in ("train", "val"):
        (zips / f"{bad}.zip").write_bytes(b"PK no zip")
    with pytest.raises(UserError, match=r"cannot read '.*val.zip' as a zip"):
        eval_loader(source, **EVALUATION)
    (zips / "val.zip").unlink()
    with pytest.raises(UserError, match=r"neither val.zip nor one single zip with both splits .*\(0 other zips\)"):
        describe(source)
    for name in "ab":
        (zips / f"{name}.zip").touch()
    with pytest.raises(UserError, match=r"\(2 other zips\)"):
        describe(source)
    with pytest.raises(UserError, match=r"data folder '.*none' does not exist"):
        describe(Source("imagenet", str(tmp_path / "none"), zip_mode=True))


def test_unknown_cache_mode(zips):
    with pytest.raises(UserError, match=r"unknown cache mode 'ful'; did you mean 'full'"):
        eval_loader(Source("imagenet", str(zips), zip_mode=True, cache_mode="ful"), **EVALUATION)


def test_a_corrupt_map_inside(image_folder, tmp_path):
    root = pack(image_folder, tmp_path / "zips", "one zip, maps inside")
    path = root / "imagenet.zip"
    path.write_bytes(path.read_bytes().replace(b"val/class03/0.png\t3", b"val/class03/0.png\t4"))
    with pytest.raises(UserError, match=r"cannot read '.*imagenet.zip@/val_map.txt'"):
        describe(Source("imagenet", str(root), zip_mode=True))


def test_unsupported_compression(zips):
    with zipfile.ZipFile(zips / "val.zip", "w", zipfile.ZIP_BZIP2) as archive:
        archive.writestr("a.png", b"x" * 100)
    (zips / "val_map.txt").write_text("a.png\t0\n")
    with pytest.raises(UserError, match=r"val_map.txt, line 1: 'a.png' is encrypted or compressed otherwise"):
        eval_loader(Source("imagenet", str(zips), zip_mode=True), **EVALUATION)


@pytest.mark.parametrize("layout", ("zip per split", "deflated"))
def test_a_corrupt_entry_is_named_whether_cached_or_not(image_folder, tmp_path, layout):
    root = pack(image_folder, tmp_path / "zips", layout)
    path = root / "val.zip"
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo("class04/0.JPEG")
    content = bytearray(path.read_bytes())
    start = info.header_offset + 30 + len(info.filename)
    end = start + info.compress_size
    content[end - 40 : end - 20] = bytes(20)  # in the pixels, where a JPEG decoder would not notice
    path.write_bytes(content)
    for cache_mode in CACHE_MODES:
        source = Source("imagenet", str(root), zip_mode=True, cache_mode=cache_mode, on_bad_image="raise")
        with pytest.raises(UserError, match=r"cannot read .*val.zip@/class04/0.JPEG") as error:
            list(eval_loader(source, **EVALUATION))
        assert "\n" not in str(error.value)
        loader = eval_loader(replace(source, on_bad_image="skip"), **EVALUATION)
        assert sum(int((labels == -100).sum()) for _, labels in loader) == len(loader.unreadable) == 1
