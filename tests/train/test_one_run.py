"""One run: a target searches its scales in the first epochs of its own training, then they are constants."""

import json

import pytest
import timm
import torch
from test_cli import DIGITS, HS, TARGET, assert_equal, main, run_or_main

import repopt
from repopt import checkpoint
from train.command import EXIT_INTERRUPTED

SHORT = ("DATA.BATCH_SIZE", 100, "TRAIN.EPOCHS", 3, "TRAIN.WARMUP_EPOCHS", 1, "TRAIN.SEARCH_EPOCHS", 1)


def one_run(folder, tag, *options):
    return main("--arch", TARGET, "--tag", tag, "--output", folder, "--opts", *DIGITS, *SHORT, *options)


def latest(folder, tag):
    return checkpoint.read(folder / TARGET / tag / "latest.pth")


@pytest.mark.parametrize("rule", ["sgd", "adamw", "muon"])
def test_stopped_after_every_checkpoint_it_is_the_uninterrupted_one(tmp_path, stopping, rule):
    options = ("TRAIN.OPTIMIZER.NAME", rule, "TRAIN.CLIP_GRAD", 2.0, "TRAIN.EMA_ALPHA", 0.01, "SAVE_EVERY_STEPS", 2)
    assert one_run(tmp_path, "whole", *options) == 0
    codes = []
    with stopping():
        while not codes or codes[-1] == EXIT_INTERRUPTED:
            codes.append(one_run(tmp_path, "part", *options))
    assert codes[-1] == 0
    assert len(codes) > 4
    whole, part = latest(tmp_path, "whole"), latest(tmp_path, "part")
    for key in ("model", "ema", "optimizer", "scales", "max_accuracy"):
        assert_equal(part[key], whole[key])


def test_two_processes_are_one_that_accumulates(tmp_path):
    """Each process holds branches of its own, which stay the same in both: so do kernels and scales, to rounding."""
    options = [*DIGITS, *SHORT, "DATA.BATCH_SIZE", 25, "TRAIN.EPOCHS", 2, "TRAIN.BASE_LR", 0.1, "TRAIN.CLIP_GRAD", 1.0]
    options += ["TEST.PERIOD", 2]
    for processes, accumulation in ((0, 2), (2, 1)):
        common = ("--arch", TARGET, "--tag", f"by{processes}", "--output", tmp_path)
        run_or_main(*common, "--accumulation-steps", accumulation, "--opts", *options, processes=processes)
    one, two = (latest(tmp_path, f"by{processes}") for processes in (0, 2))
    for key in ("model", "scales"):
        for name, value in one[key].items():
            if "running" not in name and "tracked" not in name:
                assert torch.allclose(value, two[key][name], rtol=1e-3, atol=1e-3), name


def test_what_it_writes_is_a_targets(tmp_path):
    assert one_run(tmp_path, "one") == 0
    folder, content = tmp_path / TARGET / "one", latest(tmp_path, "one")
    model = repopt.create_model("RepOpt-VGG-nano", mode="target", num_classes=10)
    repopt.load_weights(model, checkpoint.state_dict_of(content))
    scales = repopt.load_scales(folder / "scales.pth")
    assert_equal(scales, content["scales"])
    assert scales.keys() == repopt.extract_scales(repopt.create_model("RepOpt-VGG-nano", mode="hs")).keys()
    epochs = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    phases = {record["epoch"]: "scales" in record for record in epochs if "epoch" in record}
    assert phases == {1: True, 2: False, 3: False}
    assert (
        main("--arch", TARGET, "--output", tmp_path, "--eval", "--resume", folder / "latest.pth", "--opts", *DIGITS)
        == 0
    )
    again = ("--arch", TARGET, "--tag", "again", "--output", tmp_path, "--scales-path", folder / "scales.pth")
    assert main(*again, "--opts", *DIGITS, "TRAIN.EPOCHS", 1) == 0


def test_weights_that_are_given_stay(tmp_path):
    assert one_run(tmp_path, "first", "TRAIN.EPOCHS", 1) == 0
    weights = checkpoint.state_dict_of(latest(tmp_path, "first"))
    torch.save(weights, tmp_path / "weights.pth")
    command = ("--arch", TARGET, "--tag", "second", "--output", tmp_path, "--resume", tmp_path / "weights.pth")
    assert main(*command, "--opts", *DIGITS, *SHORT, "TRAIN.BASE_LR", 0.0, "TRAIN.EPOCHS", 2) == 0
    after = checkpoint.state_dict_of(latest(tmp_path, "second"))
    for name in weights:
        if weights[name].dim() == 4:
            assert torch.allclose(after[name], weights[name], rtol=1e-5, atol=1e-7), name


def test_a_search_of_all_epochs_is_the_hyper_search(tmp_path):
    """The same loss from the same branches, whatever stands in the files."""
    assert one_run(tmp_path, "one", "TRAIN.SEARCH_EPOCHS", 3) == 0
    assert "scales" not in latest(tmp_path, "one")  # searched to the end
    assert repopt.load_scales(tmp_path / TARGET / "one" / "scales.pth")


def test_another_number_of_epochs_is_refused_after_the_freeze(tmp_path, capsys, stopping):
    assert one_run(tmp_path, "one") == 0
    assert one_run(tmp_path, "one", "TRAIN.SEARCH_EPOCHS", 2) == 2
    assert "the scales are constants since TRAIN.SEARCH_EPOCHS 1 ended, and it is 2 now" in capsys.readouterr().err
    with stopping():
        assert one_run(tmp_path, "two", "SAVE_EVERY_STEPS", 1) == EXIT_INTERRUPTED
    assert one_run(tmp_path, "two", "TRAIN.SEARCH_EPOCHS", 2) == 0


@pytest.mark.parametrize("rule", ["muon", "adafactor"])
def test_rules_that_no_multiplier_follows_hold_the_branches(tmp_path, rule):
    options = ("TRAIN.CONSTANTS", "initial", "TRAIN.SEARCH_EPOCHS", 0, "TRAIN.OPTIMIZER.NAME", rule, "TRAIN.EPOCHS", 2)
    assert one_run(tmp_path, "constant", *options) == 0
    held = latest(tmp_path, "constant")["optimizer"]["state"][0]
    assert {"conv", "conv_1x1", "scale_conv", "scale_1x1"} <= held.keys()
    scale = latest(tmp_path, "constant")["scales"]["stage0.scale_conv.weight"]
    assert torch.equal(held["scale_conv"], scale)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--arch", HS), "is of a -target that a RepOptimizer trains, not of RepOpt-VGG-nano-hs"),
        (("--arch", "timm/resnet10t"), "is of a -target that a RepOptimizer trains, not of timm/resnet10t"),
        (("--arch", TARGET, "--scales-path", "a.pth"), "from --scales-path or from TRAIN.SEARCH_EPOCHS, not from both"),
    ],
)
def test_mistakes(tmp_path, capsys, arguments, message):
    assert main(*arguments, "--output", tmp_path, "--opts", *DIGITS, *SHORT) == 2
    assert message in capsys.readouterr().err


def test_the_hyper_search_computes_as_the_network_with_branches(monkeypatch, tmp_path):
    """Its losses and weights are bit for bit those of the network whose every pass adds up its branches."""
    options = ("--opts", *DIGITS, "TRAIN.EPOCHS", 2, "DATA.BATCH_SIZE", 100, "TRAIN.CLIP_GRAD", 2.0)
    assert main("--arch", HS, "--tag", "held", "--output", tmp_path, *options) == 0
    monkeypatch.setattr("train.run.plain_form", lambda task, model, scales, **_: (model, None))
    assert main("--arch", HS, "--tag", "apart", "--output", tmp_path, *options) == 0
    held, apart = (checkpoint.read(tmp_path / HS / tag / "latest.pth")["model"] for tag in ("held", "apart"))
    assert_equal(held, apart)
    assert all(torch.isfinite(value).all() for value in held.values())


def test_a_network_of_another_library_is_trained_as_it_is(tmp_path):
    """Under its own name and with its own weights; its branches are found before batch norms."""
    arch = "timm/test_resnet-target"
    command = ("--arch", arch, "--output", tmp_path, "--opts", *DIGITS, *SHORT, "TRAIN.EPOCHS", 2)
    assert main(*command, "MODEL.PRIOR", "acnet") == 0
    content = checkpoint.read(tmp_path / arch / "default" / "latest.pth")
    assert set(content["model"]) == set(timm.create_model("test_resnet", num_classes=10).state_dict())
    assert {name.split(".")[-2] for name in content["scales"]} == {"scale_conv", "scale_wide", "scale_high"}
    assert main(*command, "MODEL.PRIOR", "repvgg", "TRAIN.EPOCHS", 3) == 2  # the branches are others


@pytest.mark.parametrize(
    "settings",
    [
        ("MODEL.PRIOR", "orepa"),
        ("MODEL.PRIOR", "average", "TRAIN.OPTIMIZER.NAME", "adamw", "TRAIN.BASE_LR", 0.001),
    ],
)
def test_branches_that_no_constants_follow_are_held_to_the_end(tmp_path, stopping, settings):
    """And stopped after every checkpoint, they are those of the uninterrupted training."""
    arch = "timm/test_resnet-target"
    options = ("--output", tmp_path, "--opts", *DIGITS, *SHORT, "TRAIN.EPOCHS", 2, "SAVE_EVERY_STEPS", 2, *settings)
    assert main("--arch", arch, "--tag", "whole", *options) == 0
    codes = []
    with stopping():
        while not codes or codes[-1] == EXIT_INTERRUPTED:
            codes.append(main("--arch", arch, "--tag", "part", *options))
    assert codes[-1] == 0
    whole, part = (checkpoint.read(tmp_path / arch / tag / "latest.pth") for tag in ("whole", "part"))
    for key in ("model", "optimizer", "scales"):
        assert_equal(part[key], whole[key])
    kept = [name for state in whole["optimizer"]["state"].values() for name in state]
    assert "depthwise" in kept if "orepa" in settings else "conv_average" in kept
