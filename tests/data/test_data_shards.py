"""Images in shards: the same images as in folders, in whatever form, wherever they lie, and whatever fails."""

import io
import json
import multiprocessing
import os
import pickle
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from data_helpers import assert_equal, batches, eval_loader, train_loader
from shard_helpers import FORMS, opened, served, source_of, write

from data import Augmentation, Source, describe
from data.sampler import LANES, Blocks, TrainSampler
from data.shards import index, parquet
from data.shards import store as stores
from data.shards.store import Store
from repopt.errors import UserError

CPU = torch.device("cpu")
NUM_CLASSES = 12
COMMON = {"image_size": 24, "interpolation": "bilinear", "num_classes": NUM_CLASSES, "device": CPU, "num_workers": 0}
SHARDS = ("parquet", "wds")


@pytest.fixture(scope="module")
def forms(image_folder, tmp_path_factory):
    root = tmp_path_factory.mktemp("forms")
    return {"folder": image_folder} | {form: write(image_folder, root / form, form) for form in FORMS[1:]}


@pytest.fixture(autouse=True)
def _quick(monkeypatch, tmp_path):
    monkeypatch.setattr(stores, "WAITS", (0, 0, 0, 0))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def copied(forms, tmp_path):
    """Copies of the shards, to be damaged: without their index."""

    def copy(form):
        to = tmp_path / form
        to.mkdir()
        for path in forms[form].iterdir():
            if not path.name.endswith(index.ENDING):
                (to / path.name).write_bytes(path.read_bytes())
        return to

    return copy


def contents(images):
    return [images.read(k) for k in range(len(images))]


def training(source, **settings):
    return train_loader(source, Augmentation(preset="weak"), **COMMON | {"batch_size": 4} | settings)


@pytest.mark.parametrize("form", FORMS[1:])
@pytest.mark.parametrize("split", ["train", "val"])
def test_every_form_holds_the_folders_images(forms, form, split):
    expected, images = opened(source_of("folder", forms["folder"]), split), opened(source_of(form, forms[form]), split)
    assert torch.equal(images.labels, expected.labels)
    assert contents(images) == contents(expected)


@pytest.mark.parametrize("form", SHARDS)
def test_the_classes_are_the_folders(forms, form):
    expected = describe(Source("folder", str(forms["folder"])))
    assert (info := describe(Source(form, str(forms[form])))) == expected
    assert info.classes == expected.classes
    turned = Source(form, str(forms[form]), classes=expected.classes[::-1])
    assert torch.equal(opened(turned).labels, NUM_CLASSES - 1 - opened(Source(form, str(forms[form]))).labels)
    with pytest.raises(UserError, match=r"have a class 'class11', which is no class .* \(1 of 12 are none\)"):
        describe(Source(form, str(forms[form]), classes=expected.classes[:-1]))


@pytest.mark.parametrize("form", FORMS[1:])
@pytest.mark.parametrize("settings", [{}, {"num_workers": 2}, {"rank": 1, "world_size": 2}], ids=str)
def test_every_form_gives_the_folders_batches(forms, form, settings):
    folder, other = (training(source_of(f, forms[f]), **settings) for f in ("folder", form))
    assert other.fingerprint == folder.fingerprint
    seen = [{"processes": 2, "images": 3, "sharded": False}]
    assert_equal(batches(other), batches(folder))
    assert_equal(batches(other, seen=seen), batches(folder, seen=seen))


@pytest.mark.parametrize("form", SHARDS)
def test_every_image_is_evaluated_once(forms, form):
    ranks = [eval_loader(source_of(form, forms[form]), batch_size=5, rank=r, world_size=3, **COMMON) for r in range(3)]
    labels = torch.cat([targets for rank in ranks for _, targets in rank])
    assert labels.sort().values.tolist() == list(range(NUM_CLASSES))


@pytest.mark.parametrize("form", SHARDS)
def test_another_process_reads_the_same(forms, form):
    images = opened(source_of(form, forms[form]))
    assert contents(pickle.loads(pickle.dumps(images))) == contents(images)


def compressed(folder, to, rows=4):
    """The images as older hub files hold them: compressed, in row groups."""
    to.mkdir()
    for split in ("train", "val"):
        images = opened(Source("folder", str(folder)), split)
        column = [{"bytes": images.read(k), "path": images.name(k)} for k in range(len(images))]
        schema = pa.schema({"picture": pa.struct({"bytes": pa.binary(), "path": pa.string()}), "fine": pa.int32()})
        table = pa.table({"picture": column, "fine": images.labels.tolist()}, schema)
        name = "validation" if split == "val" else split
        (to / "data").mkdir(exist_ok=True)
        pq.write_table(table, to / "data" / f"{name}-00000-of-00001.parquet", row_group_size=rows)
    return to


COLUMNS = ("picture", "fine")


def test_compressed_images_are_read_by_row_groups(forms, tmp_path):
    root = compressed(forms["folder"], tmp_path / "hub")
    source = Source("parquet", str(root), columns=COLUMNS)
    expected = opened(Source("folder", str(forms["folder"])))
    images = opened(source)
    assert contents(images) == contents(expected)
    assert images.blocks.ends.tolist() == list(range(4, 25, 4))
    assert describe(source).num_classes == NUM_CLASSES
    assert describe(source).at_least
    with pytest.raises(UserError, match=r"DATA.SHUFFLE global reads images one by one, and those in .*train-00000-of"):
        opened(Source("parquet", str(root), columns=COLUMNS, shuffle="global"))


@pytest.mark.parametrize("form", ["parquet", "wds", "compressed"])
def test_an_epoch_by_blocks_has_every_image_whatever_the_processes(forms, tmp_path, form, monkeypatch):
    monkeypatch.setattr("data.shards.images._BLOCK_BYTES", 4000)
    if form == "compressed":
        source = Source("parquet", str(compressed(forms["folder"], tmp_path / "hub")), columns=COLUMNS)
    else:
        source = source_of(form, forms[form], shuffle="blocks")
    alone = batches(training(source, batch_size=12))
    for world in (2, 3):
        ranks = [batches(training(source, batch_size=12 // world, rank=r, world_size=world)) for r in range(world)]
        for whole, *parts in zip(alone, *ranks, strict=True):
            taken = [torch.stack(found, 1).flatten(0, 1) for found in zip(*parts, strict=True)]
            assert all(map(torch.equal, taken, whole))
    assert torch.cat([targets for _, targets in alone]).sort().values.tolist() == [k // 2 for k in range(24)]
    assert_equal(batches(training(source, batch_size=12, num_workers=2)), alone)
    seen = [{"processes": 3, "images": 4, "sharded": False}]
    assert_equal(batches(training(source, batch_size=12), seen=seen), alone[1:])


def test_another_order_is_another_fingerprint(forms):
    one, other = (training(source_of("wds", forms["wds"], shuffle=shuffle)) for shuffle in ("global", "blocks"))
    assert one.fingerprint != other.fingerprint


@pytest.mark.parametrize("world", [1, 2, 4, 8, 3])
def test_an_order_by_blocks_reads_each_block_once(world):
    """Each process holds few blocks, and meets one again only where lanes end."""
    sizes = torch.randint(20, 30, (400,), generator=torch.Generator().manual_seed(0))
    blocks = Blocks(sizes.cumsum(0), window=4)
    count, read = int(sizes.sum()), 0
    block_of = torch.arange(len(sizes)).repeat_interleave(sizes)
    for rank in range(world):
        held: dict[int, None] = {}
        sampler = TrainSampler(count, 5, rank, world, seed=0, blocks=blocks)
        for batch in sampler.batches(1):
            for block in block_of[batch].tolist():
                read += block not in held
                held.pop(block, None)
                held[block] = None
                if len(held) > blocks.held(world):
                    held.pop(next(iter(held)))
    shared = 1 if LANES % world == 0 else world
    assert read <= 1.2 * shared * len(sizes)


def test_an_order_by_blocks_is_a_permutation_that_mixes_a_window():
    blocks = Blocks(torch.arange(10, 4001, 10), window=4)
    one, other = (blocks.order(torch.Generator().manual_seed(seed)) for seed in (0, 1))
    assert one.sort().values.tolist() == list(range(4000))
    assert not torch.equal(one, other)
    # In steps of the order there are about as many blocks as are open, and over an epoch all places are met.
    opened_at_once = [len({*(part // 10).tolist()}) for part in one.split(100)[4:-4]]
    assert 16 < sum(opened_at_once) / len(opened_at_once) <= (4 + 1) * LANES + 10
    assert np.corrcoef(one.numpy(), np.arange(4000))[0, 1] < 0.1


def test_sorted_shards_by_blocks_are_told_of(forms, caplog, tmp_path):
    folder = tmp_path / "sorted"
    for split in ("train", "val"):
        for label in range(2):
            (folder / split / f"{label}").mkdir(parents=True)
            for k in range(9):
                (folder / split / f"{label}" / f"{k}.jpg").write_bytes(bytes([label, k]))
    order = torch.randperm(18, generator=torch.Generator().manual_seed(0)).tolist()
    for name, how, told in (("as it is", {}, 1), ("mixed", {"order": order}, 0)):
        to = write(folder, tmp_path / name, "wds", **how)
        caplog.clear()
        opened(Source("wds", str(to), shuffle="blocks"), num_classes=2)
        assert sum("sorted by class" in message for message in caplog.messages) == told


@pytest.mark.parametrize("form", SHARDS)
def test_the_index_is_made_once(forms, copied, form, monkeypatch):
    root = copied(form)
    expected = contents(opened(source_of(form, forms[form])))
    first = opened(source_of(form, root))
    kept = sorted(root.glob(f"*{index.ENDING}"))
    assert len(kept) == len(list(root.glob(f"train-*.{'tar' if form == 'wds' else form}")))
    with monkeypatch.context() as patch:
        patch.setattr("data.shards.tar.read_index", None)
        patch.setattr(parquet, "read_index", lambda *_, **__: 1 / 0)
        again = opened(source_of(form, root))
    assert contents(first) == contents(again) == expected
    # One that is older than its shard, of another shard, or none at all, is made anew.
    os.utime(kept[0], ns=(0, 0))
    kept[1].write_bytes(kept[2].read_bytes())
    kept[2].write_bytes(b"PK")
    assert contents(opened(source_of(form, root))) == expected


def test_a_folder_that_cannot_be_written_has_its_index_in_the_cache(copied, tmp_path, monkeypatch):
    root, cache = copied("wds"), tmp_path / "cache" / "repopt" / "shards"
    written = stores.written_whole

    def refused(path):
        if path.parent == root:
            raise PermissionError(path)
        return written(path)

    monkeypatch.setattr(index, "written_whole", refused)
    expected = contents(opened(source_of("wds", root)))
    assert len(list(cache.iterdir())) == 5
    monkeypatch.setattr("data.shards.tar.read_index", None)
    assert contents(opened(source_of("wds", root))) == expected


def test_an_index_executes_nothing_and_stays_within_its_shard(copied):
    root = copied("wds")
    opened(source_of("wds", root))
    path = next(iter(sorted(root.glob(f"train*{index.ENDING}"))))
    with np.load(path) as arrays:
        kept = dict(arrays)
    store = Store(str(root))
    for changes in (
        {"labels": np.array([print], object)},
        {"ends": kept["ends"] + 10**9},
        {"starts": -kept["starts"]},
        {"name_ends": kept["name_ends"][::-1]},
        {"labels": kept["labels"][:-1]},
        {"groups": np.array([[10**9, 0, 1]])},
    ):
        np.savez(path, **kept | changes)
        assert index._on_disk(store, "train-00000-of-00005.tar", store.files()["train-00000-of-00005.tar"], "") is None


DAMAGES = {
    "cut within an image": lambda data: data[: len(data) // 2 - len(data) // 2 % 512 + 100],
    "no header": lambda data: data[: (at := data.index(b".cls") // 512 * 512)] + bytes([1] * 512) + data[at + 512 :],
    "empty": lambda data: b"",
    "noise": lambda data: bytes(range(256)) * 20,
}


@pytest.mark.parametrize("form", SHARDS)
@pytest.mark.parametrize("damage", DAMAGES.values(), ids=[*DAMAGES])
def test_a_damaged_shard_is_named(copied, form, damage, request):
    if form == "parquet" and "no header" in request.node.callspec.id:
        pytest.skip("of tars")
    root = copied(form)
    path = sorted(root.glob("train-00002*"))[0]
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=rf"shard '.*{path.name}' is damaged: .*; fetch or make it again"):
        opened(source_of(form, root))
    assert len(list(root.glob(f"train*{index.ENDING}"))) >= 2  # those before it need not be read again


def test_a_damaged_row_group_is_of_the_policy(forms, tmp_path):
    root = compressed(forms["folder"], tmp_path / "hub")
    source = Source("parquet", str(root), columns=COLUMNS)
    opened(source)
    path = next(root.glob("data/train*.parquet"))
    chunk, content = pq.read_metadata(path).row_group(1).column(0), bytearray(path.read_bytes())
    start, size, written = chunk.dictionary_page_offset, chunk.total_compressed_size, path.stat().st_mtime_ns
    content[start : start + size] = b"\xff" * size
    path.write_bytes(content)
    os.utime(path, ns=(written, written))
    loader = training(source, batch_size=12)
    list(loader)
    assert loader.unreadable
    assert all("train-00000-of-00001.parquet@/" in name for name in loader.unreadable)
    with pytest.raises(UserError, match=r"cannot read image .*train-00000-of-00001.parquet@/"):
        list(training(Source("parquet", str(root), columns=COLUMNS, on_bad_image="raise"), batch_size=12))


def test_an_image_that_was_cut_after_the_index_was_made_is_unreadable(copied):
    root = copied("wds")
    images = opened(source_of("wds", root))
    path = sorted(root.glob("train-00004*.tar"))[0]
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(OSError, match="the shard ends within the image"):
        images.read(23)


def tar_of(path, files):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as file:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            file.addfile(member, io.BytesIO(content))


def test_the_common_variants_of_tars(tmp_path):
    files = {
        "./b/one.JPG": b"1", "./b/one.cls": b" 3\n", "./b/one.txt": b"a caption",
        "two.v.png": b"ignored", "two.json": b'{"label": 1, "caption": "x"}', "two.webp": b"22",
        "b/._one.JPG": b"of a Mac", "a/three.cls": b"0", "a/three.jpeg": b"333", "a/three.json": b"7",
    }  # fmt: skip
    files.pop("two.v.png")
    tar_of(tmp_path / "imagenet-train-0.tar", files)
    tar_of(tmp_path / "val" / "0.tar", {"x.jpg": b"x", "x.json": b"2"})
    images = opened(Source("wds", str(tmp_path)))
    assert contents(images) == [b"1", b"22", b"333"]
    assert images.labels.tolist() == [3, 1, 0]
    assert opened(Source("wds", str(tmp_path)), "val").labels.tolist() == [2]
    assert images.name(0) == f"{tmp_path}/imagenet-train-0.tar@/./b/one.JPG"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"x.jpg": b"x"}, "the sample 'x' in .* has no class: expected one of .cls, "),
        ({"x.jpg": b"x", "x.cls": b"cat"}, "the .cls of the sample 'x' in .* holds no number of a class: b'cat'"),
        ({"x.jpg": b"x", "x.json": b'{"a": 1}'}, "the .json of the sample 'x' in .* holds no number of a class"),
        ({"x.jpg": b"x", "x.png": b"x", "x.cls": b"1"}, "has two images of the sample 'x'"),
        ({"x.jpg": b"x", "x.cls": b"-1"}, "'x.jpg' in .* has the class -1, which is none"),
        ({"x.jpg": b"x", "x.cls": b"12"}, "has class index 12, not below 12"),
        ({"x.cls": b"12"}, "the shards of train in .* have no images"),
    ],
)
def test_odd_tars_are_refused(tmp_path, files, message):
    tar_of(tmp_path / "train-0.tar", files)
    with pytest.raises(UserError, match=message):
        opened(Source("wds", str(tmp_path)))


def test_odd_parquet_is_refused(forms, tmp_path):
    root = str(forms["parquet"])
    with pytest.raises(UserError, match=r"unknown column 'label2'; did you mean 'label'\? .* set DATA.LABEL_COLUMN"):
        opened(Source("parquet", root, columns=("image", "label2")))
    with pytest.raises(UserError, match=r"column 'label' of .* holds no bytes of images: set DATA.IMAGE_COLUMN"):
        opened(Source("parquet", root, columns=("label", "label")))
    for labels, message in ((["a"], "holds string: expected the class"), ([None], "holds int64"), ([-1], "class -1")):
        table = pa.table({"image": [b"x"], "label": pa.array(labels, pa.string() if labels == ["a"] else pa.int64())})
        pq.write_table(table, tmp_path / "train.parquet")
        with pytest.raises(UserError, match=message):
            opened(Source("parquet", str(tmp_path)))
    schema = pa.schema({"image": pa.struct({"bytes": pa.binary(), "path": pa.string()}), "label": pa.int64()})
    table = pa.table({"image": [{"bytes": None, "path": "a.jpg"}] * 2, "label": [0, 1]}, schema)
    pq.write_table(table, tmp_path / "train.parquet")
    with pytest.raises(UserError, match="holds no images, perhaps their paths only: write them embedded"):
        opened(Source("parquet", str(tmp_path)))


def test_parquet_whose_index_lies_in_the_store_is_read_image_by_image(forms):
    with served(forms["parquet"], lambda request: request % 10 == 3) as server:
        local, remote = (Source("parquet", str(where), shuffle="global") for where in (forms["parquet"], server.url))
        assert_equal(batches(training(remote)), batches(training(local)))


def test_parquet_in_a_store_that_goes_is_not_called_damaged(forms, tmp_path):
    root = compressed(forms["folder"], tmp_path / "hub")
    with served(root) as server:
        source = Source("parquet", server.url, columns=COLUMNS)
        opened(source)  # has its index now
        loader, waits = training(source), server.requests
        for last in (waits, waits + 1, waits + 2):  # while a row group is read, or a file's metadata
            server.fails_at = lambda request, last=last: request > last
            with pytest.raises(UserError, match=r"cannot read 'http.*', tried 5 times"):
                list(loader)
        with pytest.raises(UserError, match=r"cannot read 'http.*', tried 5 times"):
            describe(source)


def test_blocks_are_of_shards(forms):
    with pytest.raises(UserError, match=r"DATA.SHUFFLE blocks is for shards: data set 'folder' has none"):
        describe(Source("folder", str(forms["folder"]), shuffle="blocks"))


def test_shards_of_other_splits_are_told_of(tmp_path):
    tar_of(tmp_path / "test-0.tar", {"x.jpg": b"x", "x.cls": b"0"})
    (tmp_path / "train.tar.gz").touch()
    message = (
        r"no shards of 'train' in .*: expected files such as train-00000.tar .* 1 of .tar of test; 'train.tar.gz' "
    )
    with pytest.raises(UserError, match=message):
        opened(Source("wds", str(tmp_path)))
    with pytest.raises(UserError, match="does not exist"):
        opened(Source("wds", str(tmp_path / "nowhere")))
    with pytest.raises(UserError, match=r"cannot open 'nothing://x': .*nothing"):
        opened(Source("wds", "nothing://x"))


def test_the_hubs_metadata_name_the_classes(forms):
    path = next(forms["parquet"].glob("train-00000*.parquet"))
    features = json.loads(pq.read_schema(path).metadata[b"huggingface"])["info"]["features"]
    assert features["label"]["names"][:2] == ["class00", "class01"]
    assert features["image"] == {"_type": "Image"}
    without = json.loads(parquet.hub_metadata("image", "label", ())[b"huggingface"])["info"]["features"]
    assert without["label"] == {"dtype": "int64", "_type": "Value"}  # of no class an own type would be wrong


@pytest.mark.parametrize("shuffle", ["global", "blocks"])
def test_a_store_that_fails_at_every_tenth_request(forms, shuffle):
    with served(forms["wds"], lambda request: request % 10 == 3) as server:
        local, remote = (source_of("wds", root, shuffle=shuffle) for root in (forms["wds"], server.url))
        for settings in ({}, {"num_workers": 2}):
            assert_equal(batches(training(remote, **settings)), batches(training(local, **settings)))
        assert server.requests > 10
        if shuffle == "global":  # an image is one request, whether its batch is read once or twice
            assert sum(".tar" in path and ".index" not in path for path in server.paths) > 48


def test_parquet_in_a_store_is_read_by_row_groups(forms, tmp_path):
    root = compressed(forms["folder"], tmp_path / "hub")
    with served(root, lambda request: request % 10 == 3) as server:
        local, remote = (Source("parquet", str(where), columns=COLUMNS) for where in (root, server.url))
        assert_equal(batches(training(remote)), batches(training(local)))
        made = sorted((tmp_path / "cache" / "repopt" / "shards").iterdir())
        assert len(made) == 1  # of the training's file
        server.paths.clear()
        opened(remote)
        assert sum(".parquet" in path for path in server.paths) <= 6  # sizes and names of classes, no labels


def test_a_store_that_is_gone_is_one_line(forms):
    with served(forms["wds"]) as server:
        loader = training(source_of("wds", server.url), num_workers=1)
        server.fails_at = lambda request: True
        with pytest.raises(UserError, match=r"cannot read 'http.*/train-.*\.tar', tried 5 times: 503"):
            list(loader)
        with pytest.raises(UserError, match=r"cannot read 'http://.*', tried 5 times: 503"):
            training(source_of("wds", server.url))


def _first_epoch(root, queue):
    queue.put(torch.cat([targets for _, targets in training(source_of("wds", root))]).tolist())


def test_a_forked_process_opens_the_store_anew(forms):
    with served(forms["wds"]) as server:
        root, context = server.url, multiprocessing.get_context("fork")
        here = torch.cat([targets for _, targets in training(source_of("wds", root))]).tolist()
        queue = context.Queue()
        process = context.Process(target=_first_epoch, args=(root, queue))
        process.start()
        assert queue.get(timeout=60) == here
        process.join()
