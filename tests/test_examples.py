"""The examples are complete, short, and run."""

import importlib.util
from pathlib import Path

import pytest
import timm
import torch

import repopt

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
FILES = sorted(EXAMPLES.glob("*.py"))
TRAINERS = {"ultralytics_repopt"}  # of frameworks, which examples/test_ultralytics.py runs


def main_of(name):
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_they_are_short(path):
    assert len(path.read_text().splitlines()) < (240 if path.stem in TRAINERS else 72)


def test_every_example_is_run_here():
    assert {path.stem for path in FILES} - TRAINERS == {
        "convert",
        "finetune_timm",
        "int8",
        "own_loop",
        "super_resolution",
    }


def test_own_loop():
    assert main_of("own_loop")(epochs=5) > 0.8


def test_super_resolution(tmp_path):
    assert main_of("super_resolution")(steps=10, dtype=torch.float64)["apart"] < 1e-12
    picture = tmp_path / "parts.png"
    assert main_of("super_resolution")(steps=1, picture=str(picture)).keys() == {"bicubic", "network"}
    assert picture.stat().st_size > 10_000


def test_convert():
    convolutions, loss = main_of("convert")()
    folded = timm.utils.reparameterize_model(timm.create_model("repghostnet_050").eval())
    assert convolutions == sum(isinstance(module, torch.nn.Conv2d) for module in folded.modules())
    assert loss < 2


def test_finetune_timm(tmp_path):
    weights = repopt.create_model("RepOpt-VGG-nano", mode="target", num_classes=1000).state_dict()
    torch.save({"model": weights}, tmp_path / "weights.pth")
    assert main_of("finetune_timm")(str(tmp_path / "weights.pth")) > 0


def test_int8(tmp_path):
    pytest.importorskip("torchao")
    noise, convolutions = main_of("int8")(str(tmp_path / "int8.onnx"))
    assert noise > 5
    assert convolutions == 28
    assert (tmp_path / "int8.onnx").is_file()
