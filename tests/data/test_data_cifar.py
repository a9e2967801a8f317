"""CIFAR-100, read from small files in the real format."""

import functools
import hashlib
import http.server
import pickle
import tarfile
import threading

import numpy as np
import pytest
import torch
import torch.distributed as dist
from data_helpers import eval_loader, train_loader
from torchvision.datasets import CIFAR100

from data import Augmentation, DatasetInfo, Source, cifar, describe
from repopt.errors import UserError

CPU = torch.device("cpu")
NUM_TRAIN, NUM_VAL = 60, 23
NOWHERE = "file:///nowhere"


@pytest.fixture
def archive(tmp_path, monkeypatch):
    """The set's folder in `tmp_path/ready`, and torchvision's checksums and address set to its files."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "ready" / "cifar-100-python"
    folder.mkdir(parents=True)
    contents = {
        split: {
            "data": rng.integers(0, 256, (n, 3072), dtype=np.uint8),
            "fine_labels": rng.integers(0, 100, n).tolist(),
            "coarse_labels": [0] * n,
        }
        for split, n in (("train", NUM_TRAIN), ("test", NUM_VAL))
    }
    contents["meta"] = {"fine_label_names": [f"class{i}" for i in range(100)]}
    md5 = {}
    for name, content in contents.items():
        (folder / name).write_bytes(pickle.dumps(content))
        md5[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()
    packed = tmp_path / "cifar-100-python.tar.gz"
    with tarfile.open(packed, "w:gz") as tar:
        tar.add(folder, "cifar-100-python")
    monkeypatch.setattr(CIFAR100, "train_list", [["train", md5["train"]]])
    monkeypatch.setattr(CIFAR100, "test_list", [["test", md5["test"]]])
    monkeypatch.setattr(CIFAR100, "meta", CIFAR100.meta | {"md5": md5["meta"]})
    monkeypatch.setattr(CIFAR100, "filename", packed.name)
    monkeypatch.setattr(CIFAR100, "tgz_md5", hashlib.md5(packed.read_bytes()).hexdigest())
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    return contents


def check(root, contents):
    for split, name in (("train", "train"), ("val", "test")):
        images, labels = cifar.load(str(root), split)
        assert torch.equal(images, torch.from_numpy(contents[name]["data"]).view(-1, 3, 32, 32))
        assert images.is_contiguous()
        assert labels.tolist() == contents[name]["fine_labels"]
        assert labels.dtype == torch.int64


def test_the_real_format_is_read(archive, tmp_path, monkeypatch):
    monkeypatch.setattr(CIFAR100, "url", NOWHERE)  # so nothing is fetched
    check(tmp_path / "ready", archive)


@pytest.fixture
def web(tmp_path):
    """`tmp_path` served on the loopback."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=tmp_path)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_an_absent_set_is_downloaded(archive, tmp_path, web, monkeypatch):
    monkeypatch.setattr(CIFAR100, "url", f"{web}/{CIFAR100.filename}")
    check(tmp_path / "fresh", archive)
    assert (tmp_path / "fresh" / "cifar-100-python" / "train").is_file()


def test_one_line_where_it_cannot_be_downloaded(archive, tmp_path, monkeypatch):
    monkeypatch.setattr(CIFAR100, "url", NOWHERE)
    with pytest.raises(UserError, match="could not be downloaded") as error:
        cifar.load(str(tmp_path / "fresh"), "train")
    assert str(tmp_path / "fresh") in str(error.value)
    assert "\n" not in str(error.value)


def test_only_the_first_process_of_a_node_downloads_and_all_wait(archive, tmp_path, monkeypatch):
    barriers = []
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "barrier", lambda: barriers.append(len(barriers)))
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(UserError, match="is not") as error:
        cifar.load(str(tmp_path / "fresh"), "train")
    assert "downloaded" not in str(error.value)
    assert not (tmp_path / "fresh").exists()
    assert len(barriers) == 1

    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr(CIFAR100, "url", NOWHERE)
    with pytest.raises(UserError):
        cifar.load(str(tmp_path / "fresh"), "train")
    assert len(barriers) == 2  # reached even though the download failed: the others are waiting


def test_no_folder_given():
    with pytest.raises(UserError, match="--data-path"):
        cifar.load("", "val")


def test_loaders(archive, tmp_path):
    source = Source("cf100", str(tmp_path / "ready"))
    assert describe(source) == DatasetInfo(num_classes=100, image_size=32)
    common = {"image_size": 32, "interpolation": "bicubic", "num_classes": 100, "device": CPU}
    train = train_loader(source, Augmentation(), batch_size=20, label_smoothing=0.1, **common)
    assert (len(train), train.num_images) == (3, NUM_TRAIN)
    raw = torch.from_numpy(archive["train"]["data"]).view(-1, 3, 32, 32)
    labels = torch.tensor(archive["train"]["fine_labels"])
    images, targets = map(torch.cat, zip(*train, strict=True))
    mean, std = torch.tensor(cifar.MEAN).view(3, 1, 1), torch.tensor(cifar.STD).view(3, 1, 1)
    padded = torch.nn.functional.pad(raw, [4] * 4)
    order = torch.cat(tuple(train._sampler.batches(0)))
    assert torch.equal(targets, labels[order])
    mirrored = 0
    for image, index in zip((images * std + mean).mul(255).round().to(torch.uint8), order, strict=True):
        windows = padded[index].unfold(1, 32, 1).unfold(2, 32, 1).permute(1, 2, 0, 3, 4)
        plain, mirror = ((windows == candidate).all((2, 3, 4)).sum() for candidate in (image, image.flip(2)))
        assert plain + mirror == 1
        mirrored += int(mirror)
    assert 15 < mirrored < 45

    val = eval_loader(source, crop=False, batch_size=10, **common)
    images, targets = map(torch.cat, zip(*val, strict=True))
    expected = torch.from_numpy(archive["test"]["data"]).view(-1, 3, 32, 32) / 255
    torch.testing.assert_close(images, (expected - mean) / std, rtol=1e-5, atol=1e-5)
    assert targets.tolist() == archive["test"]["fine_labels"]
