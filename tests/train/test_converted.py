"""Networks of timm that `convert_model` takes, from the search of their scales to the files of a plain network."""

import json

import export
import pytest
import timm
import torch
from test_cli import DIGITS, assert_equal, evaluation, main, trainer_of

import repopt
from repopt import RepOptimizer, checkpoint
from train import trained
from train.search import movement, start_of_search

GHOST = "timm/repghostnet_050"
SHORT = (*DIGITS, "DATA.BATCH_SIZE", 100, "TRAIN.WARMUP_EPOCHS", 0, "TRAIN.BASE_LR", 0.1)
STEP = ("TRAIN.LR_SCHEDULER.NAME", "step")  # a schedule that does not depend on the number of epochs


def train(output, mode, tag, *arguments, epochs=1, options=()):
    """The folder of a training."""
    command = ("--arch", f"{GHOST}{mode}", "--tag", tag, "--output", output, *arguments)
    assert main(*command, "--opts", *SHORT, "TRAIN.EPOCHS", epochs, *options) == 0
    return output / f"{GHOST}{mode}" / tag


def converted(mode):
    return repopt.convert_model(timm.create_model("repghostnet_050", num_classes=10), mode)


@pytest.fixture(scope="module")
def scales(tmp_path_factory):
    """The file of a short search."""
    return train(tmp_path_factory.mktemp("search"), "-hs", "t") / "scales.pth"


@pytest.fixture(scope="module")
def target(scales, tmp_path_factory):
    """The folder of a plain network trained with its scales for two epochs."""
    return train(tmp_path_factory.mktemp("target"), "-target", "t", "--scales-path", scales, epochs=2, options=STEP)


def test_a_search_trains_the_converted_network(scales):
    content = checkpoint.read(scales.parent / "latest.pth")
    model = converted("hs")
    repopt.load_weights(model, content["model"])
    found = repopt.load_scales(scales)
    assert_equal(found, repopt.extract_scales(model))
    assert movement(start_of_search(model), {}, found).way > 0


@pytest.mark.parametrize("mode", ["target", "csla"])
def test_its_scales_make_the_beginning(monkeypatch, scales, tmp_path, mode):
    arguments = ("--arch", f"{GHOST}-{mode}", "--output", tmp_path, "--scales-path", scales, "--opts", *SHORT)
    trainer = trainer_of(monkeypatch, *arguments)
    torch.manual_seed(0)
    expected = converted(mode)
    repopt.initialize(expected, repopt.load_scales(scales))
    assert_equal(trainer.state.model.state_dict(), expected.state_dict())
    assert isinstance(trainer.state.optimizer, repopt.RepSGD) == (mode == "target")


@pytest.mark.parametrize("mode", ["-target-norepopt", ""])
def test_what_a_plain_rule_trains(monkeypatch, tmp_path, mode):
    trainer = trainer_of(monkeypatch, "--arch", f"{GHOST}{mode}", "--output", tmp_path, "--opts", *SHORT)
    expected = converted("target") if mode else timm.create_model("repghostnet_050", num_classes=10)
    assert trainer.state.model.state_dict().keys() == expected.state_dict().keys()
    assert isinstance(trainer.state.optimizer, torch.optim.SGD)
    assert not isinstance(trainer.state.optimizer, RepOptimizer)


def test_it_goes_on_where_it_stopped_and_is_evaluated(scales, target, tmp_path, capsys):
    part = train(tmp_path, "-target", "t", "--scales-path", scales, options=STEP)
    assert checkpoint.read(part / "latest.pth")["epoch"] == 0
    assert train(tmp_path, "-target", "t", epochs=2, options=STEP) == part
    for key in ("model", "optimizer", "scales"):
        assert_equal(*(checkpoint.read(folder / "latest.pth")[key] for folder in (part, target)))
    log = (target / "log_rank0.txt").read_text()
    capsys.readouterr()
    weights = ("--eval", "--resume", target / "latest.pth")
    assert main("--arch", f"{GHOST}-target", "--output", tmp_path, *weights, "--opts", *DIGITS) == 0
    assert evaluation(capsys.readouterr().out) == evaluation(log[log.rindex("epoch 2 val") :])
    assert main("--arch", GHOST, "--output", tmp_path, *weights, "--opts", *DIGITS) == 2
    assert "the weights are not those of this model" in capsys.readouterr().err


def test_the_multi_branch_network_trains_and_is_evaluated(scales, tmp_path, capsys):
    folder = train(tmp_path, "-csla", "t", "--scales-path", scales)
    assert_equal(checkpoint.read(folder / "latest.pth")["scales"], repopt.load_scales(scales))
    weights = ("--eval", "--resume", folder / "latest.pth")
    assert main("--arch", f"{GHOST}-csla", "--output", tmp_path, *weights, "--opts", *DIGITS) == 0


def test_one_run_searches_and_trains(tmp_path):
    folder = train(tmp_path, "-target", "one", epochs=2, options=("TRAIN.SEARCH_EPOCHS", 1))
    assert repopt.load_scales(folder / "scales.pth").keys() == repopt.extract_scales(converted("hs")).keys()
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert {record["epoch"]: "scales" in record for record in records if "epoch" in record} == {1: True, 2: False}


def test_back_from_a_checkpoint_or_its_weights_alone(target, tmp_path):
    weights = checkpoint.read(target / "latest.pth")["model"]
    checkpoint.write(weights, tmp_path / "weights.pth")
    for source in (trained.read(target / "latest.pth"), trained.read(tmp_path / "weights.pth", f"{GHOST}-target")):
        assert source.arch == (GHOST, "target", True)
        assert_equal(source.network().state_dict(), weights)


def test_files_for_other_software(target, tmp_path):
    arguments = ["--resume", str(target / "latest.pth"), "--out", str(tmp_path), "--formats", "safetensors"]
    assert export.main(arguments) == 0
    deployed = repopt.deploy(trained.read(target / "latest.pth").network())
    assert_equal(checkpoint.read(tmp_path / "fp32.safetensors"), deployed.state_dict())
