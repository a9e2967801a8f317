"""The command line as a user has it: one process, and two under torchrun."""

import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from soak.training import free_port

import data
import main_repopt
import repopt
from repopt import checkpoint
from train.command import EXIT_INTERRUPTED

ROOT = Path(__file__).resolve().parents[2]
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


def run_or_main(*arguments, processes):
    """A command line in this process, or in several of their own."""
    if processes:
        run(*arguments, processes=processes)
    else:
        assert main(*arguments) == 0


def evaluation(text, key="val"):
    """Accuracy, loss and number of images of an evaluation's line."""
    return re.search(rf"{key}: top-1 (\S+) % top-5 (\S+) % loss (\S+) on (\d+) images", text).groups()


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


def test_target_from_a_checkpoint_and_evaluation_by_one_and_two(search, tmp_path, capsys):
    common = ("--arch", TARGET, "--tag", "t", "--output", tmp_path)
    options = [*DIGITS, "TRAIN.EPOCHS", 2, "TRAIN.CLIP_GRAD", 1.0, "DETERMINISTIC", True, "TEST.PERIOD", 2]
    run(*common, "--scales-path", search / "latest.pth", "--opts", *options, processes=2)
    folder = tmp_path / TARGET / "t"
    log = (folder / "log_rank0.txt").read_text()
    weights = ("--eval", "--resume", folder / "latest.pth", "--opts", *DIGITS)
    assert main(*common, *weights) == 0
    one = evaluation(capsys.readouterr().out)
    assert one[-1] == "1497"
    assert evaluation(log[log.rindex("epoch 2 val") :]) == one
    assert evaluation(run(*common, *weights, processes=2)) == one


def test_torch_distributed_launch(search, tmp_path):
    launcher = ["-m", "torch.distributed.launch", "--nproc_per_node", "1", "--master_port", str(free_port())]
    command = [sys.executable, *launcher]
    command += ["main_repopt.py", "--arch", HS, "--output", str(tmp_path), "--eval", "--resume"]
    command += [str(search / "latest.pth"), "--opts", *DIGITS]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert evaluation(result.stdout)[-1] == "1497"


def test_two_processes_are_one_that_accumulates(search, tmp_path, capsys):
    """Gradients, learning rate and the images of a step are the same; so are the weights, to fp32 rounding."""
    options = [*DIGITS, "TRAIN.EPOCHS", 2, "DATA.BATCH_SIZE", 25, "TRAIN.BASE_LR", 0.1, "TRAIN.WARMUP_EPOCHS", 1]
    options += ["TRAIN.CLIP_GRAD", 1.0, "TRAIN.EMA_ALPHA", 0.01, "TRAIN.EMA_UPDATE_PERIOD", 1]
    options += ["PRINT_FREQ", 1, "TEST.PERIOD", 2]
    contents, rates = [], []
    for processes, accumulation in ((0, 2), (2, 1)):
        common = ("--arch", TARGET, "--tag", f"by{processes}", "--output", tmp_path)
        scales = ("--scales-path", search / "scales.pth", "--accumulation-steps", accumulation)
        run_or_main(*common, *scales, "--opts", *options, processes=processes)
        folder = tmp_path / TARGET / f"by{processes}"
        contents.append(checkpoint.read(folder / "latest.pth"))
        records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        rates.append({r["step"]: r["train"]["learning_rate"] for r in records if "train" in r and r["step"]})
        if processes:  # what was logged of the averaged networks is what their checkpoint gives
            log = (folder / "log_rank0.txt").read_text()
            capsys.readouterr()
            assert main(*common, "--eval", "--resume", folder / "latest.pth", "--opts", *DIGITS) == 0
            text = capsys.readouterr().out
            for key in ("val", "ema"):
                assert evaluation(text, key) == evaluation(log[log.rindex("epoch 2 val") :], key)
    assert rates[0] == rates[1]
    assert max(rates[0].values()) == pytest.approx(0.1 * 50 / 256, rel=0.3)
    one, two = (content["model"] for content in contents)
    start = repopt.create_model("RepOpt-VGG-nano", mode="target", num_classes=10).state_dict()
    for name, value in one.items():
        if "running" not in name and "tracked" not in name:
            scale = (value - start[name]).abs().max() + 1e-3
            assert (value - two[name]).abs().max() < 2e-3 * scale, name


def trainer_of(monkeypatch, *arguments):
    """The trainer that a command line makes, which does not train."""
    made = []
    monkeypatch.setattr("train.trainer.Trainer.fit", lambda trainer: made.append(trainer))
    assert main(*arguments) == 0
    return made[0]


@pytest.mark.parametrize("identity", ["searched", "one"])
def test_what_a_command_line_makes(monkeypatch, search, tmp_path, identity):
    options = [*DIGITS, "DATA.BATCH_SIZE", 30, "TRAIN.EPOCHS", 6, "TRAIN.BASE_LR", 0.5, "TRAIN.WARMUP_LR", 0.1]
    options += [
        "TRAIN.MIN_LR",
        0.05,
        "TRAIN.WARMUP_EPOCHS",
        2,
        "TRAIN.WEIGHT_DECAY",
        0.01,
        "MODEL.LABEL_SMOOTHING",
        0.2,
    ]
    options += ["TRAIN.OPTIMIZER.MOMENTUM", 0.8, "TRAIN.CLIP_GRAD", 2.0, "TRAIN.EMA_ALPHA", 0.001, "SEED", 5]
    options += ["TRAIN.IDENTITY_INIT", identity, "TRAIN.EMA_UPDATE_PERIOD", 4, "SAVE_FREQ", 3, "TEST.PERIOD", 2]
    scales_path = search / "scales.pth"
    trainer = trainer_of(
        monkeypatch, "--arch", TARGET, "--output", tmp_path, "--scales-path", scales_path, "--accumulation-steps", 3,
        "--opts", *options,
    )  # fmt: skip
    state, per_256 = trainer.state, 90 / 256
    assert isinstance(state.optimizer, repopt.RepSGD)
    decayed, rest = state.optimizer.param_groups
    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.01, 0.0)
    assert (decayed["momentum"], decayed["nesterov"]) == (0.8, True)
    schedule = state.schedule
    assert decayed["initial_lr"] == pytest.approx(0.5 * per_256)
    assert (schedule.warmup_lr_init, schedule.lr_min) == pytest.approx((0.1 * per_256, 0.05 * per_256))
    assert (schedule.t_initial, schedule.warmup_t) == (6 * 4, 2 * 4)  # 10 batches an epoch are 4 steps
    assert trainer.task.criterion.label_smoothing == 0.2
    assert state.ema.decay == pytest.approx(1 - 0.001 * 90 * 4 / 6)
    assert trainer.searched_scales() is None
    scales = repopt.load_scales(scales_path)
    torch.manual_seed(5)
    expected = repopt.create_model("RepOpt-VGG-nano", mode="target", num_classes=10)
    repopt.initialize(expected, scales, identity=identity)
    for (name, value), other in zip(state.model.state_dict().items(), expected.state_dict().values(), strict=True):
        assert torch.equal(value, other), name
    for parameter in state.model.parameters():
        parameter.grad = torch.randn_like(parameter)
    for parameter, other in zip(state.model.parameters(), expected.parameters(), strict=True):
        other.grad = parameter.grad.clone()
    mults = repopt.grad_mults(expected, scales, degree=1)
    assert trainer.clip is None and state.optimizer.max_norm == 2.0
    state.optimizer.step()
    norm = repopt.clip_grad_norm_(expected.named_parameters(), 2.0, mults)
    torch.testing.assert_close(state.optimizer.norm, norm)


def test_adamw_search_and_evaluation_settings(monkeypatch, tmp_path):
    root = image_folder(tmp_path / "images")
    calls = {}
    eval_loader = data.eval_loader
    monkeypatch.setattr(
        "data.eval_loader",
        lambda images, **arguments: calls.update(arguments, **vars(images)) or eval_loader(images, **arguments),
    )
    options = ["DATA.DATASET", "folder", "DATA.IMG_SIZE", 64, "DATA.TEST_SIZE", 96, "TEST.CROP", True]
    options += ["DATA.TEST_BATCH_SIZE", 3, "DATA.INTERPOLATION", "bicubic", "TRAIN.OPTIMIZER.NAME", "adamw"]
    options += [
        "TRAIN.OPTIMIZER.EPS",
        1e-6,
        "TRAIN.OPTIMIZER.BETAS",
        "(0.8, 0.9)",
        "AUG.MIXUP",
        0.5,
        "DATA.NUM_WORKERS",
        0,
    ]
    trainer = trainer_of(
        monkeypatch, "--arch", HS, "--output", tmp_path, "--data-path", root, "--batch-size", 4, "--opts", *options
    )
    assert (calls["image_size"], calls["crop"], calls["batch_size"]) == (96, True, 3)
    assert (calls["interpolation"], calls["num_classes"], calls["source"].root) == ("bicubic", 2, str(root))
    group = trainer.state.optimizer.param_groups[0]
    assert type(trainer.state.optimizer) is repopt.BranchOptimizer
    assert (group["eps"], group["betas"]) == (1e-6, (0.8, 0.9))
    assert trainer.task.criterion.label_smoothing == 0.0  # mixup's targets are smoothed already
    assert trainer.searched_scales()
    assert trainer.clip is None


def test_a_run_keeps_the_scales_that_it_began_with(search, tmp_path, capsys):
    scales = repopt.load_scales(search / "scales.pth")
    given = tmp_path / "scales.pth"
    repopt.save_scales(scales, given)
    common = ("--arch", TARGET, "--output", tmp_path, "--scales-path", given, "--opts", *DIGITS, "TRAIN.EPOCHS")
    assert main(*common, 1) == 0
    kept = checkpoint.read(tmp_path / TARGET / "default" / "latest.pth")["scales"]
    assert kept.keys() == scales.keys()
    assert main(*common, 2) == 0
    repopt.save_scales({name: values + 1 for name, values in scales.items()}, given)
    assert main(*common, 3) == 2
    assert "are not those that this run began with" in capsys.readouterr().err
    given.unlink()
    assert main(*common, 3) == 0


@pytest.mark.parametrize("damage", [{"scales": True}, {"config": {"MODEL": {"ARCH": ["a"]}}}, {"epoch": "x"}])
def test_checkpoints_with_odd_contents(trained, tmp_path, capsys, damage):
    torch.save(checkpoint.read(trained) | damage, tmp_path / "odd.pth")
    arguments = ("--arch", TARGET, "--output", tmp_path, "--resume", tmp_path / "odd.pth")
    assert main(*arguments, "--opts", *DIGITS, "TRAIN.EPOCHS", 2) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_an_environment_that_is_not_torchruns(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    for name, value, message in (("RANK", "abc", "RANK is 'abc'"), ("WORLD_SIZE", "2", "cannot meet the other 1")):
        with monkeypatch.context() as context:
            context.setenv(name, value)
            context.delenv("MASTER_ADDR", raising=False)
            assert main("--arch", HS, "--output", tmp_path, "--opts", *DIGITS) == 2
            assert message in capsys.readouterr().err


def test_resume_prefers_the_runs_own_latest(search, tmp_path):
    weights = tmp_path / "weights.pth"
    torch.save(repopt.create_model("RepOpt-VGG-nano", mode="hs", num_classes=10).state_dict(), weights)
    for epochs in (1, 2):
        assert (
            main("--arch", HS, "--output", tmp_path, "--resume", weights, "--opts", *DIGITS, "TRAIN.EPOCHS", epochs)
            == 0
        )
    log = (tmp_path / HS / "default" / "log_rank0.txt").read_text()
    assert "after epoch 1" in log
    assert "epoch 1/2" not in log


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


def test_the_one_before_a_damaged_checkpoint_is_used(search, tmp_path, capsys):
    common = ("--arch", TARGET, "--output", tmp_path, "--scales-path", search / "scales.pth", "--opts", *DIGITS)
    assert main(*common, "TRAIN.EPOCHS", 2, "SAVE_KEEP", 3) == 0
    folder = tmp_path / TARGET / "default"
    whole = (folder / "latest.pth").read_bytes()
    for name in ("latest.pth", "latest_1.pth"):  # which are links of others
        (folder / name).unlink()
    (folder / "latest.pth").write_bytes(whole[:-1000])
    assert main(*common, "TRAIN.EPOCHS", 3) == 2  # none is whole
    assert "no checkpoint of this run is whole" in capsys.readouterr().err
    (folder / "latest_1.pth").write_bytes(whole)
    assert main(*common, "TRAIN.EPOCHS", 3) == 0
    text = capsys.readouterr().out
    assert "latest.pth.damaged now, and the one before it is used: latest_1.pth" in text
    assert "resumed" in text
    assert checkpoint.read(folder / "latest.pth")["epoch"] == 2
    assert (folder / "latest.pth.damaged").read_bytes() == whole[:-1000]


@pytest.mark.parametrize(("rule", "implementation"), [("sgd", "eager"), ("adamw", "eager"), ("adamw", "compiled")])
def test_resuming_within_an_epoch_under_either_implementation(search, tmp_path, stopping, implementation, rule):
    """The step after resuming is done as it would have been: compiled ones round differently."""
    options = (*DIGITS, "DATA.BATCH_SIZE", 60, "TRAIN.EPOCHS", 1, "TRAIN.OPTIMIZER.IMPLEMENTATION", implementation)
    options += ("TRAIN.OPTIMIZER.NAME", rule, "SAVE_EVERY_STEPS", 2)

    def train(tag):
        scales = ("--scales-path", search / "scales.pth")
        code = main("--arch", TARGET, "--tag", tag, "--output", tmp_path, *scales, "--opts", *options)
        return code, checkpoint.read(tmp_path / TARGET / tag / "latest.pth")

    code, whole = train("whole")
    assert code == 0
    with stopping():
        code, part = train("part")
    assert code == EXIT_INTERRUPTED
    assert part["seen"] == [{"processes": 1, "images": 180, "sharded": False}]
    code, part = train("part")
    assert code == 0
    for key in ("model", "optimizer", "max_accuracy"):
        assert_equal(part[key], whole[key])


def assert_equal(a, b):
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal(a[key], b[key])
    else:
        assert a == b


def test_what_may_change_when_a_run_is_resumed(trained, tmp_path, capsys):
    common = ("--arch", TARGET, "--output", tmp_path, "--resume", trained, "--opts", *DIGITS)
    for key, value, message in (
        ("SEED", 1, "SEED was 0 in the checkpoint and is 1 now"),
        ("DATA.DATASET", "fake", "DATA.DATASET was 'digits' in the checkpoint and is 'fake' now"),
    ):
        sizes = ("MODEL.NUM_CLASSES", 10, "DATA.IMG_SIZE", 32)
        assert main(*common, *sizes, "TRAIN.EPOCHS", 2, key, value) == 2
        assert f"cannot resume: {message}" in capsys.readouterr().err
    assert main(*common, "TRAIN.EPOCHS", 2, "PRINT_FREQ", 1, "DATA.BATCH_SIZE", 50) == 0
    text = capsys.readouterr().out
    assert "PRINT_FREQ was 10 before this start and is 1 now" in text
    assert "SEED was" not in text


def test_other_images_are_refused(tmp_path, capsys):
    root = image_folder(tmp_path / "images")
    options = ("DATA.DATASET", "folder", "DATA.IMG_SIZE", 64, "DATA.NUM_WORKERS", 0, "AUG.PRESET", "weak")
    arguments = ("--arch", HS, "--output", tmp_path / "out", "--data-path", root, "--batch-size", 4, "--opts", *options)
    assert main(*arguments, "TRAIN.EPOCHS", 1) == 0
    (root / "train" / "cat" / "0_0.jpg").unlink()
    assert main(*arguments, "TRAIN.EPOCHS", 2) == 2
    assert "DATA.DATA_PATH are not those that this run began with" in capsys.readouterr().err


def test_unreadable_images_are_counted(tmp_path, capsys):
    root = image_folder(tmp_path / "images")
    for split in ("train", "val"):
        (root / split / "cat" / "0_1.jpg").write_bytes(b"no image")
    options = ("DATA.DATASET", "folder", "DATA.IMG_SIZE", 64, "DATA.NUM_WORKERS", 0, "TRAIN.EPOCHS", 1)
    arguments = ("--arch", HS, "--output", tmp_path, "--data-path", root, "--batch-size", 4, "--opts", *options)
    assert main(*arguments) == 0
    text = capsys.readouterr().out
    assert "cannot read image" in text
    assert "1 training images could not be read so far" in text
    assert "on 8 images, 1 of them unreadable and counted as wrong" in text
    assert main(*arguments, "TRAIN.AUTO_RESUME", False, "DATA.ON_BAD_IMAGE", "raise") == 2
    assert "cannot read image" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written(search, tmp_path, monkeypatch, capsys):
    """As a full disk or one mounted read-only says it; whoever runs the tests may write everywhere."""

    def refuse(content, file):
        file.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device", str(file))

    monkeypatch.setattr(torch, "save", refuse)
    assert main("--arch", HS, "--output", tmp_path, "--opts", *DIGITS, "TRAIN.EPOCHS", 1) == 2
    assert re.fullmatch(r"main_repopt.py: cannot write .*: No space left on device; .*\n", capsys.readouterr().err)


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


@pytest.mark.parametrize("decode", ["gpu", "nvjpeg"])
def test_without_a_gpu_none_decodes(tmp_path, capsys, decode):
    root = image_folder(tmp_path / "images")
    options = ("DATA.DATASET", "folder", "DATA.IMG_SIZE", 64, "DATA.NUM_WORKERS", 0, "AUG.PRESET", "weak")
    arguments = ("--arch", HS, "--output", tmp_path / "out", "--data-path", root, "--batch-size", 4, "--opts", *options)
    assert main(*arguments, "DATA.DECODE", decode) == 2
    said = {
        "gpu": "main_repopt.py: DATA.DECODE gpu needs a CUDA device, and this training is on cpu: set auto or cpu",
        "nvjpeg": r"main_repopt.py: .*DATA.DECODE.*nvjpeg.*auto.*cpu.*gpu.*",
    }
    assert re.fullmatch(said[decode] + "\n", capsys.readouterr().err)


def test_decoding_may_move_when_a_run_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr("data.gpu_decode.wanted", lambda decode, *_: decode == "gpu")
    root = image_folder(tmp_path / "images")
    options = ("DATA.DATASET", "folder", "DATA.IMG_SIZE", 64, "DATA.NUM_WORKERS", 1, "AUG.PRESET", "raug15")
    arguments = ("--arch", HS, "--output", tmp_path, "--data-path", root, "--batch-size", 4, "--opts", *options)
    assert main(*arguments, "TRAIN.EPOCHS", 1) == 0
    assert main(*arguments, "TRAIN.EPOCHS", 2, "DATA.DECODE", "gpu") == 0
    assert checkpoint.read(tmp_path / HS / "default" / "latest.pth")["epoch"] == 1


def test_published_ghost_commands_on_a_small_image_folder(tmp_path):
    root = image_folder(tmp_path / "images")
    output, size = ("--output", tmp_path / "out"), ("DATA.IMG_SIZE", 64, "DATA.NUM_WORKERS", 1, "TRAIN.EPOCHS", 1)
    common = (*output, "--data-path", root, "--batch-size", 4)
    search = "--tag search --opts TRAIN.BASE_LR 0.6 TRAIN.WEIGHT_DECAY 1e-5 TRAIN.WARMUP_EPOCHS 10 TRAIN.CLIP_GRAD 5.0"
    assert main("--arch", "ghost-hs", *common, *search.split(), "DATA.DATASET", "folder", *size) == 0
    scales = tmp_path / "out" / "ghost-hs" / "search" / "latest.pth"
    recipe = ("--cfg", ROOT / "configs" / "imagenet" / "ghost_target.yaml", *common)
    assert main(*recipe, "--scales-path", scales, "--opts", *size) == 0
    weights = tmp_path / "out" / "ghost-target" / "default" / "latest.pth"
    assert main(*recipe, "--eval", "--resume", weights, "--opts", *size) == 0
    for arch in ("ghost-rep", "ghost-target-norepopt"):
        assert main("--arch", arch, *common, "--opts", "DATA.DATASET", "imagenet", *size) == 0
    csla = ("--arch", "ghost-csla", *common, "--scales-path", scales)
    assert main(*csla, "--opts", "DATA.DATASET", "imagenet", *size) == 0


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
    "optimizer": (["--arch", HS, "--opts", *DIGITS, "TRAIN.OPTIMIZER.NAME", "adamx"], "did you mean 'adam'"),
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
    "output": (["--arch", HS, "--output", "{scales}", "--opts", *DIGITS], "Not a directory: {scales}"),
    "start": (["--arch", HS, "--opts", *DIGITS, "TRAIN.EPOCHS", "2", "TRAIN.START_EPOCH", "2"], "2 leaves none of 2"),
    "sync bn": (["--arch", HS, "--opts", *DIGITS, "TRAIN.SYNC_BN", "True"], "needs GPUs"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_line_and_exit_code_2(name, search, trained, tmp_path, in_one_line):
    places = {"tmp": tmp_path, "scales": search / "scales.pth", "trained": trained}
    arguments, message = MISTAKES[name]
    default = () if "--output" in arguments else ("--output", tmp_path / "out")
    assert main(*default, *(str(argument).format(**places) for argument in arguments)) == 2
    in_one_line("main_repopt.py", message, places)


def test_programming_errors_stay_loud(tmp_path, monkeypatch):
    def broken(*_, **__):
        raise ValueError("a defect")

    monkeypatch.setattr("repopt.description.create_model", broken)
    with pytest.raises(ValueError, match="a defect"):
        main("--arch", HS, "--output", tmp_path, "--opts", *DIGITS)


def test_more_processes_than_gpus(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert main("--arch", HS, "--output", tmp_path, "--opts", *DIGITS) == 2
    assert "2 processes on a node with 1 GPUs" in capsys.readouterr().err
