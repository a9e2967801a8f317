"""Segmentation and detection by their command lines, on a few scenes of digits."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import export
import inspect_scales
import pytest
import quantize
import report
import timm
import torch
from downstream import detect, segment
from PIL import Image
from torchvision.transforms.functional import to_tensor

import main_repopt
import repopt
from data import cityscapes, scenes
from repopt import checkpoint, segmentation
from repopt.export import OnnxNetwork
from train import build, compare, config, tasks, trained
from train.command import EXIT_USAGE_ERROR as MISTAKE
from train.distributed import World
from train.evaluation.classification import Evaluation
from train.evaluation.detection import Detection
from train.evaluation.segmentation import Segmentation
from train.file_names import COLUMNS
from train.keys import CLASSIFY, DENSE, KEYS, TASKS

ROOT = Path(__file__).resolve().parents[2]
NANO = "RepOpt-VGG-nano"
HS, TARGET, PLAIN = f"{NANO}-hs", f"{NANO}-target", f"{NANO}-target-norepopt"
PROGRAMS = {"segment": segment, "detect": detect}
RECIPES = {**PROGRAMS, "fcos": detect}
SMALL = {
    "fcos": ["MODEL.CHANNELS", "8"],
    "segment": ["MODEL.CHANNELS", "8", "SEGMENT.CROP", "(64, 64)"],
    "detect": ["MODEL.CHANNELS", "8", "DETECT.HIDDEN", "16", "DETECT.ROIS", "8"],
}
SCORE = {"segment": "{miou:.3f}", "detect": "{box_map:.2f}"}  # as the log has it


@pytest.fixture(scope="module")
def few_scenes(tmp_path_factory):
    """A folder of 12 training and 5 test scenes."""
    folder = tmp_path_factory.mktemp("data") / "scenes"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scenes, "_COUNTS", {"train": 12, "val": 5})
        scenes.make(folder)
    return folder


@pytest.fixture(scope="module")
def classifiers(tmp_path_factory):
    """Checkpoints of classifiers by --arch, the one of a target network with its scales."""
    output, found = tmp_path_factory.mktemp("classifiers"), {}
    options = [
        "--opts",
        "DATA.DATASET",
        "digits",
        "TRAIN.EPOCHS",
        "1",
        "DATA.BATCH_SIZE",
        "100",
        "TRAIN.WARMUP_EPOCHS",
        "0",
    ]
    for arch, scales in ((HS, []), (TARGET, ["--scales-path", str(output / HS / "t" / "scales.pth")])):
        command = ["--arch", arch, "--tag", "t", "--output", str(output), *scales, *options, "TRAIN.BASE_LR", "0.01"]
        assert main_repopt.main(command) == 0
        found[arch] = output / arch / "t" / "latest.pth"
    return found


@pytest.fixture
def command(few_scenes, tmp_path):
    """Makes the command line of a recipe."""

    def make(recipe, arch, *arguments, epochs=2, options=()):
        return [
            *("--cfg", str(ROOT / "configs" / "scenes" / f"{recipe}.yaml"), "--arch", arch, "--output", str(tmp_path)),
            *("--data-path", str(few_scenes), *map(str, arguments)),
            *("--opts", *SMALL[recipe], "TRAIN.EPOCHS", str(epochs), "TRAIN.BASE_LR", "0.64", *map(str, options)),
        ]

    return make


def run(recipe, argv):
    """Exit code of a command line, in this process."""
    return RECIPES[recipe].main(argv)


def process(recipe, argv, *launcher):
    """A command line in a process of its own."""
    script = RECIPES[recipe].__file__
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *launcher, script, *argv],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def weights(folder):
    return checkpoint.read(folder / "latest.pth")["model"]


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_training_that_is_killed_goes_on_to_the_same_weights(recipe, command, classifiers, tmp_path):
    classifier = shutil.copy(classifiers[TARGET], tmp_path / "classifier.pth")
    arguments = ["--backbone", classifier]
    options = ["TRAIN.SEARCH_EPOCHS", 1] if recipe == "fcos" else []  # a classifier's scales are not all of its
    assert run(recipe, command(recipe, TARGET, *arguments, "--tag", "whole", options=options)) == 0
    whole, part = tmp_path / TARGET / "whole", tmp_path / TARGET / "part"
    argv = command(recipe, TARGET, *arguments, "--tag", "part", options=["SAVE_EVERY_STEPS", 1, *options])
    killed = process(recipe, argv)
    deadline = time.monotonic() + 120
    while not (part / "latest_1.pth").is_file() and killed.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(killed.pid, signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL, killed.stdout.read()
    assert 0 < checkpoint.read(part / "latest.pth")["epoch"] + 2 <= 2  # within the training
    Path(classifier).unlink()  # what goes on needs no other file
    assert run(recipe, argv) == 0
    assert "goes on" in (part / "log_rank0.txt").read_text()
    assert same(weights(whole), weights(part))
    assert [r["val"] for r in records(whole) if "val" in r] == [r["val"] for r in records(part) if "val" in r]
    names = {path.name for path in whole.iterdir()}
    assert {
        "latest.pth",
        "ckpt_epoch_1.pth",
        "config.json",
        "metrics.jsonl",
        "predictions.png",
        "log_rank0.txt",
    } <= names


@pytest.mark.parametrize("task", PROGRAMS)
def test_two_processes_train_and_count_every_image_once(task, command, tmp_path):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    two = process(task, command(task, PLAIN, "--batch-size", 2, "--tag", "two", epochs=1), *launcher)
    assert two.wait(300) == 0, two.stdout.read()
    folder = tmp_path / PLAIN / "two"
    assert run(task, command(task, PLAIN, "--eval", "--resume", folder / "latest.pth", "--tag", "one")) == 0
    log = (tmp_path / PLAIN / "one" / "eval_log_rank0.txt").read_text()
    line = re.search(r"val: (.*)", log)[1]
    assert line in (folder / "log_rank0.txt").read_text()
    assert "on 5 images" in line
    assert (tmp_path / PLAIN / "one" / "predictions.png").is_file()
    last = records(folder)[-1]["val"]
    assert last["images"] == 5
    assert SCORE[task].format(**last) in line


@pytest.mark.parametrize("task", PROGRAMS)
def test_a_backbone_begins_with_the_classifiers_weights(task, command, classifiers, tmp_path):
    argv = command(task, TARGET, "--backbone", classifiers[TARGET], epochs=1, options=["TRAIN.BASE_LR", "0"])
    assert run(task, [*argv, "MODEL.FREEZE_BN", "True"] if task == "detect" else argv) == 0
    folder = tmp_path / TARGET / task
    classifier, network = weights(classifiers[TARGET].parent), weights(folder)
    body = {"segment": "encoder.model", "detect": "backbone.body"}[task]
    taken = {name: value for name, value in classifier.items() if f"{body}.{name}" in network}
    assert set(classifier) - set(taken) == {"linear.weight", "linear.bias"}
    kernels = {name for name, value in taken.items() if value.dim() > 1}
    assert all(torch.equal(network[f"{body}.{name}"], taken[name]) for name in (taken if task == "detect" else kernels))
    said = "left out, since they are of the classifier: linear.weight, linear.bias"
    assert said in (folder / "log_rank0.txt").read_text()
    kept = checkpoint.read(folder / "latest.pth")["scales"]  # of the classifier's checkpoint, under the names here
    searched = repopt.load_scales(classifiers[TARGET])
    assert same(kept, {f"{body}.{name}": value for name, value in searched.items()})


def test_a_backbone_begins_with_weights_that_come_without_more(command, classifiers, tmp_path):
    """As a released checkpoint has them."""
    released = tmp_path / "released.pth"
    torch.save({"model": weights(classifiers[TARGET].parent)}, released)
    assert run("segment", command("segment", PLAIN, "--backbone", released, epochs=1)) == 0
    log = (tmp_path / PLAIN / "segment" / "log_rank0.txt").read_text()
    assert f"backbone: 168 tensors of {released}; left out" in log


FCOS_PARTS = {"body", "fpn", "halving", "merged", "1", "2", "3"}
DECLARED = [("detect", ["DETECT.NECK", "declared"], {"body", "fpn"}), ("fcos", [], FCOS_PARTS)]


@pytest.mark.parametrize(("recipe", "options", "parts"), DECLARED)
def test_scales_are_searched_in_a_detector_and_train_its_plain_form(recipe, options, parts, command, tmp_path, capsys):
    assert run(recipe, command(recipe, HS, "--tag", "search", epochs=1, options=options)) == 0
    scales = tmp_path / HS / "search" / "scales.pth"
    names = repopt.load_scales(scales).keys()
    assert {name.split(".")[1] for name in names} == parts
    assert inspect_scales.main([str(scales), "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "scales.png")
    assert run(recipe, command(recipe, TARGET, "--scales-path", scales, epochs=1, options=options)) == 0
    content = checkpoint.read(tmp_path / TARGET / "detect" / "latest.pth")
    assert content["scales"].keys() == names


@pytest.mark.parametrize("task", DENSE)
def test_scales_are_searched_for_a_converted_backbone(task, command, tmp_path):
    arch = "timm/repghostnet_050"
    assert run(task, command(task, f"{arch}-hs", "--tag", "search", epochs=1)) == 0
    scales = tmp_path / f"{arch}-hs" / "search" / "scales.pth"
    assert run(task, command(task, f"{arch}-target", "--scales-path", scales, epochs=1)) == 0
    content = checkpoint.read(tmp_path / f"{arch}-target" / task / "latest.pth")
    assert same(content["scales"], repopt.load_scales(scales))


@pytest.mark.parametrize(("recipe", "options", "parts"), [*DECLARED, ("segment", [], {"model"})])
def test_scales_are_searched_in_the_one_training(command, tmp_path, recipe, options, parts):
    options = [*options, "TRAIN.SEARCH_EPOCHS", 1, "PRINT_FREQ", 1]
    assert run(recipe, command(recipe, TARGET, epochs=2, options=options)) == 0
    folder = tmp_path / TARGET / ("segment" if recipe == "segment" else "detect")
    scales = repopt.load_scales(folder / "scales.pth")
    assert {name.split(".")[1] for name in scales} == parts
    assert checkpoint.read(folder / "latest.pth")["scales"].keys() == scales.keys()
    searching = [record["train"]["searching"] for record in records(folder) if "train" in record]
    assert searching == sorted(searching, reverse=True)
    assert {*searching} == {0, 1}


def test_fcos_is_evaluated_loaded_and_exported(command, tmp_path, capsys, in_one_line):
    arch, options = f"{NANO}-repvgg", ["DATA.MEAN", "(0.1, 0.2, 0.3)"]
    assert run("fcos", command("fcos", arch, epochs=1, options=options)) == 0
    folder = tmp_path / arch
    latest = folder / "detect" / "latest.pth"
    assert run("fcos", command("fcos", arch, "--eval", "--resume", latest, "--tag", "eval")) == 0
    line = re.search(r"val: (.*)", (folder / "eval" / "eval_log_rank0.txt").read_text())[1]
    assert line in (folder / "detect" / "log_rank0.txt").read_text()
    assert export.main(["--resume", str(latest), "--out", str(tmp_path / "one"), "--formats", "onnx"]) == 0
    options = ["--out", str(tmp_path / "any"), "--formats", "onnx", "--dynamic-size"]
    assert export.main(["--resume", str(latest), *options]) == 0
    networks = [OnnxNetwork(tmp_path / name / "fp32.onnx") for name in ("one", "any")]
    assert [network.input_shape for network in networks] == [(3, 128, 128), (3, None, None)]
    detector = repopt.load(latest).network
    batch, _ = detector.transform([torch.rand(3, 96, 96)])
    with torch.no_grad():
        raw = detector.predictor(batch.tensors)
    for network in networks:
        torch.testing.assert_close(network(batch.tensors), raw, rtol=1e-4, atol=1e-5)
    images = json.loads(networks[0].metadata["images"])
    assert images["mean"] == list(detector.transform.image_mean) == [0.1, 0.2, 0.3]
    assert images["std"] == list(detector.transform.image_std) != [1, 1, 1]
    with pytest.raises(repopt.UserError, match=r"fp32.onnx': it gives the raw predictions of a detector: load its"):
        repopt.load(tmp_path / "one" / "fp32.onnx")
    capsys.readouterr()
    assert export.main(["--resume", str(latest), "--out", str(tmp_path / "no"), "--image-size", "100"]) == MISTAKE
    in_one_line("export.py", "--image-size 100: the network takes multiples of 32", {})
    options = ["--formats", "detections", "--dynamic-size"]
    assert export.main(["--resume", str(latest), "--out", str(tmp_path / "no"), *options]) == MISTAKE
    in_one_line("export.py", "--formats detections is of a detector of DETECT.HEAD fcos, for images of one size", {})


def test_fcos_to_int8(command, few_scenes, tmp_path, capsys, in_one_line, monkeypatch):
    """By training on, distilled, with the scales of the one training; the file finds objects in pictures."""
    assert run("fcos", command("fcos", TARGET, options=["TRAIN.SEARCH_EPOCHS", "1"])) == 0
    latest = tmp_path / TARGET / "detect" / "latest.pth"
    argv = ["--cfg", str(ROOT / "configs" / "scenes" / "quantize_fcos.yaml"), "--arch", TARGET, "--resume", str(latest)]
    argv += ["--data-path", str(few_scenes), "--output", str(tmp_path)]
    assert quantize.main([*argv, "--method", "qat", "--opts", "TRAIN.EPOCHS", "1"]) == MISTAKE
    in_one_line("quantize.py", "'{latest}' was trained with MODEL.CHANNELS 8, and it is 32 now", {"latest": latest})
    options = ["--opts", *SMALL["fcos"]]
    assert quantize.main([*argv, "--method", "qat", *options, "TRAIN.EPOCHS", "1", "QUANT.DISTILL", "1.0"]) == 0
    artifacts = tmp_path / TARGET / "qat-default" / "artifacts"
    results = json.loads((artifacts / "results.json").read_text())
    assert [*results][:2] == ["fp32", "INT8"]
    assert {"INT8, onnxruntime", "INT8, onnxruntime, end to end"} <= {*results}
    assert results["fp32"]["box_map"] == pytest.approx(records(latest.parent)[-1]["val"]["box_map"])
    assert all(result["images"] == 5 for result in results.values())
    out = tmp_path / "out"
    formats = ["--formats", "onnx", "detections", "--out", str(out)]
    assert export.main(["--resume", str(artifacts / "quantized.pth"), *formats]) == 0
    assert (out / "int8.onnx").read_bytes() == (artifacts / "int8.onnx").read_bytes()
    written = [OnnxNetwork(folder / "int8_detections.onnx") for folder in (out, artifacts)]
    x = torch.randn(2, 3, 128, 128)
    torch.testing.assert_close(written[0](x), written[1](x), rtol=0, atol=0)
    network, classes, transform, task = repopt.load(artifacts / "int8_detections.onnx")
    assert (task, len(classes)) == ("detect", 10)
    picture = next((few_scenes / "coco" / "val2017").iterdir())
    pixels = Image.open(picture)
    (found,) = network([transform(pixels)])
    (other,) = written[1](repopt.load(latest).network.transform([to_tensor(pixels)])[0].tensors)["scores"]
    torch.testing.assert_close(found["scores"], other[other > 0], rtol=1e-3, atol=1e-4)
    assert found["boxes"].max() <= 96
    monkeypatch.setattr(compare, "WAYS", {"minmax": {"QUANT.CALIBRATOR": "minmax"}, "default": {}})
    assert quantize.main([*argv, "--method", "compare", *options]) == 0
    results = tmp_path / TARGET / "compare-default" / "artifacts" / "results.json"
    assert [*json.loads(results.read_text())] == ["fp32", "minmax", "default"]
    assert not (results.parent / "int8.onnx").exists()
    capsys.readouterr()
    assert quantize.main([*argv, "--method", "compare", *options, "QUANT.CALIBRATOR", "mse"]) == MISTAKE
    in_one_line("quantize.py", "QUANT.CALIBRATOR mse is not of --method compare: leave it out", {})


def test_a_detector_of_two_stages_to_int8(command, few_scenes, tmp_path, capsys, in_one_line):
    """Its pyramid and region proposals; the rest is float, in the checkpoint too."""
    assert run("detect", command("detect", PLAIN, epochs=1)) == 0
    latest = tmp_path / PLAIN / "detect" / "latest.pth"
    argv = ["--cfg", str(ROOT / "configs" / "scenes" / "detect.yaml"), "--arch", PLAIN, "--method", "ptq"]
    argv += ["--resume", str(latest), "--data-path", str(few_scenes), "--output", str(tmp_path)]
    assert quantize.main([*argv, "--opts", "TASK", "detect", *SMALL["detect"]]) == 0
    artifacts = tmp_path / PLAIN / "ptq-default" / "artifacts"
    results = json.loads((artifacts / "results.json").read_text())
    assert results["INT8"].keys() == results["fp32"].keys() | {"signal_to_noise"}
    assert not (artifacts / "int8_detections.onnx").exists()
    weights = checkpoint.read(artifacts / "quantized.pth")["model"]
    assert any(name.startswith("detector.roi_heads.") for name in weights)
    assert OnnxNetwork(artifacts / "int8.onnx").output_names[:2] == ("0", "1")
    assert export.main(["--resume", str(artifacts / "quantized.pth"), "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "int8.onnx").read_bytes() == (artifacts / "int8.onnx").read_bytes()
    capsys.readouterr()
    assert export.main(["--resume", str(latest), "--formats", "detections"]) == MISTAKE
    in_one_line("export.py", "--formats detections is of a detector of DETECT.HEAD fcos", {})


def test_a_segmentation_network_to_int8(command, few_scenes, tmp_path, capsys, in_one_line):
    assert run("segment", command("segment", PLAIN, epochs=1)) == 0
    latest = tmp_path / PLAIN / "segment" / "latest.pth"
    argv = ["--cfg", str(ROOT / "configs" / "scenes" / "quantize.yaml"), "--arch", PLAIN, "--method", "ptq"]
    argv += ["--resume", str(latest), "--data-path", str(few_scenes), "--output", str(tmp_path)]
    argv += ["--opts", *SMALL["segment"]]
    assert quantize.main(argv) == 0
    capsys.readouterr()
    trains = [*argv, "TRAIN.EPOCHS", "1", "QUANT.METHOD", "qat"]
    trains.remove("--method")
    trains.remove("ptq")
    assert quantize.main(trains) == MISTAKE
    in_one_line("quantize.py", "the images are 64 x 64 in training, 96 x 96 in evaluation", {})
    assert quantize.main([*trains, "SEGMENT.CROP", "(96, 96)"]) == 0
    trained = json.loads((tmp_path / PLAIN / "qat-default" / "artifacts" / "results.json").read_text())
    assert trained["INT8"]["images"] == 5
    artifacts = tmp_path / PLAIN / "ptq-default" / "artifacts"
    results = json.loads((artifacts / "results.json").read_text())
    assert results["fp32"]["miou"] == records(latest.parent)[-1]["val"]["miou"]
    # integers round a rounding's way in the two
    assert results["INT8"]["pixel_accuracy"] == pytest.approx(results["INT8, onnxruntime"]["pixel_accuracy"], abs=1)
    heads = "| network | mIoU (%) | pixel accuracy (%) | signal to noise (dB) | file (MB) |"
    assert heads in (artifacts / "results.md").read_text()
    capsys.readouterr()
    for size in ("100", "64 100", "100 64"):
        argv = ["--resume", str(latest), "--image-size", *size.split(), "--out", str(tmp_path / "no")]
        assert export.main(argv) == MISTAKE
        in_one_line("export.py", f"--image-size {size}: the network takes multiples of 32", {})
    assert export.main(["--resume", str(artifacts / "quantized.pth"), "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "int8.onnx").read_bytes() == (artifacts / "int8.onnx").read_bytes()
    assert report.main([str(latest.parent), str(artifacts.parent), "--out", str(tmp_path / "report.html")]) == 0
    page = (tmp_path / "report.html").read_text()
    assert "mIoU by epoch" in page
    assert "some test images" in page
    assert "data:image/png;base64" in page


def swap(names, one, other):
    """The names with two in each other's place."""
    return type(names)({one: other, other: one}.get(name, name) for name in names)


@pytest.fixture
def renamed(few_scenes, tmp_path, monkeypatch):
    """Makes the scenes of a task with two classes in each other's place."""

    def make(task):
        folder = shutil.copytree(few_scenes, tmp_path / "renamed")
        if task == "segment":  # whose data sets name their classes themselves
            monkeypatch.setattr(scenes, "CLASS_NAMES", swap(scenes.CLASS_NAMES, "3", "5"))
            return folder
        for file in (folder / "coco" / "annotations").iterdir():
            content = json.loads(file.read_text())
            names = swap([category["name"] for category in content["categories"]], "3", "5")
            for category, name in zip(content["categories"], names, strict=True):
                category["name"] = name
            file.write_text(json.dumps(content))
        return folder

    return make


def test_other_classes_are_refused_by_name(command, renamed, tmp_path, capsys, in_one_line):
    """As many, two of them in each other's place, in a data set whose classes have no names of their own in files."""
    assert run("segment", command("segment", PLAIN, epochs=1)) == 0
    folder = tmp_path / PLAIN / "segment"
    latest = folder / "latest.pth"
    assert checkpoint.read(latest)["classes"] == ["background", *"0123456789"]
    capsys.readouterr()
    others, resume = ["--data-path", renamed("segment")], ["--resume", latest]
    recipe = ["--cfg", ROOT / "configs" / "scenes" / "quantize.yaml", "--method", "ptq"]
    runs = {
        "resume": ("segment", command("segment", PLAIN, *others, *resume, "--tag", "other", epochs=3), latest),
        "go on": ("segment", command("segment", PLAIN, *others, epochs=3), folder),
        "evaluate": ("segment", command("segment", PLAIN, *others, *resume, "--eval"), latest),
        "quantize": ("quantize", command("segment", PLAIN, *others, *resume, *recipe), latest),
    }
    for program, argv, path in runs.values():
        assert (PROGRAMS | {"quantize": quantize})[program].main(argv) == MISTAKE
        message = f"'{path}' was trained on other classes: its class 4 is '3', that of DATA.DATA_PATH is '5'"
        in_one_line(f"{program}.py", message, {})


def test_categories_are_matched_by_name(command, renamed, tmp_path, capsys, in_one_line):
    """Their numbers in an annotation file may be others: the labels are those of the checkpoint all the same."""
    assert run("detect", command("detect", PLAIN, epochs=1)) == 0
    latest = tmp_path / PLAIN / "detect" / "latest.pth"
    assert checkpoint.read(latest)["classes"] == [*"0123456789"]
    others, resume = renamed("detect"), ["--resume", latest]

    def of_validation():
        return [line.split(" ", 2)[2] for line in capsys.readouterr().out.splitlines() if " val: " in line][-1]

    assert run("detect", command("detect", PLAIN, *resume, "--eval")) == 0
    expected = of_validation()
    for file in (others / "coco" / "annotations").iterdir():  # the objects are what they were
        content = json.loads(file.read_text())
        ids = {4: 6, 6: 4}
        for annotation in content["annotations"]:
            annotation["category_id"] = ids.get(annotation["category_id"], annotation["category_id"])
        file.write_text(json.dumps(content))
    argv = command("detect", PLAIN, "--data-path", others, *resume, "--eval")
    assert run("detect", argv) == 0
    assert of_validation() == expected
    resumed = command("detect", PLAIN, "--data-path", others, *resume, "--tag", "other", epochs=2)
    assert run("detect", resumed) == 0
    for file in (others / "coco" / "annotations").iterdir():
        file.write_text(file.read_text().replace('"name": "5"', '"name": "five"'))
    capsys.readouterr()
    assert run("detect", argv) == MISTAKE
    in_one_line("detect.py", "category 'five' is no class of those that the network was trained on", {})


def test_windows_and_whole_images(command, tmp_path):
    assert run("segment", command("segment", PLAIN, epochs=1)) == 0
    latest = tmp_path / PLAIN / "segment" / "latest.pth"
    lines = []
    for tag, options in (
        ("whole", []),
        ("one window", ["SEGMENT.WINDOW", "(96, 96)"]),
        ("four", ["SEGMENT.WINDOW", "(64, 64)"]),
    ):
        argv = command("segment", PLAIN, "--eval", "--resume", latest, "--tag", tag, options=options)
        assert run("segment", argv) == 0
        lines.append(re.search(r"val: (.*)", (tmp_path / PLAIN / tag / "eval_log_rank0.txt").read_text())[1])
    assert lines[0] == lines[1] != lines[2]


@pytest.mark.parametrize(
    ("task", "arch", "arguments", "options", "message"),
    [
        ("segment", TARGET, [], [], f"{TARGET} needs searched scales"),
        (
            "segment",
            PLAIN,
            ["--backbone", "{hs}"],
            [],
            f"'{{hs}}' is a checkpoint of '{HS}', whose layers are not those of",
        ),
        ("detect", PLAIN, ["--backbone", "nowhere.pth"], [], "there is no file 'nowhere.pth'"),
        (
            "detect",
            PLAIN,
            ["--backbone", "{target}"],
            ["MODEL.STRIDES", "(1, 2, 2, 2, 2)"],
            r"'{target}' was trained with MODEL.STRIDES \(2, 2, 2, 2, 2\), and they are \(1, 2, 2, 2, 2\) now",
        ),
        ("segment", PLAIN, [], ["MODEL.STRIDES", "(1, 2, 2, 2, 2)"], "UPerNet takes features 4, 8, 16 and 32 times"),
        ("segment", PLAIN, [], ["AUG.MIXUP", "0.5"], "AUG.MIXUP is for TASK classify, and this one is segment"),
        ("segment", PLAIN, [], ["SEGMENT.CROP", "(64, 80)"], r"SEGMENT.CROP is of multiples of 32, not \(64, 80\)"),
        (
            "detect",
            PLAIN,
            [],
            ["MODEL.FREEZE_BN", "True"],
            "MODEL.FREEZE_BN keeps the statistics of --pretrained weights",
        ),
        ("segment", PLAIN, ["--backbone", "a.pth", "--resume", "b.pth"], [], "give one"),
        ("segment", PLAIN, ["--backbone", "{bare}"], [], "the weights of '{bare}' have no places in the backbone"),
        ("segment", "timm/repvgg_a0", ["--backbone", "{repvgg}"], [], "'{repvgg}' have no places in the backbone"),
        ("segment", PLAIN, [], ["SEGMENT.STRIDE", "(8, 8)"], "SEGMENT.STRIDE is at most SEGMENT.WINDOW"),
        ("segment", PLAIN, [], ["DATA.BATCH_SIZE", "1"], "a batch norm would see one value per channel"),
        (
            "detect",
            PLAIN,
            [],
            ["DATA.BATCH_SIZE", "1", "DETECT.SIZES", "(32,)", "DETECT.MAX_SIZE", "32"],
            "train on batches of 2 at least",
        ),
        ("detect", PLAIN, [], ["TRAIN.COMPILE", "default"], "TRAIN.COMPILE is off, not default"),
        ("detect", PLAIN, [], ["TASK", "segment"], "TASK segment is not what detect.py does: its TASK is detect"),
        ("detect", PLAIN, [], ["DATA.DATASET", "scene"], "unknown data set 'scene'; did you mean 'scenes'"),
        ("segment", PLAIN, [], ["MODEL.NUM_CLASSES", "3"], "MODEL.NUM_CLASSES is 3, but the data set's is 11"),
        (
            "detect",
            PLAIN,
            [],
            ["DETECT.SIZES", "(0,)"],
            r"DETECT.SIZES takes one or more integers from 1 on, not \(0,\)",
        ),
        (
            "detect",
            TARGET,
            ["--backbone", "{target}"],
            ["DETECT.NECK", "declared"],
            "the scales do not fit the model: block",
        ),
        ("fcos", PLAIN, [], ["DETECT.ROIS", "8"], "DETECT.ROIS is nothing to DETECT.HEAD fcos: leave it out"),
        ("fcos", PLAIN, [], ["DETECT.NECK", "plain"], "DETECT.NECK is nothing to DETECT.HEAD fcos: leave it out"),
    ],
)
def test_mistakes_are_one_line(task, arch, arguments, options, message, command, classifiers, tmp_path, in_one_line):
    places = {name: tmp_path / f"{name}.pth" for name in ("bare", "repvgg")}
    torch.save({"model": {"stage0.conv.weight": torch.zeros(3)}}, places["bare"])
    torch.save(timm.create_model("repvgg_a0", num_classes=4).state_dict(), places["repvgg"])
    places |= {"hs": classifiers[HS], "target": classifiers[TARGET]}
    arguments = [argument.format(**places) for argument in arguments]
    assert run(task, command(task, arch, *arguments, options=options)) == MISTAKE
    in_one_line(Path(RECIPES[task].__file__).name, message, places)


def test_what_is_not_for_a_program(command, classifiers, capsys, tmp_path, in_one_line):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("TASK: segment\n")
    assert main_repopt.main(["--cfg", str(recipe)]) == MISTAKE
    in_one_line("main_repopt.py", "TASK segment is not what main_repopt.py does: its TASK is classify", {})
    assert run("segment", command("segment", PLAIN, epochs=1)) == 0
    latest = tmp_path / PLAIN / "segment" / "latest.pth"
    capsys.readouterr()
    assert run("detect", command("detect", PLAIN, "--backbone", latest)) == MISTAKE
    in_one_line("detect.py", "is a checkpoint of TASK 'segment': this training begins with one of detect", {})
    digits = ["--opts", "DATA.DATASET", "digits", "OUTPUT", str(tmp_path)]
    assert quantize.main(["--arch", PLAIN, "--method", "ptq", "--resume", str(latest), *digits]) == MISTAKE
    in_one_line("quantize.py", "data set 'digits'", {})  # the task is that of the checkpoint
    assert main_repopt.main(["--arch", PLAIN, "--eval", "--resume", str(latest), *digits]) == MISTAKE
    in_one_line("main_repopt.py", "is a checkpoint of TASK 'segment', and TASK is classify here", {})
    assert quantize.main(["--cfg", str(recipe), "--arch", PLAIN, "--method", "qat", "--resume", str(latest)]) == MISTAKE
    in_one_line("quantize.py", "the images are 512 x 1024 in training, 96 x 96 in evaluation", {})


def test_every_key_of_a_task_is_read_by_it():
    """No option is dead: each key that is for one task alone stands in its file."""
    files = {task: (ROOT / "train" / "tasks" / f"{task}.py").read_text() for task in DENSE}
    keys = {name: key.tasks[0] for name, key in KEYS.items() if len(key.tasks) == 1}
    for name, task in keys.items():
        assert task == CLASSIFY or f"cfg.{name}" in files[task] or f'"{name}"' in files[task], name
    for name in (name for name, key in KEYS.items() if key.tasks == DENSE and name != "MODEL.PRETRAINED"):
        assert all(f"cfg.{name}" in file for file in files.values()), name


def test_the_first_number_of_a_task_is_its_score():
    found = {
        "classify": Evaluation(3.0, 4.0, 0.5, 6),
        "segment": Segmentation(3.0, 4.0, {"a": 1.0}, 6),
        "detect": Detection(*(3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 6, 9.0)),
    }
    assert found.keys() == COLUMNS.keys() == set(TASKS)
    for task, result in found.items():
        numbers = result.numbers()
        assert result.score == numbers[COLUMNS[task][0].name] == 3.0
        assert all(column.name in numbers for column in COLUMNS[task])


def test_ignored_pixels_are_those_of_the_data():
    assert cityscapes.IGNORED == segmentation.IGNORED


@pytest.mark.parametrize("arch", ["timm/convnext_atto", "timm/mobilenetv3_small_050"])
def test_several_processes_train_networks_of_timm(monkeypatch, arch):
    """One has no buffers; the batch norms of the other hold its activations, which synchronised ones have to keep."""
    monkeypatch.setattr(build, "data_parallel", lambda model, device: model)
    cfg = config.build({"MODEL.ARCH": arch, "DATA.IMG_SIZE": 64, "MODEL.NUM_CLASSES": 3}).cfg
    task = tasks.create(cfg, World(0, 2, torch.device("cpu")))
    model = repopt.create_model(arch, mode="plain", num_classes=3)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    trained = build.distribute(task, model)
    assert trained is model
    assert same(before, dict(model.named_buffers()))
    synchronised = build.convert_sync_batchnorm(repopt.create_model(arch, mode="plain", num_classes=3))
    activations = [sum(isinstance(m, torch.nn.Hardswish) for m in n.modules()) for n in (model, synchronised)]
    assert activations[0] == activations[1]


def test_a_trained_detector_is_read_from_its_checkpoint(
    command, few_scenes, tmp_path, monkeypatch, capsys, in_one_line
):
    assert run("detect", command("detect", PLAIN, epochs=1)) == 0
    latest = tmp_path / PLAIN / "detect" / "latest.pth"
    capsys.readouterr()
    other = command("detect", PLAIN, "--eval", "--resume", latest, options=["DETECT.ANCHOR_SCALE", 8])
    assert run("detect", other) == MISTAKE  # the weights would not tell
    in_one_line("detect.py", "'{latest}' was trained with DETECT.ANCHOR_SCALE 4, and it is 8 now", {"latest": latest})
    argv = ["--cfg", str(ROOT / "configs" / "scenes" / "quantize.yaml"), "--arch", PLAIN, "--resume", str(latest)]
    assert quantize.main([*argv, "--method", "ptq", "--output", str(tmp_path)]) == MISTAKE  # a recipe of another task
    in_one_line(
        "quantize.py", "'{latest}' is a checkpoint of TASK 'detect', and TASK is segment here", {"latest": latest}
    )
    monkeypatch.chdir(tmp_path)  # where no data set is
    network = trained.read(latest).network()
    assert same(network.state_dict(), weights(latest.parent))
    assert not (tmp_path / "output").exists()
