"""A checkpoint has the model's weights and their moving average: which are taken is chosen, and said."""

import pytest
import torch

import main_repopt
import repopt
from repopt import checkpoint
from repopt.errors import UserError
from train import trained

ARCH = "RepOpt-VGG-nano-target-norepopt"
DIGITS = ("DATA.DATASET", "digits", "DATA.BATCH_SIZE", 150, "TRAIN.WARMUP_EPOCHS", 0, "TRAIN.EPOCHS", 1)


def network(seed):
    torch.manual_seed(seed)
    return repopt.create_model("RepOpt-VGG-nano", mode="target", num_classes=10)


@pytest.fixture
def file(tmp_path):
    """Writes a checkpoint with weights of both kinds, and returns its path."""

    def write(model=50.0, ema=60.0, *, averaged=True):
        content = {"model": network(0).state_dict(), "max_accuracy": model, "max_ema_accuracy": ema}
        content |= {"config": {"MODEL": {"ARCH": ARCH}}}
        checkpoint.write(content | ({"ema": network(1).state_dict()} if averaged else {}), tmp_path / "a.pth")
        return tmp_path / "a.pth"

    return write


@pytest.mark.parametrize(
    ("wanted", "scores", "seed"),
    [
        ("best", (50.0, 60.0), 1),
        ("best", (60.0, 50.0), 0),
        ("best", (50.0, "much"), 0),
        ("model", (50.0, 60.0), 0),
        ("ema", (60.0, 50.0), 1),
    ],
)
def test_which_are_taken(file, wanted, scores, seed):
    source = trained.read(file(*scores), weights=wanted)
    assert source.weights == ("model", "ema")[seed]
    for name, value in source.network().state_dict().items():
        assert torch.equal(value, network(seed).state_dict()[name]), name


def test_an_average_that_is_not_there(file):
    path = file(averaged=False)
    assert trained.read(path).weights == "model"
    with pytest.raises(UserError, match=r"a.pth': there is no moving average of the weights in it: take"):
        trained.read(path, weights="ema")


@pytest.mark.parametrize(("wanted", "seed"), [("best", 1), ("model", 0)])
def test_a_training_begins_with_them(file, wanted, seed, tmp_path, monkeypatch):
    begun = []
    monkeypatch.setattr("train.run.fit", lambda trainer: bool(begun.append(trainer.state.model.state_dict())) or True)
    arguments = ["--arch", ARCH, "--output", tmp_path, "--resume", file(), "--weights", wanted, "--opts", *DIGITS]
    assert main_repopt.main([*map(str, arguments)]) == 0
    assert all(torch.equal(value, network(seed).state_dict()[name]) for name, value in begun[0].items())
    log = (tmp_path / ARCH / "default" / "log_rank0.txt").read_text()
    assert f"begins with {list(checkpoint.WEIGHTS.values())[seed]} of {tmp_path / 'a.pth'}" in log


@pytest.mark.parametrize(("wanted", "seed"), [("best", 1), ("model", 0)])
def test_they_are_exported(file, wanted, seed, capsys):
    pytest.importorskip("torchao")
    import export
    from safetensors.torch import load_file

    path = file()
    assert export.main(["--resume", str(path), "--formats", "safetensors", "--weights", wanted]) == 0
    assert f"{list(checkpoint.WEIGHTS.values())[seed]} of {path}" in capsys.readouterr().out
    written = load_file(path.parent / "export" / "fp32.safetensors")
    for name, value in repopt.deploy(network(seed)).state_dict().items():
        torch.testing.assert_close(written[name], value)
