"""A training begins with the weights of another: what is taken, what is new, what is refused."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

import main_repopt
import repopt
from repopt import checkpoint

ROOT = Path(__file__).resolve().parents[2]
TARGET = "RepOpt-VGG-nano-target"
PLAIN = f"{TARGET}-norepopt"
QUICK = ("TRAIN.EPOCHS", 1, "TRAIN.WARMUP_EPOCHS", 0, "DATA.BATCH_SIZE", 64, "DATA.DATASET", "digits")


def main(*arguments):
    return main_repopt.main([*map(str, arguments)])


def untouched(tmp_path, *arguments, arch=None, options=(), dataset="patches"):
    """Train without a step that moves weights, and return the checkpoint and the log."""
    named = ("--arch", arch) if arch else ()
    options = (*QUICK, "DATA.DATASET", dataset, "TRAIN.BASE_LR", 0, *options)
    assert main(*named, "--output", tmp_path, *arguments, "--opts", *options) == 0
    (folder,) = (path.parent for path in tmp_path.rglob("latest.pth"))
    return checkpoint.read(folder / "latest.pth"), (folder / "log_rank0.txt").read_text()


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A trained classifier of 10 classes, with the scales of its RepOptimizer."""
    output = tmp_path_factory.mktemp("source")
    assert main("--arch", TARGET, "--output", output, "--opts", *QUICK, "TRAIN.SEARCH_EPOCHS", 1) == 0
    return output / TARGET / "default" / "latest.pth"


def test_all_but_the_head_is_taken_with_the_scales(source, tmp_path):
    found, log = untouched(tmp_path, "--pretrained", source)  # it says the architecture, too
    kernels = {name: v for name, v in checkpoint.read(source)["model"].items() if "running" not in name}
    head = {"linear.weight", "linear.bias"}
    for name, value in kernels.items():
        if name not in head and "num_batches" not in name:
            assert torch.equal(found["model"][name], value), name
    assert found["model"]["linear.weight"].shape == (8, 256)
    assert f"begins with the model's weights of {source}" in log
    assert "new: linear.weight, linear.bias\n" in log
    for name, scale in repopt.load_scales(source).items():
        assert torch.equal(found["scales"][name], scale)


def test_the_head_of_the_same_classes_is_taken(source, tmp_path):
    found, log = untouched(tmp_path, "--pretrained", source, dataset="digits")
    assert torch.equal(found["model"]["linear.weight"], checkpoint.read(source)["model"]["linear.weight"])
    assert "new:" not in log


def test_without_scales_a_plain_rule_trains(source, tmp_path):
    bare = tmp_path / "bare.pth"
    torch.save(checkpoint.read(source)["model"], bare)
    found, log = untouched(tmp_path, "--pretrained", bare, arch=TARGET)
    assert f"{bare} holds no scales, and there is no --scales-path: a plain sgd trains" in log
    assert "scales" not in found


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_weights_of_timm(tmp_path, suffix):
    """As timm publishes them: of 1000 classes, in a file of its own."""
    network = timm.create_model("resnet10t", num_classes=1000)
    path = tmp_path / f"resnet{suffix}"
    if suffix == ".pth":
        torch.save(network.state_dict(), path)
    else:
        save_file(network.state_dict(), path)
    found, log = untouched(tmp_path, "--pretrained", path, arch="timm/resnet10t")
    for name, param in network.named_parameters():
        if name not in ("fc.weight", "fc.bias"):
            assert torch.equal(found["model"][name], param.detach()), name
    assert "new: fc.weight, fc.bias" in log


def test_what_has_another_shape_is_new_and_said(source, tmp_path):
    content = checkpoint.read(source)
    other = content["model"] | {"stage1.0.bn.bias": torch.zeros(3)}
    checkpoint.write(content | {"model": other}, tmp_path / "a.pth")
    found, log = untouched(tmp_path, "--pretrained", tmp_path / "a.pth")
    assert f"of another shape in {tmp_path / 'a.pth'}, and so new: stage1.0.bn.bias" in log
    name = "stage1.0.conv.weight"
    assert torch.equal(found["model"][name], other[name])


def test_a_network_of_grey_is_that_of_colours_on_grey(source, tmp_path):
    found, _ = untouched(tmp_path, "--pretrained", source, options=("MODEL.IN_CHANS", 1))
    colours = checkpoint.read(source)["model"]["stage0.conv.weight"]
    assert torch.equal(found["model"]["stage0.conv.weight"], colours.sum(1, keepdim=True))
    assert found["images"]["mean"] == pytest.approx([0.3024])


def test_the_same_command_goes_on_and_another_file_is_refused(source, tmp_path, capsys):
    bare = tmp_path / "bare.pth"
    torch.save(checkpoint.read(source)["model"], bare)
    argv = ["--arch", TARGET, "--output", tmp_path, "--pretrained", bare, "--opts", *QUICK]
    assert main(*argv) == 0
    assert main(*argv, "TRAIN.EPOCHS", 2) == 0  # a plain rule, still
    argv[argv.index(bare)] = source
    assert main(*argv, "TRAIN.EPOCHS", 3) == 2
    assert f"this run began with '{bare}', not with '{source}': another --tag" in capsys.readouterr().err


def test_images_of_weights_of_timm_are_those_of_timm(tmp_path):
    name = "tf_mobilenetv3_small_minimal_100"
    torch.save(timm.create_model(name).state_dict(), tmp_path / "a.pth")
    found, _ = untouched(tmp_path, "--pretrained", tmp_path / "a.pth", arch=f"timm/{name}", dataset="digits")
    published = timm.get_pretrained_cfg(name)
    assert found["config"]["DATA"]["MEAN"] == published.mean == (0.5, 0.5, 0.5)


def test_the_moving_average_is_taken_where_it_is_better(source, tmp_path):
    content = checkpoint.read(source)
    average = {name: value + 1 for name, value in content["model"].items()}
    better = content | {"ema": average, "max_accuracy": 1.0, "max_ema_accuracy": 2.0}
    checkpoint.write(better, tmp_path / "a.pth")
    found, log = untouched(tmp_path, "--pretrained", tmp_path / "a.pth")
    assert "begins with the moving average of the weights" in log
    assert torch.equal(found["model"]["stage1.0.conv.weight"], average["stage1.0.conv.weight"])


@pytest.mark.parametrize(
    ("edit", "arguments", "message"),
    [
        (
            {},
            ("--arch", "RepOpt-VGG-A0-target"),
            "is a checkpoint of 'RepOpt-VGG-nano-target', whose layers are not those of RepOpt-VGG-A0",
        ),
        (
            {},
            ("--arch", "RepOpt-VGG-nano-hs"),
            "is a checkpoint of 'RepOpt-VGG-nano-target', whose layers are not those of RepOpt-VGG-nano-hs",
        ),
        ({}, ("--resume", "b.pth"), "--pretrained is where a training begins, and so is --resume"),
        ({"stage1.0.conv.weight": None}, (), "1 missing such as 'stage1.0.conv.weight'"),
        ({"more.weight": torch.zeros(1)}, (), "1 unknown such as 'more.weight'"),
        ({"stage1.0.bn.weight": torch.zeros(16, dtype=torch.int64)}, (), "1 of another type such as"),
    ],
)
def test_mistakes_are_one_line(source, tmp_path, capsys, edit, arguments, message):
    content = checkpoint.read(source)
    weights = {name: value for name, value in (content["model"] | edit).items() if value is not None}
    checkpoint.write(content | {"model": weights}, tmp_path / "a.pth")
    options = ("--output", tmp_path, *arguments, "--opts", *QUICK, "DATA.DATASET", "patches")
    assert main("--pretrained", tmp_path / "a.pth", *options) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_frozen_layers_stay_bit_for_bit(source, tmp_path):
    """Their kernels, and the statistics of their batch norms."""
    options = ("TRAIN.FREEZE", "stage0,stage1*", "TRAIN.BASE_LR", 0.1, "TRAIN.EPOCHS", 2)
    found, _ = untouched(tmp_path, "--pretrained", source, options=options)
    before = checkpoint.read(source)["model"]
    same = {name for name, value in before.items() if torch.equal(value, found["model"][name])}
    frozen = {name for name in before if name.startswith(("stage0.", "stage1."))}
    assert same == frozen


@pytest.mark.parametrize("search", [0, 1])  # whose end brings another optimizer
def test_layers_learn_at_rates_of_their_own(source, tmp_path, search):
    """From the head back: a rate of its own, then a tenth from block to block."""
    options = ("TRAIN.HEAD_LR", 0.8, "TRAIN.BASE_LR", 0.4, "TRAIN.LAYER_DECAY", 0.1, "TRAIN.MIN_LR", 0.4)
    options += (
        "TRAIN.SEARCH_EPOCHS",
        search,
        "TRAIN.EPOCHS",
        1 + search,
        "TRAIN.OPTIMIZER.MOMENTUM",
        0.0,
    )  # the last rate is the first, so the schedule stands still
    found, log = untouched(tmp_path, "--pretrained", source, options=options)
    rates = {name: group["lr"] for group in found["optimizer"]["param_groups"] for name in group["param_names"]}
    assert rates["linear.weight"] == rates["linear.bias"] == pytest.approx(0.8 * 64 / 256)
    assert rates["stage4.0.conv.weight"] == rates["stage4.0.bn.bias"] == pytest.approx(0.1)
    assert rates["stage3.15.conv.weight"] == pytest.approx(0.01)
    assert rates["stage3.14.conv.weight"] == pytest.approx(0.001)
    assert " lr 0.20000 " in log


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("TRAIN.FREEZE", "stage9"), "unknown module of TRAIN.FREEZE 'stage9'; did you mean 'stage3.9'?"),
        (("TRAIN.FREEZE", "stage1", "TRAIN.SEARCH_EPOCHS", 1), "TRAIN.SEARCH_EPOCHS goes without TRAIN.FREEZE"),
        (("TRAIN.HEAD_LR", 0.1, "TRAIN.BASE_LR", 0), "TRAIN.HEAD_LR is beside a TRAIN.BASE_LR above 0"),
        (("TRAIN.FREEZE", "*"), "TRAIN.FREEZE * leaves nothing to train"),
        (("TRAIN.LAYER_DECAY", 1.5), "TRAIN.LAYER_DECAY is a number from 0 to 1"),
    ],
)
def test_wrong_rates_are_one_line(source, tmp_path, capsys, options, message):
    assert main("--pretrained", source, "--output", tmp_path, "--opts", *QUICK, *options) == 2
    assert message in capsys.readouterr().err


def test_what_a_checkpoint_says_of_itself_loads_it(source):
    network, classes, transform, task = repopt.load(source)
    assert task == "classify"
    assert classes == tuple("0123456789")
    assert transform.size == (32, 32)
    for name, value in checkpoint.read(source)["model"].items():
        assert torch.equal(network.state_dict()[name], value)
    config = json.loads((source.parent / "config.json").read_text())
    assert tuple(config["DATA"]["MEAN"]) == transform.mean


@pytest.fixture(scope="module")
def baseline(tmp_path_factory):
    """A trained RepVGG."""
    output, arch = tmp_path_factory.mktemp("baseline"), "RepOpt-VGG-nano-repvgg"
    assert main("--arch", arch, "--output", output, "--opts", *QUICK, "TRAIN.EPOCHS", 2, "TRAIN.BASE_LR", 0.1) == 0
    return output / arch / "default" / "latest.pth"


def test_branches_of_a_trained_network_are_merged(baseline, tmp_path):
    found, log = untouched(tmp_path, "--pretrained", baseline, arch=TARGET, dataset="digits")
    assert "the branches of RepOpt-VGG-nano-repvgg are merged, training images give the batch norms" in log
    network = repopt.load(baseline).network
    for path, block in network.named_modules():
        if hasattr(block, "branches"):
            kernels, scales, _ = repopt.layers.fuse_branches(block.block, block.branches())
            merged = block.block.merge(kernels, scales)
            assert torch.allclose(found["model"][f"{path}.conv.weight"], merged, atol=1e-6), path
            for name in ("scale_conv", "scale_1x1"):
                assert torch.equal(found["scales"][f"{path}.{name}.weight"], scales[name])
    assert torch.equal(found["model"]["linear.weight"], network.state_dict()["linear.weight"])


def test_a_detector_does_not_begin_with_branches(baseline, tmp_path, capsys):
    pytest.importorskip("torchmetrics")
    from downstream import detect

    recipe = ("--cfg", "configs/scenes/detect.yaml", "--arch", TARGET, "--output", str(tmp_path))
    assert detect.main([*recipe, "--data-path", str(tmp_path / "scenes"), "--pretrained", str(baseline)]) == 2
    assert "has branches, which are merged for a classifier or a segmentation network" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["ours", "timm"])
def test_weights_alone_of_a_multi_branch_network_are_known_by_their_names(baseline, tmp_path, kind):
    if kind == "ours":
        arch, weights, name = TARGET, checkpoint.read(baseline)["model"], "RepOpt-VGG-nano-repvgg"
    else:
        arch, name = "timm/repghostnet_050-target", "timm/repghostnet_050"
        weights = timm.create_model("repghostnet_050", num_classes=10).state_dict()
    save_file(weights, tmp_path / "bare.safetensors")
    found, log = untouched(tmp_path, "--pretrained", tmp_path / "bare.safetensors", arch=arch)
    assert f"the branches of {name} are merged, training images give" in log
    assert len(found["scales"]) > 10


def test_two_processes_begin_alike(baseline, tmp_path):
    """With the same held-out images, merged branches and new head as one does."""
    pictures = tmp_path / "pictures"
    for label, name in enumerate(("dark", "light")):
        (pictures / name).mkdir(parents=True)
        for number in range(10):
            Image.new("RGB", (32, 32), (100 * label + number,) * 3).save(pictures / name / f"{number}.png")
    found = []
    for processes in (1, 2):
        output = tmp_path / str(processes)
        options = {"DATA.DATASET": "folder", "DATA.VAL_FRACTION": 0.2, "TRAIN.BASE_LR": 0, "TRAIN.EPOCHS": 1}
        options |= {"DATA.BATCH_SIZE": 8 // processes, "TRAIN.WARMUP_EPOCHS": 0, "DATA.NUM_WORKERS": 0}
        options |= {"QUANT.CALIBRATION_IMAGES": 16, "AUG.PRESET": "none"}
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        command += ["main_repopt.py", "--arch", TARGET, "--pretrained", baseline, "--data-path", pictures]
        command += ["--output", output, "--opts", *(word for pair in options.items() for word in pair)]
        subprocess.run([*map(str, command)], cwd=ROOT, check=True, capture_output=True)
        folder = output / TARGET / "default"
        found.append(checkpoint.read(folder / "latest.pth"))
        assert "16 training and 4 test images" in (folder / "log_rank0.txt").read_text()
    one, two = found
    for name, value in one["model"].items():
        if "running" not in name and "num_batches" not in name:
            assert torch.allclose(value, two["model"][name], rtol=1e-5, atol=1e-6), name
    for name, value in one["scales"].items():
        assert torch.equal(value, two["scales"][name])
