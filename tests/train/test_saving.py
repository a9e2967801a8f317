"""Checkpoints are written by a thread while training goes on: what is claimed is on the disk, and whole."""

import errno
import threading
import weakref

import pytest
import torch
from torch import nn
from train_helpers import make_state, network, trainer

import main_repopt
from repopt import checkpoint
from repopt.errors import UserError
from train.checkpoint import RunFolder
from train.interruption import Interrupted


@pytest.fixture
def slow(monkeypatch):
    """Writing waits for this event."""
    write, allowed = checkpoint.write, threading.Event()

    def wait_and_write(*arguments, **named):
        assert allowed.wait(20)
        write(*arguments, **named)

    monkeypatch.setattr(checkpoint, "write", wait_and_write)
    return allowed


def test_what_is_saved_is_what_was_when_it_was_saved(tmp_path, slow):
    folder, weight = RunFolder(tmp_path), torch.zeros(3)
    folder.save({"model": {"w": weight}, "seen": [{"a": (1, weight)}]})
    weight.add_(1)  # training goes on
    assert not folder.latest.exists()
    slow.set()
    folder.wait()
    content = checkpoint.read(folder.latest)
    assert torch.equal(content["model"]["w"], torch.zeros(3))
    assert torch.equal(content["seen"][0]["a"][1], torch.zeros(3))


def test_one_is_written_at_a_time(tmp_path, slow):
    folder = RunFolder(tmp_path)
    folder.save({"epoch": 1})
    second = threading.Thread(target=folder.save, args=({"epoch": 2},))
    second.start()
    second.join(0.2)
    assert second.is_alive()
    slow.set()
    second.join()
    folder.wait()
    assert [checkpoint.read(tmp_path / name)["epoch"] for name in ("latest.pth", "latest_1.pth")] == [2, 1]


def fail(*arguments, **named):
    raise UserError("cannot write")


def test_what_could_not_be_written_is_told_at_the_next_one_and_at_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "write", fail)
    folder = RunFolder(tmp_path)
    folder.save({"epoch": 1})
    with pytest.raises(UserError, match="cannot write"):
        folder.save({"epoch": 2})
    folder.wait()  # told once
    with pytest.raises(UserError, match="cannot write"):
        trainer(make_state(network()), folder=tmp_path, TRAIN__EPOCHS=1).fit()


def test_a_stop_is_claimed_when_it_is_on_the_disk(tmp_path, monkeypatch):
    write, order = checkpoint.write, []
    monkeypatch.setattr(checkpoint, "write", lambda *a, **k: (write(*a, **k), order.append("written")))
    training = trainer(make_state(network()), folder=tmp_path, TRAIN__EPOCHS=1)
    training._request.signal = None
    monkeypatch.setattr(type(training._request), "__bool__", lambda request: True)
    with pytest.raises(Interrupted, match="saved in"):
        training.fit()
    assert order == ["written"]
    assert training.folder.latest.is_file()


def test_a_full_disk_is_one_line_and_what_was_saved_before_is_whole(tmp_path, monkeypatch, capsys):
    command = ["--arch", "RepOpt-VGG-nano-hs", "--output", str(tmp_path), "--opts", "DATA.DATASET", "digits"]
    assert main_repopt.main([*command, "TRAIN.EPOCHS", "1"]) == 0
    before = (tmp_path / "RepOpt-VGG-nano-hs" / "default" / "latest.pth").read_bytes()

    def full(*arguments, **named):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    capsys.readouterr()
    assert main_repopt.main([*command, "TRAIN.EPOCHS", "2"]) == 2
    error = capsys.readouterr().err
    assert "No space left on device; what was saved before is whole" in error
    assert len(error.splitlines()) == 1
    assert (tmp_path / "RepOpt-VGG-nano-hs" / "default" / "latest.pth").read_bytes() == before


@pytest.mark.parametrize(
    ("settings", "saved"),
    [
        ({"SAVE_EVERY_MINUTES": 1e4}, [5]),  # short epochs: the end, and what has a name of its own
        ({"SAVE_EVERY_MINUTES": 1e4, "SAVE_FREQ": 2}, [2, 4, 5]),
        ({"SAVE_EVERY_MINUTES": 0.0}, [1, 2, 3, 4, 5]),
    ],
)
def test_epochs_after_which_the_place_in_the_training_is_saved(tmp_path, monkeypatch, settings, saved):
    epochs, save = [], RunFolder.save
    monkeypatch.setattr(
        RunFolder,
        "save",
        lambda folder, content, names=(): (epochs.append(content["epoch"] + 1), save(folder, content)),
    )
    state = make_state(network())
    state.max_accuracy = state.max_ema_accuracy = 100.0  # nothing is better
    trainer(state, folder=tmp_path, TRAIN__EPOCHS=5, **settings).fit()
    assert epochs == saved


def test_scales_that_are_not_finite_do_not_replace_good_ones(tmp_path, monkeypatch):
    state = make_state(network())
    (tmp_path / "scales.pth").write_bytes(b"good")
    training = trainer(state, folder=tmp_path, TRAIN__EPOCHS=2)
    monkeypatch.setattr(training, "searched_scales", lambda: {"s": state.model[1].bias.detach()})
    monkeypatch.setattr(training, "train_epoch", lambda: nn.init.constant_(state.model[1].bias, float("nan")))
    with pytest.raises(UserError, match="not finite any more"):
        training.fit()
    assert (tmp_path / "scales.pth").read_bytes() == b"good"


class TestOneReadAndNoMore:
    """A checkpoint is read once by a process, and its content is gone when the training begins."""

    @pytest.fixture
    def counted(self, monkeypatch):
        """Names of the files that are read, and what became of their first weights."""
        read, files, tensors = checkpoint.read, [], []

        def count(path):
            content = read(path)
            files.append(str(path))
            tensors.append(weakref.ref(next(iter(checkpoint.state_dict_of(content).values()))))
            return content

        monkeypatch.setattr(checkpoint, "read", count)
        return files, tensors

    def test_resuming(self, tmp_path, monkeypatch, counted):
        command = ["--arch", "RepOpt-VGG-nano-hs", "--output", str(tmp_path), "--opts", "DATA.DATASET", "digits"]
        assert main_repopt.main([*command, "TRAIN.EPOCHS", "1"]) == 0
        files, tensors = counted
        assert not files
        alive = []
        monkeypatch.setattr(
            "train.trainer.Trainer.fit", lambda trainer: alive.extend(tensor() is not None for tensor in tensors)
        )
        assert main_repopt.main([*command, "TRAIN.EPOCHS", "2"]) == 0
        assert len(files) == 1
        assert alive == [False]


def test_an_evaluation_says_nothing_in_the_log_of_a_training(tmp_path):
    command = ["--arch", "RepOpt-VGG-nano-hs", "--output", str(tmp_path)]
    options = ["--opts", "DATA.DATASET", "digits", "TRAIN.EPOCHS", "1"]
    assert main_repopt.main([*command, *options]) == 0
    folder = tmp_path / "RepOpt-VGG-nano-hs" / "default"
    before = {name: (folder / name).read_bytes() for name in ("log_rank0.txt", "run.json", "config.json")}
    assert main_repopt.main([*command, "--eval", "--resume", str(folder / "latest.pth"), *options]) == 0
    assert {name: (folder / name).read_bytes() for name in before} == before
    assert "val: top-1" in (folder / "eval_log_rank0.txt").read_text()
