"""The paper's tables and figures as experiments: their declarations, their commands, and what is made of their runs."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import reproduce
import torch
from reproduction import execute, experiment, figures, paper, result, tables
from reproduction.experiment import Experiment, Row, score
from reproduction.run import COMPARE, FOLDERS, QAT, SPEED, ExperimentRun, Training, with_needs
from reproduction.studies import STUDIES
from reproduction.tables import EXPERIMENTS
from torch import nn

import main_repopt
import repopt
from repopt import checkpoint
from repopt.layers import RepConv2d
from repopt.models import list_archs, parse_arch
from repopt.quantization import CALIBRATORS
from train import config
from train.ways import WAYS

ROOT = Path(__file__).resolve().parents[2]
TABLES = [name for name in EXPERIMENTS if name.startswith("table") and name != "table int8"]  # those of the paper


def runs_of(name, scale, seeds=(0, 1, 2)):
    for training in tables.load(name, scale).trainings:
        yield from ExperimentRun.plan(training, seeds, Path("output", scale))


def every_run(scale):
    for name in [*EXPERIMENTS, *(STUDIES if scale == "demo" else ())]:
        yield from ((name, run) for run in with_needs([*runs_of(name, scale)]))


def test_every_table_and_figure_is_declared():
    tables_of_paper, figures_of_paper = (f"table {n}" for n in range(1, 13)), (f"figure {n}" for n in range(3, 8))
    assert list(EXPERIMENTS) == [*tables_of_paper, "table int8", *figures_of_paper]


@pytest.mark.parametrize("scale", ["full", "demo"])
def test_the_table_of_int8_has_every_network_by_every_way(scale):
    declared = tables.load("table int8", scale)
    images = 2 if scale == "full" else 4
    assert len(declared.rows) == images * (1 + len(WAYS) + 2)
    assert {len(row.cells) for row in declared.rows} == {2 * 5}
    bases = {training.base for training in declared.trainings}
    assert len(bases) == 5 * images
    assert {training.kind for training in declared.trainings} == {COMPARE, QAT}


def test_every_calibrator_is_compared():
    assert {way["QUANT.CALIBRATOR"] for way in WAYS.values() if "QUANT.CALIBRATOR" in way} == {*CALIBRATORS}


@pytest.mark.parametrize("name", TABLES)
def test_at_full_scale_a_table_has_every_number_of_the_papers(name):
    declared = tables.load(name, "full")
    assert [list(row.labels) for row in declared.rows] == [
        list(row[: len(declared.labels)]) for row in declared.table.rows
    ]
    for row in declared.rows:
        assert [column for column in row.cells if column not in declared.ours] == list(
            declared.table.columns[len(declared.labels) :]
        )
        subjects = [cell.subject for cell in row.cells.values()]
        assert {subject for subject in subjects if isinstance(subject, str)} <= list_archs().keys()


@pytest.mark.parametrize("scale", ["full", "demo"])
def test_every_command_can_be_typed(scale, monkeypatch):
    monkeypatch.chdir(ROOT)
    folders = {}
    for name, run in every_run(scale):
        words = shlex.split(run.shell_line(scale))
        assert words[0] in ("torchrun", "python")
        assert (ROOT / run.script).is_file()
        assert words[-len(run.command) :] == run.command
        if run.kind is SPEED:
            continue
        cfg = config.parse(run.command, run.kind.program).cfg
        assert parse_arch(cfg.MODEL.ARCH)
        assert Path(cfg.OUTPUT, cfg.MODEL.ARCH, cfg.TAG) == run.folder
        assert run.seed == cfg.SEED
        if cfg.DATA.DATASET in FOLDERS and not cfg.THROUGHPUT_MODE:
            assert f"${FOLDERS[cfg.DATA.DATASET]}" == cfg.DATA.DATA_PATH
        assert folders.setdefault(run.folder, run.command) == run.command, f"{name}: two runs in {run.folder}"


def test_backbones_are_those_of_the_classifiers():
    """Of table 7: what is trained on them begins with the checkpoints that the other tables are of."""
    runs = {run.folder.name: run for name, run in every_run("full") if name == "table 7"}
    for name, classifier in (("segment-seed1", "target-seed1"), ("detect-repvgg-seed2", "repvgg-seed2")):
        assert runs[name].base == runs[classifier]
        assert str(runs[classifier].folder / "latest.pth") == runs[name].cfg.MODEL.PRETRAINED
    assert str(runs["segment-seed0"].folder / "latest.pth") == runs["int8-seed0"].cfg.MODEL.RESUME
    assert runs["int8-seed0"].cfg.TASK == "segment"
    segment, detect = runs["segment-seed0"].cfg, runs["detect-seed0"].cfg
    images = 8 / 256  # of a step, beside those that rates are given for
    assert (segment.SEGMENT.CROP, segment.TRAIN.EPOCHS * (2975 // 8)) == ((512, 1024), 40_068)
    assert (segment.TRAIN.BASE_LR * images, segment.TRAIN.LR_SCHEDULER.NAME) == (pytest.approx(0.01), "poly")
    assert (detect.DETECT.HEAD, detect.TRAIN.EPOCHS, detect.TRAIN.LR_SCHEDULER.MILESTONES) == ("cascade", 12, (8, 11))
    assert detect.TRAIN.BASE_LR * 2 * images == pytest.approx(0.02)


def test_the_papers_setting():
    """Of the runs whose accuracy table 2 and 4 print."""
    runs = {run.folder.name: run for name, run in every_run("full") if name in ("table 2", "table 4")}
    target, search = runs["target-seed1"], runs["search-seed0"]
    assert (target.cfg.TRAIN.EPOCHS, target.cfg.DATA.BATCH_SIZE, target.training.gpus) == (120, 32, 8)
    assert target.scales == search
    assert search.cfg.DATA.DATASET == "cf100"
    assert runs["target-b2-large-seed0"].cfg.DATA.BATCH_SIZE == 200
    assert runs["old-gradients-seed0"].cfg.TRAIN.CHANGE_GRADIENTS is False
    assert runs["ones-seed0"].scales is None
    assert runs["ones-seed0"].cfg.TRAIN.CONSTANTS == "one"
    assert runs["old-gradients-seed0"].cfg.TRAIN.BASE_LR == target.cfg.TRAIN.BASE_LR == 0.1


def test_hours_are_the_papers_speed():
    runs = {run.folder.name: run for name, run in every_run("full") if name in ("table 2", "table 3", "table 12")}
    epochs_of_images = 120 * 1_281_167 / 3600
    assert execute.gpu_hours(runs["target-seed0"]) == pytest.approx(epochs_of_images / 380)
    assert execute.gpu_hours(runs["repvgg-l2-seed0"]) == pytest.approx(epochs_of_images / 82)
    vgg16 = experiment.multiply_adds("torchvision/vgg16_bn") / experiment.multiply_adds("RepOpt-VGG-B1-target")
    assert execute.gpu_hours(runs["vgg16-seed0"]) == pytest.approx(epochs_of_images / 380 * vgg16)
    small = (32 / 224) ** 2
    assert execute.gpu_hours(runs["search-seed0"]) == pytest.approx(240 * 50_000 / 3600 / 380 * small, rel=0.02)
    assert execute.gpu_hours(runs["target-ghost-seed0"]) is None
    assert execute.gpu_hours(runs["speed-seed0"]) is None


@pytest.mark.parametrize("name", ["RepOpt-VGG-B1", "RepOpt-VGG-B2", "RepOpt-VGG-L1", "RepOpt-VGG-L2"])
def test_counts_are_those_of_table_1(name):
    """The paper rounds the multiply-adds of B1 up and those of L1 down."""
    there = paper.read("table1_architecture").row([name])
    arch = f"{name}-target"
    assert experiment.layers(arch) == there["layers of the four stages"]
    assert experiment.channels(arch) == there["channels of the four stages"]
    assert experiment.deployed_parameters(arch) == pytest.approx(there["params (M)"], abs=0.05)
    assert experiment.multiply_adds(arch) == pytest.approx(there["FLOPs (B multiply-adds)"], abs=0.1)


@pytest.mark.parametrize("name", ["B1", "B2", "L1", "L2"])
def test_parameters_are_those_of_table_2(name):
    for label, arch in ((f"RepOpt-VGG-{name}", "target"), (f"RepVGG-{name}", "repvgg")):
        there = paper.read("table2_imagenet_2080ti").row([label])
        arch = f"RepOpt-VGG-{name}-{arch}"
        assert experiment.parameters(arch) == pytest.approx(there["train params (M)"], abs=0.1)
        assert experiment.deployed_parameters(arch) == pytest.approx(there["inference params (M)"], abs=0.05)


@pytest.mark.parametrize("arch", sorted({arch: name for name, arch in list_archs().items()}.values()))
def test_multiply_adds_of_every_architecture(arch):
    """As counted from the shapes of what every layer puts out."""
    total = 0

    def of_convolution(module, arguments, output):
        nonlocal total
        kernel = module.kernel() if isinstance(module, RepConv2d) else module.weight
        total += output.numel() * kernel[0].numel()

    def of_block(module, arguments):
        nonlocal total
        (x,) = arguments
        height, width = (-(-side // module.stride) for side in x.shape[2:])
        kernel = module.kernel()
        total += len(kernel) * height * width * kernel[0].numel()

    model = experiment.network(arch)
    handles = []
    for module in model.modules():
        if isinstance(module, RepConv2d) and module.mode != "target":  # convolves by itself, before what follows it
            handles.append(module.register_forward_pre_hook(of_block))
        elif isinstance(module, nn.Conv2d | nn.Linear):
            handles.append(module.register_forward_hook(of_convolution))
    try:
        with torch.no_grad():
            model(torch.zeros(1, 3, 64, 64, device="meta"))
    finally:
        for handle in handles:
            handle.remove()
    assert experiment.multiply_adds(arch, 64) == pytest.approx(total / 1e9, rel=1e-12)


def test_the_share_of_the_identity():
    """As the branches of every block have it, one by one, in float64."""
    model = repopt.create_model("RepOpt-VGG-nano", mode="hs").double()
    images = torch.randn(4, 3, 64, 64, dtype=torch.float64)
    inputs = {}
    for block in model.modules():
        if isinstance(block, RepConv2d):
            block.register_forward_pre_hook(lambda module, arguments: inputs.update({module: arguments[0]}))
    shares = list(figures.identity_shares(model, images))
    expected = []
    for block, x in inputs.items():
        if "scale_identity" in dict(block.named_children()):
            wide = torch.conv2d(x, block.conv.weight, padding=1) * block.scale_conv.weight.view(-1, 1, 1)
            narrow = torch.conv2d(x, block.conv_1x1.weight) * block.scale_1x1.weight.view(-1, 1, 1)
            expected.append(float(x.var() / (wide + narrow + x).detach().var()))
    assert shares == pytest.approx(expected, rel=1e-12)
    assert len(shares) == 23


def test_the_share_of_a_resnets_identity():
    from torchvision.models import resnet50

    assert len(list(figures.identity_shares(resnet50(), torch.randn(2, 3, 64, 64)))) == 12


ROWS = [
    {"labels": [label], "cells": [{"quantity": "top1", "paper": there, "mean": mean, "std": std, "values": [mean],
                                   "difference": None, "decimals": 2, "ordered": True}]}
    for label, there, mean, std in (("a", "70.5", 90.0, 1.0), ("b", "71.5±0.1", 95.0, 1.0), ("c", "72.0", 94.9, 1.0),
                                    ("d", "73.0", 80.0, None), ("e", None, 10.0, None))
]  # fmt: skip


def test_orderings():
    assert result.orderings(ROWS) == [
        "top1: of 6 pairs of rows 2 are ordered as in the paper, 1 are closer than their spread, 3 are the other way "
        "round (a above d; b above d; c above d)"
    ]


def test_a_table_as_markdown():
    content = {"labels": ["model"], "rows": ROWS[:1]}
    assert result.table_of(content) == (
        "| model | top1: paper | this run | difference |\n|---|---|---|---|\n| a | 70.5 | 90.00 ± 1.00 | – |"
    )


OPTIONS = {"DATA.DATASET": "digits", "DATA.BATCH_SIZE": 100, "TRAIN.EPOCHS": 2, "TRAIN.WARMUP_EPOCHS": 0}


def small(**other_options):
    """Experiments instead of the paper's, with one epoch of two runs each."""
    settings = {"SAVE_EVERY_STEPS": 1, **OPTIONS, **other_options}
    search = Training("s", "RepOpt-VGG-nano-hs", settings=settings, once=True)
    target = search.but("t", arch="RepOpt-VGG-nano-target", scales=search, once=False)
    cells = {"HS top1 on CIFAR-100": score(search), "target top1 on ImageNet": score(target)}
    rows = (Row(("sqrt(2/l)",), cells),)
    table = Experiment("a small one", ("one line",), paper.read("table9_hs_init_b1"), rows)
    figure = Experiment("scales", draw=figures.scales_by_epoch, shown={"digits": search})
    return {"table 9": lambda full: table, "figure 6": lambda full: figure}


@pytest.fixture
def declare(monkeypatch):
    """Puts experiments in the place of the paper's."""
    monkeypatch.chdir(ROOT)

    def declare(experiments):
        for name, declared in experiments.items():
            monkeypatch.setitem(EXPERIMENTS, name, declared)

    return declare


def reproduced(*arguments):
    return reproduce.main([*map(str, arguments)])


def test_what_was_killed_goes_on(declare, tmp_path, capsys):
    """After kill -9 of everything, within the first training, the same command ends with the same weights."""
    declare(small())
    program = (
        "import sys; import reproduce, test_reproduce; from reproduction.tables import EXPERIMENTS; "
        "EXPERIMENTS.update(test_reproduce.small()); sys.exit(reproduce.main(sys.argv[1:]))"
    )
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    arguments = ["--table", "9", "--seeds", "0", "1", "--output"]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "scripts", Path(__file__).parent)))
    }
    process = subprocess.Popen(
        [sys.executable, "-c", program, *arguments, str(killed)], env=environment, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    search = killed / "demo" / "RepOpt-VGG-nano-hs" / "s-seed0"
    deadline = time.monotonic() + 120
    while not (search / "latest.pth").exists():
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for output in (killed, whole):
        assert reproduced(*arguments, output) == 0
    for run in ("RepOpt-VGG-nano-hs/s-seed0", "RepOpt-VGG-nano-target/t-seed0", "RepOpt-VGG-nano-target/t-seed1"):
        one, other = (checkpoint.read(o / "demo" / run / "latest.pth")["model"] for o in (killed, whole))
        assert all(torch.equal(values, other[name]) for name, values in one.items())
    assert (killed / "demo" / "table9.md").read_text() == (whole / "demo" / "table9.md").read_text()
    shown = capsys.readouterr().out
    content = json.loads((whole / "demo" / "table9.json").read_text())
    (row,) = content["rows"]
    accuracies = [
        json.loads((Path(folder) / "metrics.jsonl").read_text().splitlines()[-1])["val"]["top1"]
        for folder in content["runs"]["t"]
    ]
    assert row["cells"][1]["values"] == accuracies
    assert row["cells"][1]["mean"] == pytest.approx(sum(accuracies) / 2)
    assert row["cells"][1]["difference"] == pytest.approx(sum(accuracies) / 2 - 78.47)
    assert result.table_of(content) in shown
    # Once more: nothing is run, and the figure is drawn from the same run.
    before = (whole / "demo" / "RepOpt-VGG-nano-hs" / "s-seed0" / "log_rank0.txt").read_bytes()
    assert reproduced("--table", 9, "--figure", 6, "--seeds", 0, 1, "--output", whole) == 0
    assert (whole / "demo" / "RepOpt-VGG-nano-hs" / "s-seed0" / "log_rank0.txt").read_bytes() == before
    assert (whole / "demo" / "figure6.png").read_bytes()[:4] == b"\x89PNG"
    assert reproduced("--table", 9, "--dry-run", "--seeds", 0, 1, 2, "--output", whole) == 0
    states = re.findall(r"^# (\S+): (.*)$", capsys.readouterr().out, re.MULTILINE)[-4:]
    assert states == [("s-seed0", "done"), ("t-seed0", "done"), ("t-seed1", "done"), ("t-seed2", "on the CPU")]
    # Other settings in the same folder.
    declare(small(**{"TRAIN.EPOCHS": 3}))
    assert reproduced(*arguments, whole) == 2
    assert "TRAIN.EPOCHS was 2 and is 3 now" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--table", "13"), "unknown table, figure or study 'table 13'"),
        (("--figure", "8"), "unknown table, figure or study 'figure 8'"),
        (("--table", "4", "--scale", "full"), "where is the data set of 'plain'. Set IMAGENET to its folder"),
    ],
)
def test_mistakes(arguments, message, tmp_path, monkeypatch, in_one_line):
    for name in FOLDERS.values():
        monkeypatch.delenv(name, raising=False)
    assert reproduced(*arguments, "--output", tmp_path) == 2
    in_one_line("reproduce.py", message, {})


def test_full_scale_needs_gpus(tmp_path, monkeypatch, in_one_line):
    for name in FOLDERS.values():
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert reproduced("--table", 4, "--scale", "full", "--output", tmp_path) == 2
    in_one_line("reproduce.py", "full scale needs 8 GPUs, and there are 1: --dry-run", {})


def test_a_run_that_fails_is_one_line(declare, tmp_path, in_one_line):
    declare(small(**{"DATA.BATCH_SIZE": 301}))
    assert reproduced("--table", 9, "--output", tmp_path) == 2
    in_one_line("reproduce.py", "main_repopt.py: .*301", {})


def test_no_number_of_the_paper_is_typed_twice():
    """Accuracies and speeds stand in paper_tables.json alone."""
    numbers = {
        f"{number}"
        for table in json.loads(paper.FILE.read_text()).values()
        if isinstance(table, dict)
        for number in re.findall(r"\d\d\.\d\d", json.dumps(table))
    }
    for path in Path(tables.__file__).parent.glob("*.py"):
        text = re.sub(r"66\.51 and 66\.50", "", path.read_text())  # of the release notes
        assert not numbers & set(re.findall(r"\d\d\.\d\d", text)), path.name


def test_a_table_of_runs_that_were_made_elsewhere(declare, tmp_path, monkeypatch, capsys):
    """At full scale, whose GPUs are not here, from the commands that a dry run prints."""
    declare(small())
    options = ("--table", 9, "--scale", "full", "--seeds", 0, "--output", tmp_path)
    assert reproduced(*options, "--dry-run") == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("torchrun")]
    for line in lines:
        assert main_repopt.main(shlex.split(line.partition("main_repopt.py ")[2])) == 0
    capsys.readouterr()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert reproduced(*options) == 0
    assert "| sqrt(2/l) | 54.53 |" in capsys.readouterr().out


def test_it_needs_no_extra(tmp_path):
    """Quantization's packages are needed where something is quantized."""
    program = (
        "import sys; sys.modules.update(dict.fromkeys(('torchao', 'onnx', 'onnxruntime', 'onnxscript'))); "
        "import reproduce; sys.exit(reproduce.main(sys.argv[1:]))"
    )
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'scripts'}"}
    command = [sys.executable, "-c", program, "--table", "10", "--dry-run", "--output", str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("scripts/quantize.py") == 12
