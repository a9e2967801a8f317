"""ONNX files say what their axes and outputs are, of networks with one output and with several."""

import pytest
import torch
from test_convert import trained_norms

import repopt

onnx = pytest.importorskip("onnx")
export = pytest.importorskip("repopt.export", exc_type=repopt.UserError)


def network(features=None):
    torch.manual_seed(0)
    model = trained_norms(repopt.create_model("RepOpt-VGG-nano", mode="target", num_classes=3))
    return repopt.deploy(model if features is None else model.to_features(features))


def axes(path):
    graph = onnx.load(path).graph
    return {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.output)
    }


def test_a_classifier(tmp_path):
    export.write_onnx(network(), torch.randn(4, 3, 64, 64), tmp_path / "a.onnx")
    assert axes(tmp_path / "a.onnx") == {"images": ["batch", 3, 64, 64], "logits": ["batch", 3]}


def test_features(tmp_path):
    model = network([1, 3])
    export.write_onnx(model, torch.randn(4, 3, 64, 64), tmp_path / "a.onnx")
    assert axes(tmp_path / "a.onnx") == {
        "images": ["batch", 3, 64, 64],
        "features_0": ["batch", 16, 16, 16],
        "features_1": ["batch", 64, 4, 4],
    }
    images = torch.randn(2, 3, 64, 64)  # another number of them
    for found, expected in zip(export.OnnxNetwork(tmp_path / "a.onnx")(images).values(), model(images), strict=True):
        assert expected.std() > 0.01
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
