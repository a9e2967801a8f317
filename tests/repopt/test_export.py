"""ONNX files say what their axes and outputs are, of networks with one output and with several."""

import pytest
import torch
from test_convert import trained_norms
from torch import nn

import repopt
from repopt import UserError

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


def test_difference_of_outputs():
    own = {"a": torch.tensor([3.0, 4.0]), "b": torch.zeros(2)}
    assert export.relative_difference(dict(reversed(own.items())), own) == 0
    assert export.relative_difference(own | {"a": torch.tensor([3.0, 4.5])}, own) == pytest.approx(0.1)
    for wrong in (torch.ones(2), torch.full((2,), torch.nan)):
        assert not export.relative_difference(own | {"b": wrong}, own) <= 1
    assert not export.relative_difference(torch.tensor([torch.nan, 4.0]), own["a"]) <= 1


def test_no_network_of_images_is_one_line(tmp_path):
    class Vectors(nn.Module):
        def forward(self, x):
            return x * 2

    program = torch.onnx.export(Vectors(), (torch.zeros(2, 3),), dynamo=True, verbose=False)
    program.save(tmp_path / "a.onnx")
    with pytest.raises(UserError, match="takes something else than images"):
        export.OnnxNetwork(tmp_path / "a.onnx")
