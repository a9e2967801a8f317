"""Files of others are data; ours are written whole or not at all."""

import argparse
import errno
import os
import pickle
import zipfile

import numpy as np
import pytest
import torch
from yacs.config import CfgNode

import repopt
from repopt import checkpoint
from repopt.errors import UserError
from train.checkpoint import RunFolder

NANO = "RepOpt-VGG-nano"


class Malice:
    """Touches a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


@pytest.fixture
def weights():
    return repopt.create_model(NANO, mode="target", num_classes=10).state_dict()


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"model": state, "epoch": 3},
        lambda state: {"state_dict": state},
        lambda state: state,
        lambda state: {"model": {f"module.{name}": value for name, value in state.items()}},
    ],
    ids=["model", "state_dict", "bare", "ddp"],
)
def test_released_formats(tmp_path, weights, wrap):
    torch.save(wrap(weights), tmp_path / "a.pth")
    model = repopt.create_model(NANO, mode="target", num_classes=10)
    repopt.load_weights(model, checkpoint.state_dict_of(checkpoint.read(tmp_path / "a.pth")))
    for name, value in model.state_dict().items():
        assert torch.equal(value, weights[name])


def test_old_pickled_configurations_are_read_as_data(tmp_path, weights):
    schedule = torch.optim.lr_scheduler.MultiStepLR(torch.optim.SGD([torch.zeros(1)]), [3, 5]).state_dict()
    config = CfgNode({"TRAIN": {"EPOCHS": 120, "BETAS": (0.9, 0.999)}, "TAG": "old"})
    config.freeze()
    torch.save(
        {"model": weights, "config": config, "max_accuracy": 78.62, "epoch": 119, "lr_scheduler": schedule},
        tmp_path / "old.pth",
    )
    content = checkpoint.read(tmp_path / "old.pth")
    assert content["lr_scheduler"]["milestones"] == {3: 1, 5: 1}
    assert content["config"] == {"TRAIN": {"EPOCHS": 120, "BETAS": (0.9, 0.999)}, "TAG": "old"}
    assert not isinstance(content["config"], CfgNode)
    assert checkpoint.state_dict_of(content).keys() == weights.keys()


def test_arguments_and_numbers_of_other_libraries_are_read_as_data(tmp_path):
    args = argparse.Namespace(model="resnet18", lr=0.1, device=torch.device("cuda", 1), betas=(0.9, 0.99))
    metrics = {"best": np.float64(78.5), "epoch": np.int64(3), "amp": np.bool_(True), "loss": np.float32(0.5)}
    content = {"args": args, "size": torch.Size((3, 4)), "seen": {3}} | metrics
    torch.save(content, tmp_path / "a.pth")
    read = checkpoint.read(tmp_path / "a.pth")
    assert read["args"] == vars(args) | {"device": "cuda:1"}
    assert (read["size"], read["seen"]) == ((3, 4), [3])
    assert {name: read[name] for name in metrics} == metrics
    assert [type(read[name]) for name in metrics] == [float, int, bool, float]


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_what_is_read_is_what_torch_reads(tmp_path, zipped):
    base = torch.randn(4, 6)
    types = (torch.float64, torch.float16, torch.bfloat16, torch.complex64, torch.int64, torch.uint8, torch.bool)
    types += (torch.uint16, torch.float8_e4m3fn) if zipped else ()
    tensors = {str(dtype): base.to(dtype) for dtype in types} | {
        "transposed": base.T,
        "a part": base[1:, 2:],
        "a number": torch.tensor(3.0),
        "empty": torch.empty(3, 0),
        "channels last": torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
        "parameter": torch.nn.Parameter(base),
    }
    plain = {"numbers": [1, -1, 300, 70000, 2**40, -(2**40), True, None, 1.5], 3: {4: ((), (1,), (1, 2), (1, 2, 3, 4))}}
    torch.save({"tensors": tensors, "plain": plain}, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    ours, theirs = checkpoint.read(tmp_path / "a.pth"), torch.load(tmp_path / "a.pth", weights_only=True)
    assert ours["plain"] == theirs["plain"] == plain
    for name, tensor in theirs["tensors"].items():
        read = ours["tensors"][name]
        assert (read.dtype, read.stride()) == (tensor.dtype, tensor.stride())
        assert torch.equal(
            read.double() if name.endswith("fn") else read, tensor.double() if name.endswith("fn") else tensor
        )
    assert ours["tensors"]["transposed"].data_ptr() == ours["tensors"]["parameter"].data_ptr()  # what was one, is one


@pytest.mark.parametrize("place", ["model", "config", "optimizer"])
def test_nothing_in_a_file_is_executed(tmp_path, weights, place):
    trap = tmp_path / "executed"
    torch.save({"model": weights, place: {"x": Malice(trap)}}, tmp_path / "bad.pth")
    with pytest.raises(UserError, match="refused"):
        checkpoint.read(tmp_path / "bad.pth")
    (tmp_path / "raw.pth").write_bytes(pickle.dumps({"model": Malice(trap)}))
    with pytest.raises(UserError):
        checkpoint.read(tmp_path / "raw.pth")
    assert not trap.exists()


@pytest.mark.parametrize("damage", [b"", b"not a checkpoint", b"PK\x03\x04 broken zip"])
def test_files_that_are_no_checkpoints(tmp_path, damage):
    (tmp_path / "a.pth").write_bytes(damage)
    with pytest.raises(UserError, match=r"a\.pth"):
        checkpoint.read(tmp_path / "a.pth")
    with pytest.raises(UserError, match="there is no file"):
        checkpoint.read(tmp_path / "b.pth")


def test_content_that_is_no_state_dict(tmp_path):
    for content in ({"epoch": 1}, {"model": {"a": 3}}, {"model": {}}):
        torch.save(content, tmp_path / "a.pth")
        with pytest.raises(UserError, match="no state dict"):
            checkpoint.state_dict_of(checkpoint.read(tmp_path / "a.pth"))
    torch.save([1, 2], tmp_path / "a.pth")
    with pytest.raises(UserError, match="holds a list"):
        checkpoint.read(tmp_path / "a.pth")


def test_weights_that_do_not_fit_are_named(weights):
    other = repopt.create_model(NANO, mode="target", num_classes=7)
    with pytest.raises(UserError, match=r"'linear.weight', \(10, 256\) in the file, \(7, 256\) expected"):
        repopt.load_weights(other, weights)
    baseline = repopt.create_model(NANO, mode="repvgg", num_classes=10)
    with pytest.raises(UserError, match=r"missing such as 'stage0.conv_3x3.weight'; .* unknown such as"):
        repopt.load_weights(baseline, weights)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "latest.pth"
    checkpoint.write({"epoch": 1}, path)

    def full_disk(content, file):
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(UserError, match="No space left"):
        checkpoint.write({"epoch": 2}, path)
    assert checkpoint.read(path) == {"epoch": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["latest.pth"]


def test_what_a_killed_writer_left_is_nobody_elses(tmp_path, monkeypatch):
    """It may be named as the best checkpoint already, and must not be written over."""
    path, best = tmp_path / "latest.pth", tmp_path / "best_ckpt.pth"
    with monkeypatch.context() as context:
        context.setattr("train.checkpoint.link_or_copy", lambda file, name: (name.hardlink_to(file), os._exit(9)))
        child = os.fork()
        if not child:
            folder = RunFolder(tmp_path)
            folder.save({"epoch": 1}, [best.name])
            folder.wait()
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert checkpoint.read(best) == {"epoch": 1}
    checkpoint.write({"epoch": 0}, path)
    assert checkpoint.read(best) == {"epoch": 1}
    assert checkpoint.read(path) == {"epoch": 0}


def test_several_names_and_the_last_ones(tmp_path):
    folder = RunFolder(tmp_path, keep=3)
    for epoch in range(5):
        folder.save({"epoch": epoch}, [f"ckpt_epoch_{epoch}.pth"] if epoch % 2 else ())
        folder.wait()
    kept = {file.name: checkpoint.read(file)["epoch"] for file in tmp_path.iterdir()}
    named = {"ckpt_epoch_1.pth": 1, "ckpt_epoch_3.pth": 3}
    assert kept == {"latest.pth": 4, "latest_1.pth": 3, "latest_2.pth": 2} | named


def test_file_systems_without_links(tmp_path, monkeypatch):
    def refuse(self, target):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr("pathlib.Path.hardlink_to", refuse)
    test_several_names_and_the_last_ones(tmp_path)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_truncated_files(tmp_path, weights, zipped):
    path = tmp_path / "a.pth"
    torch.save({"model": weights}, path, _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    for length in (10, len(whole) // 2, len(whole) - 100, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"a\.pth"):
            checkpoint.read(path)


def test_a_changed_bit_is_found(tmp_path):
    """In every byte of every tensor and of the pickle; elsewhere (padding, other entries) it may change nothing."""
    path = tmp_path / "a.pth"
    content = {"w": torch.randn(20), "v": torch.randn(3), "epoch": 3}
    checkpoint.write(content, path)
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        read = [whole.index(archive.read(name)) for name in archive.namelist() if "/data" in name]
        sizes = [archive.getinfo(name).file_size for name in archive.namelist() if "/data" in name]
    vital = {at for start, size in zip(read, sizes, strict=True) for at in range(start, start + size)}
    assert len(vital) > 200
    for at in sorted(vital | set(range(0, len(whole), 7))):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :])
        try:
            found = checkpoint.read(path)
        except UserError as error:
            assert "a.pth" in str(error)
        else:
            assert at not in vital
            assert str(found) == str(content)


def test_checkpoints_that_end_with_a_digest_are_read(tmp_path):
    """As they were written before: SHA-256 as the comment of the zip."""
    checkpoint.write({"epoch": 3}, tmp_path / "a.pth")
    with zipfile.ZipFile(tmp_path / "a.pth", "a") as archive:
        archive.comment = b"sha256:" + b"0" * 64
    assert checkpoint.read(tmp_path / "a.pth") == {"epoch": 3}


def test_the_newest_whole_checkpoint_is_found_through_gaps(tmp_path):
    folder = RunFolder(tmp_path)
    assert folder.newest() is None
    for number in (7, 3):
        checkpoint.write({"epoch": number}, tmp_path / f"latest_{number}.pth")
    (tmp_path / "latest_x.pth").write_bytes(b"of somebody else")
    assert folder.newest()[0] == tmp_path / "latest_3.pth"
    (tmp_path / "latest_1.pth").write_bytes(b"damaged")
    assert folder.newest()[0] == tmp_path / "latest_3.pth"
    assert (tmp_path / "latest_1.pth.damaged").read_bytes() == b"damaged"


def test_scale_files(tmp_path):
    hs = repopt.create_model(NANO, mode="hs")
    scales = repopt.extract_scales(hs)
    repopt.save_scales(scales, tmp_path / "scales.pth")
    torch.save({"model": hs.state_dict(), "epoch": 1}, tmp_path / "search.pth")
    target = repopt.create_model(NANO, mode="target")
    torch.save({"model": target.state_dict(), "scales": scales}, tmp_path / "target.pth")
    for name in ("scales.pth", "search.pth", "target.pth"):
        loaded = repopt.load_scales(tmp_path / name)
        for key, value in scales.items():
            assert torch.equal(loaded[key], value)
    scales["stage0.scale_conv.weight"][3] = float("nan")
    repopt.save_scales(scales, tmp_path / "scales.pth")
    with pytest.raises(UserError, match=r"'stage0\.scale_conv\.weight' has values that are not finite"):
        repopt.load_scales(tmp_path / "scales.pth")
    torch.save({"model": {"w": torch.ones(2, 2, 1, 1)}}, tmp_path / "none.pth")
    with pytest.raises(UserError, match="holds no searched scales"):
        repopt.load_scales(tmp_path / "none.pth")
