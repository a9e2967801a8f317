"""`benchmark.py infer` measures the forms that it names, and they are the same function."""

import argparse
import sys
import warnings

import benchmark
import pytest
import torch
from torch import nn

import repopt
from benchmarks import infer

CPU = torch.device("cpu")
TARGET = ["target, trained", "target, deployed", "target, deployed, compiled"]
ONNXRUNTIME = ["target, onnxruntime", "target, onnxruntime INT8"]
OPENVINO = ["target, OpenVINO", "target, OpenVINO INT8"]


def measured(*arguments):
    """The rows of a run."""
    parser = argparse.ArgumentParser()
    infer.add_arguments(parser)
    parsed = parser.parse_args([*arguments, "--batch-size", "2", "--image-size", "32", "--rounds", "2"])
    return dict(infer.run(parsed, CPU))["Inference, batches of 2 images of 32 x 32"]


@pytest.fixture
def compiled(monkeypatch):
    """Models that were given to torch.compile, which is not called: that takes long."""
    given = []
    monkeypatch.setattr(torch, "compile", lambda model: given.append(model) or model)
    return given


@pytest.fixture
def no_extra(monkeypatch):
    """As where torchao is not installed, and nothing that needs it is imported yet."""
    for module in ("torchao.quantization", "torchao.quantization.pt2e.quantize_pt2e"):
        monkeypatch.setitem(sys.modules, module, None)
    for name in ("quantization", "export"):
        monkeypatch.delattr(repopt, name, raising=False)
        for module in [m for m in sys.modules if m.startswith(f"repopt.{name}")]:
            monkeypatch.delitem(sys.modules, module)


@pytest.mark.skipif(not torch.cpu._is_vnni_supported(), reason="OpenVINO's integers need VNNI")
def test_every_form_is_a_row_and_the_same_function_as_its_source(compiled):
    rows = measured("--arch", "RepOpt-VGG-nano")
    assert [row["form"] for row in rows] == [*TARGET, *ONNXRUNTIME, *OPENVINO, "repvgg, trained", "repvgg, deployed"]
    speeds = {row["form"]: row["images/s"] for row in rows}
    for row in rows:
        if row["form"].endswith("trained"):
            assert row["difference of outputs"] is None
        elif row["form"].endswith("INT8"):
            assert 1e-3 < row["difference of outputs"] < 1
        else:
            assert 0 < row["difference of outputs"] < 1e-3
        trained = next(r for r in rows if r["arch"] == row["arch"] and r["form"] == "target, trained")
        assert row["speed / trained target"] == pytest.approx(row["images/s"] / trained["images/s"])
        assert row["ms per image"] == pytest.approx(1e3 / row["images/s"])
        if row["form"] in ONNXRUNTIME + OPENVINO:
            assert row["peak extra MB per image"] is None
            assert row["speed / onnxruntime fp32"] == pytest.approx(row["images/s"] / speeds["target, onnxruntime"])
        else:
            assert row["peak extra MB per image"] > 0
            assert row["speed / onnxruntime fp32"] is None
    int8 = {row["form"]: row for row in rows if row["integer convolutions"] is not None}
    assert {form: row["integer convolutions"] for form, row in int8.items()} == {
        ONNXRUNTIME[1]: "28 of 28",
        OPENVINO[1]: "28 of 28",
    }
    for fp32, form in (ONNXRUNTIME, OPENVINO):
        assert int8[form]["INT8 / fp32"] == pytest.approx(speeds[form] / speeds[fp32])
    assert [row["form"] for row in rows if row["INT8 / fp32"] is not None] == [*int8]
    assert len(compiled) == 1
    assert not any(isinstance(module, nn.BatchNorm2d) for model in compiled for module in model.modules())


def test_batch_norms_are_not_trivial():
    images = torch.randn(2, 3, 32, 32)
    model = infer.as_if_trained(repopt.create_model("RepOpt-VGG-nano", mode="target"), images)
    assert not model.training
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert all(norm.running_mean.abs().max() > 0 and norm.weight.std() > 0 for norm in norms)
    deployed = repopt.deploy(model)
    with torch.no_grad():
        outputs = model(images)
        assert infer.difference(deployed(images), outputs) < 1e-3
        next(module for module in deployed.modules() if isinstance(module, nn.Conv2d)).bias.zero_()
        assert infer.difference(deployed(images), outputs) > 1e-2


def test_small_differences_stay_small():
    images = torch.randn(8, 3, 32, 32)
    model = infer.as_if_trained(repopt.create_model("RepOpt-VGG-nano", mode="target"), images)
    with torch.no_grad():
        outputs = model(images)
        assert 0 < infer.difference(model(images + 1e-3 * torch.randn_like(images)), outputs) < 0.03


def test_where_nothing_compiles_the_row_is_left_out(monkeypatch):
    def fails(model):
        return lambda images: torch._check(False, lambda: "no compiler")

    monkeypatch.setattr(torch, "compile", fails)
    monkeypatch.setattr(infer, "in_runtimes", lambda name, model, images: [])
    with pytest.warns(UserWarning, match="RepOpt-VGG-nano: not compiled.*no compiler"):
        rows = measured("--arch", "RepOpt-VGG-nano")
    assert len(rows) == 4 and not any("compiled" in row["form"] for row in rows)


def test_without_the_extra_rows_of_onnx_files_are_left_out_and_it_is_said_once(compiled, no_extra):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("default")
        rows = measured("--arch", "RepOpt-VGG-nano", "ghost")
    assert [(row["arch"], row["form"]) for row in rows] == [
        (arch, form)
        for arch, baseline in (("RepOpt-VGG-nano", "repvgg"), ("ghost", "rep"))
        for form in (*TARGET, f"{baseline}, trained", f"{baseline}, deployed")
    ]
    assert {row["speed / onnxruntime fp32"] for row in rows} == {row["integer convolutions"] for row in rows} == {None}
    (message,) = [str(warning.message) for warning in seen if "left out" in str(warning.message)]
    assert message.startswith("rows of onnxruntime and OpenVINO are left out: quantization needs torchao")


def test_without_openvino_its_rows_are_left_out_and_it_is_said_once(compiled, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    monkeypatch.delitem(sys.modules, "repopt.openvino", raising=False)
    monkeypatch.setattr(infer, "write_files", lambda *arguments: None)
    monkeypatch.setattr(infer, "in_onnxruntime", lambda *files: infer.InRuntime(nn.Flatten(), nn.Flatten(), 0))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("default")
        for _ in range(2):
            found = [name for name, _ in infer.in_runtimes("RepOpt-VGG-nano", nn.Flatten(), torch.zeros(1, 3, 8, 8))]
            assert found == ["onnxruntime"]
    (message,) = [str(warning.message) for warning in seen]
    assert message.startswith("rows of OpenVINO are left out: OpenVINO is not installed (pip install")


def test_a_network_that_onnxruntime_computes_otherwise_is_named(compiled, monkeypatch):
    from repopt import export

    monkeypatch.setattr(export, "MAX_DIFFERENCE_INT8", -1.0)
    with pytest.warns(
        UserWarning, match="rows of onnxruntime and OpenVINO .* differ .*RepOpt-VGG-nano-int8.onnx is not written"
    ):
        rows = measured("--arch", "RepOpt-VGG-nano")
    assert len(rows) == 5 and not any(row["form"] in ONNXRUNTIME + OPENVINO for row in rows)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arch", "RepOpt-VGG-nona"], "unknown model 'RepOpt-VGG-nona'; did you mean 'RepOpt-VGG-nano'"),
        (["--device", "gpu"], "--device gpu: "),
        (["--rounds", "0"], "argument --rounds: '0' is not a whole number from 1 on"),
    ],
)
def test_mistakes_are_one_line(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["benchmark.py", "infer", *arguments])
    try:
        assert benchmark.main() == 2
    except SystemExit as end:  # argparse's way
        assert end.code == 2
    assert message in capsys.readouterr().err
