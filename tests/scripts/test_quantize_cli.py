"""scripts/quantize.py and scripts/export.py as a user has them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import export as export_script
import pytest
import quantize as quantize_script
import torch
from PIL import Image

import data
import main_repopt
from repopt import checkpoint, export, quantization
from repopt.errors import UserError
from repopt.openvino import OpenVinoNetwork
from train import config, quantize, tasks, trained
from train.command import EXIT_INTERRUPTED
from train.distributed import World
from train.evaluation.classification import evaluate
from train.precision import Precision

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "configs" / "digits" / "quantize.yaml"
HS, TARGET, REPVGG = (f"RepOpt-VGG-nano-{mode}" for mode in ("hs", "target", "repvgg"))
VNNI = torch.cpu._is_vnni_supported()  # without it OpenVINO is not asked
DIGITS = ["DATA.DATASET", "digits", "DATA.BATCH_SIZE", 60, "TRAIN.BASE_LR", 0.1, "TRAIN.WARMUP_EPOCHS", 1]


def train(output, arch, epochs, *arguments):
    """The checkpoint of a short training."""
    options = (*DIGITS, "TRAIN.EPOCHS", epochs, "TEST.PERIOD", epochs)
    command = ("--arch", arch, "--output", output, *arguments, "--opts", *options)
    assert main_repopt.main([*map(str, command)]) == 0
    return output / arch / "default" / "latest.pth"


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    return tmp_path_factory.mktemp("trained")


@pytest.fixture(scope="module")
def target(output):
    scales = train(output, HS, 2)
    return train(output, TARGET, 30, "--scales-path", scales)


@pytest.fixture(scope="module")
def repvgg(output):
    return train(output, REPVGG, 2)


def main(output, arch, *arguments):
    return quantize_script.main(
        [*map(str, ("--cfg", RECIPE, "--arch", arch, "--output", output, *arguments))],
    )


@pytest.fixture(scope="module")
def ptq(target, tmp_path_factory):
    """The files of a quantized network."""
    output = tmp_path_factory.mktemp("ptq")
    assert main(output, TARGET, "--resume", target, "--method", "ptq") == 0
    return output / TARGET / "ptq-default" / "artifacts"


def int8_of(path):
    """The quantized network in a checkpoint."""
    network = trained.read(path).exported((32, 32)).predictor
    assert isinstance(network, quantization.Int8)
    return network


def accuracy(network):
    """Top-1 in percent on the digits' test images."""
    images = data.Classification(data.Source("digits"), image_size=32, num_classes=10)
    loader = data.eval_loader(images, batch_size=128, device=torch.device("cpu"))
    return evaluate(network, loader, Precision(torch.device("cpu"))).top1


def results(artifacts):
    """Top-1 in percent of fp32, INT8 in torch, and INT8 in onnxruntime and OpenVINO."""
    return [result["top1"] for result in json.loads((artifacts / "results.json").read_text()).values()]


def test_after_training(target, ptq):
    fp32, int8, in_onnxruntime, *in_openvino = results(ptq)
    assert fp32 == pytest.approx(accuracy(trained.read(target).network()))
    assert fp32 > 30  # it has learnt something
    assert int8 == pytest.approx(accuracy(int8_of(ptq / "quantized.pth")))
    assert abs(int8 - fp32) < 5
    assert abs(in_onnxruntime - int8) <= 0.2
    assert in_onnxruntime == pytest.approx(accuracy(export.OnnxNetwork(ptq / "int8.onnx")))
    rows = [line.split(" | ") for line in (ptq / "results.md").read_text().splitlines()[2:]]
    assert [row[0] for row in rows] == ["| fp32", "| INT8", "| INT8, onnxruntime", *["| INT8, OpenVINO"] * VNNI]
    if VNNI:
        assert abs(in_openvino[0] - int8) <= 0.2
        assert in_openvino[0] == pytest.approx(accuracy(OpenVinoNetwork(ptq / "int8.onnx")))
        assert rows[3][-1] == rows[2][-1]  # of the same file
    assert export.operations(ptq / "int8.onnx")["QLinearConv"] == 28
    assert b".py" not in (ptq / "int8.onnx").read_bytes()  # no paths of this machine
    assert (ptq / "int8.onnx").stat().st_size < 0.4 * (ptq / "fp32.onnx").stat().st_size
    assert len(json.loads((ptq / "signal_to_noise.json").read_text())) == 29
    assert (ptq / "signal_to_noise.png").read_bytes().startswith(b"\x89PNG")
    assert not list(ptq.glob("*writing*"))
    log = (ptq.parent / "log_rank0.txt").read_text()
    assert "runs 28 convolutions on integers" in log


def test_where_openvino_is_not_installed_or_cannot_run_the_file_there_is_no_row(ptq, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: True)
    said = []
    monkeypatch.setattr(quantize.logger, "info", said.append)

    def names():
        return [name for name, _ in quantize.in_runtimes(ptq / "int8.onnx", 1)]

    def fails(path, threads):
        raise UserError("an unknown operation")

    assert names() == ["onnxruntime", "OpenVINO"]
    with monkeypatch.context() as patch:
        patch.setattr("repopt.openvino.OpenVinoNetwork", fails)
        assert names() == ["onnxruntime"]
    monkeypatch.setitem(sys.modules, "openvino", None)
    monkeypatch.delitem(sys.modules, "repopt.openvino")
    assert names() == ["onnxruntime"]
    assert said[0] == "not evaluated in OpenVINO: an unknown operation"
    assert "pip install 'repopt[openvino]'" in said[1]


def test_export_of_what_was_quantized(ptq, tmp_path, capsys):
    arguments = ["--resume", ptq / "quantized.pth", "--out", tmp_path, "--formats", "onnx", "safetensors", "pt2"]
    assert export_script.main([*map(str, arguments)]) == 0
    assert (tmp_path / "int8.onnx").read_bytes() == (ptq / "int8.onnx").read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"int8.onnx", "int8.safetensors", "int8.pt2"}
    assert accuracy(export.OnnxNetwork(tmp_path / "int8.onnx")) == pytest.approx(results(ptq)[2])
    assert str(tmp_path / "int8.onnx") in capsys.readouterr().out


def test_export_of_what_was_trained(target, tmp_path):
    """Beside the checkpoint, and of weights alone when told whose they are."""
    assert export_script.main(["--resume", str(target)]) == 0
    fp32 = target.parent / "export" / "fp32.onnx"
    network = trained.read(target).network()
    assert accuracy(export.OnnxNetwork(fp32)) == pytest.approx(accuracy(network), abs=0.1)
    checkpoint.write(network.state_dict(), tmp_path / "weights.pth")
    arguments = ["--resume", tmp_path / "weights.pth", "--arch", TARGET, "--image-size", 32, "--formats", "onnx"]
    assert export_script.main([*map(str, arguments)]) == 0
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(export.OnnxNetwork(tmp_path / "export" / "fp32.onnx")(x), export.OnnxNetwork(fp32)(x))


def test_calibration_and_control(target, ptq, tmp_path):
    """A calibrator, equalization, bias correction and float layers; all of them are in the files."""
    control = ("QUANT.CALIBRATOR", "mse", "QUANT.EQUALIZE", True, "QUANT.BIAS_CORRECTION", True)
    assert (
        main(tmp_path, TARGET, "--resume", target, "--method", "ptq", "--opts", *control, "QUANT.FLOAT_LAYERS", 2) == 0
    )
    artifacts = tmp_path / TARGET / "ptq-default" / "artifacts"
    fp32, int8, *in_runtimes = results(artifacts)
    assert fp32 == results(ptq)[0]
    assert abs(int8 - fp32) < 5
    assert all(abs(found - int8) <= 0.2 for found in in_runtimes)
    runs = export.operations(artifacts / "int8.onnx")
    assert runs["QLinearConv"] == 26
    assert runs["Conv"] + runs["FusedConv"] == 2
    again = trained.read(artifacts / "quantized.pth")
    assert int8 == pytest.approx(accuracy(again.exported((32, 32)).predictor))
    names = again.setting("QUANT.FLOAT_LAYERS")
    assert set(names.split(",")) < set(json.loads((artifacts / "signal_to_noise.json").read_text()))
    log = (artifacts.parent / "log_rank0.txt").read_text()
    assert f"QUANT.FLOAT_LAYERS 2: {names.replace(',', ', ')}" in log


def test_training_on_in_two_processes(repvgg, tmp_path):
    """With layers in float that both choose."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [str(ROOT / "scripts" / "quantize.py"), "--cfg", str(RECIPE), "--arch", REPVGG, "--method", "qat"]
    command += ["--resume", str(repvgg), "--output", str(tmp_path), "--opts", "TRAIN.EPOCHS", "1"]
    command += ["QUANT.FLOAT_LAYERS", "auto"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    folder = tmp_path / REPVGG / "qat-default"
    _, int8, *in_runtimes = results(folder / "artifacts")
    assert all(abs(found - int8) <= 0.2 for found in in_runtimes)
    both = [int8_of(path) for path in (folder / "latest.pth", folder / "artifacts/quantized.pth")]
    x = torch.randn(4, 3, 32, 32)
    assert torch.equal(both[0](x), both[1](x))
    assert int8 == pytest.approx(accuracy(both[0]))
    names = trained.read(folder / "latest.pth").setting("QUANT.FLOAT_LAYERS").split(",")
    assert f"QUANT.FLOAT_LAYERS auto: {', '.join(names)}" in (folder / "log_rank0.txt").read_text()
    convolutions = len([name for name in names if name != "linear"])
    assert export.operations(folder / "artifacts/int8.onnx")["QLinearConv"] == 28 - convolutions < 28


def divergence(logits, of_teacher):
    """Mean over the images of the sum over the classes of q log(q / p), with loops."""
    total = 0.0
    for p, q in zip(logits.double().softmax(1), of_teacher.double().softmax(1), strict=True):
        total += sum(b * (b.log() - a.log()) for a, b in zip(p, q, strict=True))
    return total / len(logits)


def test_the_loss_of_a_distillation():
    """Of what the student has last given in training."""
    world = World(0, 1, torch.device("cpu"))
    student, teacher, x = torch.nn.Linear(4, 3), torch.nn.Linear(4, 3), torch.randn(5, 4)
    task = tasks.create(config.build({"MODEL.ARCH": TARGET, "QUANT.DISTILL": 2.5}).cfg, world)
    with quantize.distillation(task, student, teacher) as loss:
        student.eval()(x)
        logits = student.train()(x)
        student.eval()(2 * x)
        found = loss()
        torch.testing.assert_close(found.double(), 2.5 * divergence(logits, teacher(x)))
        found.backward()
        assert student.weight.grad.abs().max() > 0
        assert teacher.weight.grad is None
        student.train().load_state_dict(teacher.state_dict())
        student(x)
        assert loss().item() == pytest.approx(0, abs=1e-6)
    student(x)
    with pytest.raises(IndexError):  # it is asked no more
        loss()
    plain = tasks.create(config.build({"MODEL.ARCH": TARGET}).cfg, world)
    with quantize.distillation(plain, student, teacher) as loss:
        assert loss is None


def test_a_distilled_network_stays_near_its_float_network(repvgg, tmp_path, monkeypatch):
    def convert(observed):
        raise UserError("it takes seconds")

    divergences = []
    for weight in (0.0, 5.0):
        with monkeypatch.context() as patch:
            patch.setattr(quantization, "convert", convert)
            arguments = ("--resume", repvgg, "--tag", f"distilled{weight}", "--method", "qat", "--opts")
            options = ("TRAIN.EPOCHS", 5, "TRAIN.BASE_LR", 0.1, "TEST.PERIOD", 5, "QUANT.DISTILL", weight)
            assert main(tmp_path, REPVGG, *arguments, *options) == 2
        images = data.Classification(data.Source("digits"), image_size=32, num_classes=10)
        x, _ = next(iter(data.eval_loader(images, batch_size=128, device=torch.device("cpu"))))
        int8 = int8_of(tmp_path / REPVGG / f"distilled{weight}" / "latest.pth")
        with torch.no_grad():
            divergences.append(divergence(int8(x), trained.read(repvgg).network()(x)).item())
    assert divergences[1] < 0.5 * divergences[0]


QAT_OPTIONS = ("TRAIN.EPOCHS", 2, "SAVE_EVERY_STEPS", 3, "TRAIN.CLIP_GRAD", 5.0)


def test_training_on_resumes_as_if_it_never_stopped(target, tmp_path, monkeypatch, stopping, capsys):
    def convert(observed):
        raise UserError("it takes 15 seconds")

    monkeypatch.setattr(quantization, "convert", convert)

    def training(tag):
        arguments = ("--resume", target, "--tag", tag, "--method", "qat")
        code = main(tmp_path, TARGET, *arguments, "--opts", *QAT_OPTIONS)
        return code, checkpoint.read(tmp_path / TARGET / tag / "latest.pth")

    _, whole = training("whole")
    with stopping():
        code, part = training("part")
    assert code == EXIT_INTERRUPTED
    assert part["seen"]
    code, part = training("part")
    assert "15 seconds" in capsys.readouterr().err
    assert part["epoch"] == 1
    for name, value in whole["model"].items():
        assert torch.equal(value, part["model"][name]), name
    assert "scales" in part
    other = tmp_path / "other.pth"
    other.write_bytes(target.read_bytes())
    assert main(tmp_path, TARGET, "--resume", other, "--tag", "part", "--method", "qat", "--opts", *QAT_OPTIONS) == 2
    assert f"began with {str(target)!r}, not with {str(other)!r}" in capsys.readouterr().err
    assert not (tmp_path / TARGET / "part" / "artifacts").exists()


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """A folder with test images of ten classes, and none to train or calibrate with."""
    root = tmp_path_factory.mktemp("photographs")
    for label in range(10):
        folder = root / "val" / str(label)
        folder.mkdir(parents=True)
        Image.new("RGB", (32, 32), (20 * label, 0, 0)).save(folder / "0.png")
    return root


QAT = ["--arch", TARGET, "--method", "qat", "--resume", "{target}"]
PTQ = ["--arch", TARGET, "--method", "ptq", "--resume", "{target}"]
FOLDER = ["--data-path", "{photographs}", "--opts", "DATA.DATASET", "folder", "DATA.IMG_SIZE", 32]
MISTAKES = {
    "no method": (["--arch", TARGET, "--resume", "{target}"], "--method ptq .*, qat .* or compare"),
    "method": (["--arch", TARGET, "--resume", "{target}", "--method", "pqt"], "unknown value of QUANT.METHOD 'pqt'"),
    "preset": ([*PTQ, "--preset", "fbgem"], "did you mean 'fbgemm'"),
    "calibrator": ([*PTQ, "--opts", "QUANT.CALIBRATOR", "entropie"], "did you mean 'entropy'"),
    "calibrator of qat": ([*QAT, "--opts", "QUANT.CALIBRATOR", "mse"], "QUANT.CALIBRATOR mse is not of --method qat"),
    "equalization": ([*QAT, "--opts", "QUANT.EQUALIZE", True], "QUANT.EQUALIZE True is not of --method qat"),
    "distillation": ([*PTQ, "--opts", "QUANT.DISTILL", 0.5], "QUANT.DISTILL 0.5 is not of --method ptq"),
    "float layer": (
        [*PTQ, "--opts", "QUANT.FLOAT_LAYERS", "stage3.4.cnv"],
        "unknown layer 'stage3.4.cnv'; did you mean 'stage3.4.conv'",
    ),
    "float layers": ([*PTQ, "--opts", "QUANT.FLOAT_LAYERS", 99], "is 99, and the network has 29 layers"),
    "no checkpoint": (["--arch", TARGET, "--method", "ptq"], "--resume FILE"),
    "no such checkpoint": (["--arch", TARGET, "--method", "ptq", "--resume", "{tmp}/a"], "no file '{tmp}/a'"),
    "another arch": (
        ["--arch", REPVGG, "--method", "ptq", "--resume", "{target}"],
        "of 'RepOpt-VGG-nano-target', whose layers are not those of RepOpt-VGG-nano-repvgg",
    ),
    "quantized already": (["--arch", TARGET, "--method", "ptq", "--resume", "{int8}"], "holds a quantized network"),
    "no training images": ([*PTQ, *FOLDER], "{photographs}"),
    "no scales": (["--arch", TARGET, "--method", "qat", "--resume", "{weights}"], "needs searched scales"),
    "moving average": ([*QAT, "--opts", "TRAIN.EMA_ALPHA", 0.1], "takes TRAIN.EMA_ALPHA 0.0 only"),
    "compiled": ([*QAT, "--opts", "TRAIN.COMPILE", "default"], "takes TRAIN.COMPILE off only"),
    "one image": ([*QAT, "--batch-size", 1], "a batch norm would see one value per channel"),
    "autocast": ([*QAT, "--amp-opt-level", "O1"], "takes AMP_OPT_LEVEL O0 only"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_line_and_exit_code_2(name, target, ptq, photographs, tmp_path, in_one_line):
    weights = tmp_path / "weights.pth"
    checkpoint.write(trained.read(target).network().state_dict(), weights)
    places = {"tmp": tmp_path, "target": target, "int8": ptq / "quantized.pth", "photographs": photographs}
    places["weights"] = weights
    arguments, message = MISTAKES[name]
    arguments = [str(argument).format(**places) for argument in arguments]
    assert quantize_script.main(["--cfg", str(RECIPE), "--output", str(tmp_path / "out"), *arguments]) == 2
    in_one_line("quantize.py", message, places)


def test_a_failed_check_leaves_nothing(target, tmp_path, monkeypatch, capsys):
    def fails(*arguments):
        raise UserError("other outputs")

    monkeypatch.setattr(export, "write_onnx", fails)
    assert main(tmp_path, TARGET, "--resume", target, "--method", "ptq") == 2
    assert "other outputs" in capsys.readouterr().err
    assert not list((tmp_path / TARGET / "ptq-default").glob("artifacts*"))


def test_sizes_of_training_and_evaluation_that_differ(target, photographs, tmp_path, capsys):
    (tmp_path / "train").symlink_to(photographs / "val")
    (tmp_path / "val").symlink_to(photographs / "val")
    sizes = ("--opts", "DATA.DATASET", "folder", "DATA.IMG_SIZE", 32, "DATA.TEST_SIZE", 64)
    arguments = ("--resume", target, "--method", "qat", "--data-path", tmp_path, *sizes)
    assert main(tmp_path / "out", TARGET, *arguments) == 2
    assert "trains and evaluates at one size" in capsys.readouterr().err


def test_nothing_is_written_over(target, ptq, capsys):
    before = {path: path.read_bytes() for path in ptq.iterdir()}
    assert main(ptq.parents[2], TARGET, "--resume", target, "--method", "ptq") == 2
    assert f"{str(ptq)!r} exists" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in ptq.iterdir()} == before


def test_a_training_does_not_go_on_from_a_quantized_network(ptq, tmp_path, capsys):
    arguments = ("--arch", TARGET, "--output", tmp_path, "--resume", ptq / "quantized.pth", "--opts", *DIGITS)
    assert main_repopt.main([*map(str, arguments)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert main_repopt.main([*map(str, arguments), "QUANT.METHOD", "ptq"]) == 2
    assert "is for scripts/quantize.py" in capsys.readouterr().err


EXPORT_MISTAKES = {
    "no file": (["--resume", "{tmp}/a"], "no file '{tmp}/a'"),
    "whose": (["--resume", "{weights}"], "give --arch"),
    "arch": (["--resume", "{weights}", "--arch", "RepOpt-VGG-nano-traget"], "did you mean 'RepOpt-VGG-nano-target'"),
    "another arch": (["--resume", "{target}", "--arch", REPVGG], "not of RepOpt-VGG-nano-repvgg"),
    "other weights": (["--resume", "{weights}", "--arch", REPVGG], "weights are not those of this model"),
    "exists": (["--resume", "{target}", "--out", "{full}"], "'{full}/fp32.onnx' exists"),
    "size": (["--resume", "{int8}", "--image-size", "64"], "quantized for 32 x 32, not for 64 x 64"),
    "one side": (["--resume", "{int8}", "--image-size", "32", "64"], "quantized for 32 x 32, not for 32 x 64"),
    "three sides": (
        ["--resume", "{weights}", "--arch", TARGET, "--image-size", "32", "64", "3"],
        "--image-size 32 64 3: a height and a width, or one number for both, are expected",
    ),
    "compiled": (["--resume", "{int8}", "--formats", "compiled"], "in float: export it as onnx"),
}


def test_export_for_images_that_are_no_squares(target, tmp_path):
    arguments = ["--resume", target, "--out", tmp_path, "--formats", "onnx", "--image-size", 32, 64]
    assert export_script.main([*map(str, arguments)]) == 0
    network = export.OnnxNetwork(tmp_path / "fp32.onnx")
    x = torch.randn(2, 3, 32, 64)
    torch.testing.assert_close(network(x), trained.read(target).network()(x), rtol=1e-3, atol=1e-3)
    with pytest.raises(Exception, match="Expected: 32"):
        network(x.transpose(2, 3))


@pytest.mark.parametrize("name", EXPORT_MISTAKES)
def test_mistakes_of_exporting(name, target, ptq, tmp_path, in_one_line):
    weights, full = tmp_path / "weights.pth", tmp_path / "full"
    checkpoint.write(trained.read(target).network().state_dict(), weights)
    full.mkdir()
    (full / "fp32.onnx").write_text("mine")
    places = {"tmp": tmp_path, "target": target, "int8": ptq / "quantized.pth", "weights": weights, "full": full}
    arguments, message = EXPORT_MISTAKES[name]
    assert export_script.main([argument.format(**places) for argument in arguments]) == 2
    in_one_line("export.py", message, places)
    assert (full / "fp32.onnx").read_text() == "mine"
