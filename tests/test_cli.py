"""The command line as a user has it: one process, and two under torchrun."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import main_repopt
import repopt
from repopt import checkpoint

ROOT = Path(__file__).resolve().parents[1]
DIGITS = ["DATA.DATASET", "digits"]
HS, TARGET = "RepOpt-VGG-nano-hs", "RepOpt-VGG-nano-target"


def run(*arguments, processes=0):
    """A command line in a process of its own (or several); its output."""
    launcher = [sys.executable]
    if processes:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [*launcher, str(ROOT / "main_repopt.py"), *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return result.stdout


def evaluation(text):
    """Accuracy, loss and number of images of an evaluation's line."""
    return re.search(r"val: top-1 (\S+) % top-5 (\S+) % loss (\S+) on (\d+) images", text).groups()


@pytest.fixture(scope="module")
def search(tmp_path_factory):
    """The folder of a short hyper-search."""
    output = tmp_path_factory.mktemp("search")
    run("--arch", HS, "--tag", "t", "--output", output, "--opts", *DIGITS, "TRAIN.EPOCHS", 2, "TRAIN.CLIP_GRAD", 5.0)
    return output / HS / "t"


def test_search_writes_what_the_contract_names(search):
    names = {path.name for path in search.iterdir()}
    assert {"latest.pth", "best_ckpt.pth", "ckpt_epoch_1.pth", "scales.pth", "log_rank0.txt", "config.json"} <= names
    assert {"metrics.jsonl"} <= names
    config = json.loads((search / "config.json").read_text())
    assert (config["MODEL"]["NUM_CLASSES"], config["DATA"]["IMG_SIZE"]) == (10, 32)
    scales = repopt.load_scales(search / "scales.pth")
    model = repopt.create_model("RepOpt-VGG-nano", mode="hs", num_classes=10)
    repopt.load_weights(model, checkpoint.state_dict_of(checkpoint.read(search / "latest.pth")))
    for name, values in repopt.extract_scales(model).items():
        assert torch.equal(values, scales[name])
    records = [json.loads(line) for line in (search / "metrics.jsonl").read_text().splitlines()]
    last = records[-1]
    assert last["scales"]["stage1.1.scale_1x1.weight"] == pytest.approx(
        float(scales["stage1.1.scale_1x1.weight"].mean())
    )
    assert {"loss", "learning_rate", "images_per_second"} <= records[0]["train"].keys()
    assert "grad norm" in (search / "log_rank0.txt").read_text()


@pytest.mark.parametrize("scales", ["latest.pth", "scales.pth"])
def test_target_from_either_file_and_evaluation_by_one_and_two(search, tmp_path, scales):
    common = ("--arch", TARGET, "--tag", "t", "--output", tmp_path)
    run(
        *common,
        "--scales-path",
        search / scales,
        "--opts",
        *DIGITS,
        "TRAIN.EPOCHS",
        2,
        "TRAIN.CLIP_GRAD",
        1.0,
        processes=2,
    )
    folder = tmp_path / TARGET / "t"
    log = (folder / "log_rank0.txt").read_text()
    weights = ("--eval", "--resume", folder / "latest.pth", "--opts", *DIGITS)
    one = evaluation(run(*common, *weights))
    assert one[-1] == "1497"
    assert evaluation(log[log.rindex("epoch 2 val") :]) == one
    if scales == "latest.pth":
        assert evaluation(run(*common, *weights, processes=2)) == one


def test_torch_distributed_launch(search, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.launch", "--nproc_per_node", "1", "--master_port", "29511"]
    command += ["main_repopt.py", "--arch", HS, "--output", str(tmp_path), "--eval", "--resume"]
    command += [str(search / "latest.pth"), "--opts", *DIGITS]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert evaluation(result.stdout)[-1] == "1497"


def main(*arguments):
    return main_repopt.main([*map(str, arguments)])


def test_a_run_started_again_goes_on_where_it_stopped(search, tmp_path):
    def train(tag, epochs):
        options = (*DIGITS, "TRAIN.EPOCHS", epochs, "TRAIN.LR_SCHEDULER.NAME", "step", "TRAIN.BASE_LR", 0.1)
        scales = ("--scales-path", search / "scales.pth") if epochs else ()
        assert main("--arch", TARGET, "--tag", tag, "--output", tmp_path, *scales, "--opts", *options) == 0
        return checkpoint.read(tmp_path / TARGET / tag / "latest.pth")

    whole = train("whole", 3)
    first = train("part", 2)
    assert first["epoch"] == 1
    second = train("part", 3)
    assert second["epoch"] == 2
    for name, value in whole["model"].items():
        assert torch.equal(value, second["model"][name]), name


def test_resuming_needs_no_scale_file(search, tmp_path):
    common = ("--arch", TARGET, "--output", tmp_path)
    assert main(*common, "--scales-path", search / "scales.pth", "--opts", *DIGITS, "TRAIN.EPOCHS", 1) == 0
    assert main(*common, "--opts", *DIGITS, "TRAIN.EPOCHS", 2) == 0
    assert checkpoint.read(tmp_path / TARGET / "default" / "latest.pth")["epoch"] == 1


@pytest.mark.parametrize(
    "options",
    [
        ("TRAIN.OPTIMIZER.NAME", "adamw", "TRAIN.EMA_ALPHA", 0.1),
        ("AUG.MIXUP", 0.2, "AUG.CUTMIX", 1.0),
        ("TRAIN.USE_CHECKPOINT", True, "TRAIN.ACCUMULATION_STEPS", 2, "DATA.BATCH_SIZE", 60),
    ],
)
@pytest.mark.parametrize("mode", ["target", "csla", "repvgg"])
def test_options_of_training(search, tmp_path, mode, options):
    scales = () if mode == "repvgg" else ("--scales-path", search / "scales.pth")
    arch = f"RepOpt-VGG-nano-{mode}"
    assert main("--arch", arch, "--output", tmp_path, *scales, "--opts", *DIGITS, "TRAIN.EPOCHS", 1, *options) == 0
    content = checkpoint.read(tmp_path / arch / "default" / "latest.pth")
    assert ("ema" in content) == ("TRAIN.EMA_ALPHA" in options)
    if "ema" in content:
        assert main("--arch", arch, "--output", tmp_path, "--eval", "--resume",
                    tmp_path / arch / "default" / "latest.pth", "--opts", *DIGITS) == 0  # fmt: skip


def image_folder(root, classes=("cat", "dog"), splits=("train", "val"), count=4):
    for split in splits:
        for number, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = torch.randint(256, (3, 40, 50), dtype=torch.uint8)
                Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(root / split / name / f"{number}_{i}.jpg")
    return root


@pytest.mark.parametrize("dataset", ["folder", "imagenet"])
def test_any_image_folder(tmp_path, dataset):
    root = image_folder(tmp_path / "images")
    options = ("DATA.DATASET", dataset, "DATA.IMG_SIZE", 64, "DATA.NUM_WORKERS", 1, "TRAIN.EPOCHS", 1)
    arguments = ("--arch", HS, "--output", tmp_path / "out", "--data-path", root, "--batch-size", 4)
    assert main(*arguments, "--opts", *options, "AUG.PRESET", "raug15") == 0
    config = json.loads((tmp_path / "out" / HS / "default" / "config.json").read_text())
    assert config["MODEL"]["NUM_CLASSES"] == 2


def test_throughput(tmp_path, capsys):
    arguments = ("--arch", "RepOpt-VGG-nano-repvgg", "--output", tmp_path, "--throughput", "--batch-size", 2)
    assert main(*arguments, "--opts", "DATA.IMG_SIZE", 32) == 0
    assert re.search(r"deployed: [\d.]+ images/s", capsys.readouterr().out)


@pytest.fixture(scope="module")
def trained(search, tmp_path_factory):
    """The checkpoint of a short target training."""
    output = tmp_path_factory.mktemp("target")
    scales = ("--scales-path", search / "scales.pth")
    assert main("--arch", TARGET, "--output", output, *scales, "--opts", *DIGITS, "TRAIN.EPOCHS", 1) == 0
    return output / TARGET / "default" / "latest.pth"


MISTAKES = {
    "arch": (["--arch", "RepOpt-VGG-nano-traget"], "did you mean 'RepOpt-VGG-nano-target'"),
    "no mode": (["--arch", "RepOpt-VGG-nano"], "needs a mode"),
    "flag": (["--arhc", HS], "did you mean '--arch'"),
    "key": (["--arch", HS, "--opts", "DATA.DATASETS", "digits"], "did you mean 'DATA.DATASET'"),
    "no data path": (["--arch", HS], "--data-path"),
    "no such folder": (["--arch", HS, "--data-path", "/nowhere", "--opts", "DATA.DATASET", "folder"], "'/nowhere'"),
    "empty folder": (["--arch", HS, "--data-path", "{tmp}", "--opts", "DATA.DATASET", "folder"], "{tmp}"),
    "data set": (["--arch", HS, "--opts", "DATA.DATASET", "digit"], "did you mean 'digits'"),
    "classes": (["--arch", HS, "--opts", *DIGITS, "MODEL.NUM_CLASSES", "100"], "NUM_CLASSES is 100, .* is 10"),
    "size": (["--arch", HS, "--opts", *DIGITS, "DATA.IMG_SIZE", "224"], "IMG_SIZE is 224, .* is 32"),
    "test size": (["--arch", HS, "--opts", *DIGITS, "DATA.TEST_SIZE", "64"], "TEST_SIZE is 64, .* is 32"),
    "batch": (["--arch", HS, "--opts", *DIGITS, "DATA.BATCH_SIZE", "301"], "30[01]"),
    "no scales": (["--arch", TARGET, "--opts", *DIGITS], "needs searched scales: give --scales-path"),
    "scales unasked": (["--arch", HS, "--scales-path", "{scales}", "--opts", *DIGITS], "takes no searched scales"),
    "scales of another": (
        ["--arch", "RepOpt-VGG-A0-target", "--scales-path", "{scales}", "--opts", *DIGITS],
        r"block 'stage0' expects .* \(48,\), found \(16,\)",
    ),
    "no scale file": (["--arch", TARGET, "--scales-path", "{tmp}/a.pth", "--opts", *DIGITS], "no file '{tmp}/a.pth'"),
    "optimizer": (["--arch", HS, "--opts", *DIGITS, "TRAIN.OPTIMIZER.NAME", "adam"], "did you mean 'adamw'"),
    "eval of nothing": (["--arch", HS, "--eval", "--opts", *DIGITS], "--resume FILE"),
    "no checkpoint": (["--arch", HS, "--eval", "--resume", "{tmp}/a.pth", "--opts", *DIGITS], "no file '{tmp}/a.pth'"),
    "foreign checkpoint": (
        ["--arch", "RepOpt-VGG-nano-repvgg", "--eval", "--resume", "{trained}", "--opts", *DIGITS],
        "weights are not those of this model",
    ),
    "other optimizer": (
        ["--arch", TARGET, "--resume", "{trained}", "--opts", *DIGITS, "TRAIN.OPTIMIZER.NAME", "adamw"],
        "TRAIN.OPTIMIZER.NAME was 'sgd' in the checkpoint and is 'adamw' now",
    ),
    "other arch": (["--arch", HS, "--resume", "{trained}", "--opts", *DIGITS], "MODEL.ARCH was .*-target'.*-hs'"),
    "output": (["--arch", HS, "--output", "{scales}", "--opts", *DIGITS], "cannot write to"),
    "sync bn": (["--arch", HS, "--opts", *DIGITS, "TRAIN.SYNC_BN", "True"], "needs GPUs"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_line_and_exit_code_2(name, search, trained, tmp_path, capsys):
    places = {"tmp": tmp_path, "scales": search / "scales.pth", "trained": trained}
    arguments, message = MISTAKES[name]
    default = () if "--output" in arguments else ("--output", tmp_path / "out")
    assert main(*default, *(str(argument).format(**places) for argument in arguments)) == 2
    error = capsys.readouterr().err
    assert error.startswith("main_repopt.py: ")
    assert len(error.splitlines()) == 1
    assert re.search(message.replace("{tmp}", str(tmp_path)), error), error


def test_programming_errors_stay_loud(tmp_path, monkeypatch):
    def broken(*_, **__):
        raise ValueError("a defect")

    monkeypatch.setattr(repopt, "create_model", broken)
    with pytest.raises(ValueError, match="a defect"):
        main("--arch", HS, "--output", tmp_path, "--opts", *DIGITS)


def test_more_processes_than_gpus(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert main("--arch", HS, "--output", tmp_path, "--opts", *DIGITS) == 2
    assert "2 processes on a node with 1 GPUs" in capsys.readouterr().err
