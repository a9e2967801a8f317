"""Detectors whose predictor has another form: quantized, in a file, and with non-maximum suppression in it."""

import copy

import pytest
import torch
from model_helpers import with_statistics
from test_detection import batch, detector, searched, train
from torch import nn
from torchvision.ops import batched_nms

import repopt
from repopt import export, quantization
from repopt.detection import FCOS, HEADS, DetectorOn, EndToEnd, EndToEndDetector
from repopt.detection.end_to_end import difference_of_objects
from repopt.errors import UserError
from repopt.nms import suppressed
from repopt.quantization import flow

SIZE = (96, 96)


def trained(**arguments):
    """A detector in eval mode whose batch norms have seen data."""
    model = detector(**arguments)
    model.transform.size = SIZE
    return with_statistics(model, lambda: model(*batch())).eval()


def predictor_input(model):
    images, _ = batch(dtype=next(model.parameters()).dtype)
    return model.eval().transform(images)[0].tensors


def quantized(model, method="ptq"):
    """A float32 detector's predictor, prepared and INT8."""
    x = predictor_input(model)
    prepared = quantization.prepare(model.predictor, x, method, "default")
    quantization.calibrate(prepared, [x])
    return prepared, quantization.convert(prepared)


def assert_same(one, other, **tolerance):
    assert len(one) == len(other) > 0
    for a, b in zip(one, other, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            torch.testing.assert_close(a[name], b[name], msg=name, **tolerance)


@pytest.mark.parametrize("head", HEADS)
def test_on_its_own_predictor_it_is_the_detector(head):
    """Losses, objects and the names of what is trained."""
    model = trained(head=head, neck="declared")
    on = DetectorOn(model, copy.deepcopy(model.predictor), model.transform).eval()
    images, targets = batch()
    with torch.no_grad():
        assert_same(on(images), model(images), rtol=0, atol=0)
        assert on.masks == model.masks
        losses = []
        for form in (on.train(), model.train()):
            torch.manual_seed(0)  # of the boxes that are sampled
            losses.append(form(images, targets))
    assert losses[0] == losses[1]
    assert dict(on.wrapped_module.named_parameters()).keys() == dict(model.named_parameters()).keys()
    assert sum(p.numel() for p in on.parameters()) == sum(p.numel() for p in model.parameters())
    own = {id(p) for p in model.parameters()} - {id(p) for p in model.predictor.parameters()}
    assert own == {id(p) for p in on.detector.parameters()}  # what trains in one is trained in the other


def test_making_one_leaves_a_detector_in_eval_mode():
    model = trained()
    DetectorOn(model, model.predictor, model.transform)
    assert not any(module.training for module in model.modules())
    assert model.train().predictor.training


def test_images_that_do_not_fit_are_one_line():
    model = trained(head=FCOS)
    model.transform.size = (64, 96)
    with pytest.raises(UserError, match="images of 96 x 96 are larger than 64 x 96"):
        model(batch()[0])


@pytest.mark.parametrize("head", ["mask", FCOS])
def test_without_rounding_training_for_int8_is_the_float_training(head):
    """Under a RepOptimizer, of everything: what is quantized and what is not."""
    arguments = {"head": head, "neck": "declared"}
    model, scales = detector(**arguments).float(), {n: v.float() for n, v in searched(**arguments).items()}
    model.transform.size = SIZE
    prepared = quantization.prepare(model.predictor, predictor_input(model), "qat", "default")
    prepared.network.apply(flow.pt2e.disable_fake_quant)
    on = DetectorOn(copy.deepcopy(model), prepared, model.transform)
    before = {name: value.clone() for name, value in model.named_parameters()}
    images, targets = batch(dtype=torch.float32)
    for form in (model.train(), on.train()):
        optimizer = repopt.build_optimizer("sgd", form, scales, lr=0.01, momentum=0.9, weight_decay=1e-3)
        assert isinstance(optimizer, repopt.RepOptimizer)
        train(form, optimizer, steps=1, of=(images, targets))
    after = dict(on.wrapped_module.named_parameters())
    for name, value in model.named_parameters():
        moved = (value - before[name]).norm()
        assert moved > 0 or head == FCOS, name  # of which not all levels have an object
        assert (value - after[name]).norm() <= 0.05 * moved + 1e-7, name  # rounding, through all layers and back


def test_two_stages_in_integers_are_near_the_float_ones(tmp_path):
    """The head that all levels share has ranges and biases for each; what is read again is what was written."""
    model = repopt.deploy(trained(neck="declared", channels=32).float())
    x = predictor_input(model)
    prepared, int8 = quantized(model)
    paths = quantization.signal_to_noise(prepared, int8, x)
    assert {f"rpn.head.conv.0.0{use}" for use in ("", "@1", "@2", "@3", "@4")} <= paths.keys()
    assert min(paths.values()) > 15
    with torch.no_grad():
        assert 0 < export.relative_difference(int8(x), model.predictor(x)) < 0.3
    export.write_onnx(int8, x, tmp_path / "int8.onnx")
    kernels = [module.kernel_size for module in model.modules() if isinstance(module, nn.Conv2d)].count((3, 3))
    of_masks, laterals, more_levels = 4, 4, 4
    integers = kernels - of_masks + laterals + more_levels
    assert export.operations(tmp_path / "int8.onnx")["QLinearConv"] == integers
    corrected = quantization.correct_biases(prepared, [x])
    again = quantization.prepare(model.predictor, x, "ptq", "default")
    quantization.load(again, corrected.state_dict())
    with torch.no_grad():
        assert export.relative_difference(quantization.convert(again)(x), quantization.convert(corrected)(x)) == 0


def test_fcos_in_integers(tmp_path):
    """Every convolution that another one reads is rounded; raw predictions are not."""
    model = repopt.deploy(trained(head=FCOS, channels=32).float())
    x = predictor_input(model)
    _, int8 = quantized(model)
    with torch.no_grad():
        raw, expected = int8(x), model.predictor(x)
    assert raw.keys() == expected.keys()
    assert 0 < export.relative_difference(raw, expected) < 0.3
    export.write_onnx(int8, x, tmp_path / "int8.onnx")
    assert export.OnnxNetwork(tmp_path / "int8.onnx").output_names == tuple(expected)
    kernels = [module.kernel_size for module in model.modules() if isinstance(module, nn.Conv2d)]
    laterals = 3
    assert export.operations(tmp_path / "int8.onnx")["QLinearConv"] == kernels.count((3, 3)) + laterals


def test_end_to_end_is_what_the_detector_finds():
    """Of boxes inside the image, which are not clipped."""
    model = trained(head=FCOS)
    for head in model.head.values():  # half a box's sides are 0.3 of a place's, more or less
        nn.init.normal_(head.regression_head.bbox_reg.weight, std=1e-3)
        nn.init.constant_(head.regression_head.bbox_reg.bias, 0.3)
    model.nms_thresh = 0.01
    network = EndToEnd(model, model.predictor, SIZE).double()
    images, _ = batch()
    with torch.no_grad():
        found, expected = EndToEndDetector(network, model.transform)(images), model(images)
    assert_same(found, expected, rtol=1e-9, atol=1e-9)
    assert min(len(of_image["scores"]) for of_image in found) > 20


@pytest.mark.parametrize("integers", [False, True])
def test_end_to_end_in_a_file(integers, tmp_path):
    """It finds what torch makes of the predictor's file, in any number of images."""
    model = repopt.deploy(trained(head=FCOS).float())
    x = predictor_input(model)
    predictor = quantized(model)[1] if integers else model.predictor
    network = EndToEnd(model, predictor, SIZE)
    assert export.write_end_to_end(network, x, tmp_path / "objects.onnx") < 1e-3
    export.write_onnx(predictor, x, tmp_path / "raw.onnx")
    in_file = export.OnnxNetwork(tmp_path / "objects.onnx")
    assert in_file.output_names == ("boxes", "scores", "labels")
    images = torch.cat([x, x.flip(3)])[:3]
    with torch.no_grad():
        expected = network.on(export.OnnxNetwork(tmp_path / "raw.onnx"))(images)
        found = in_file(images)
    assert found["boxes"].shape == (3, 100, 4)
    assert (found["scores"] > 0.05).sum() > 30
    assert difference_of_objects(found, expected) < 1e-3
    assert (tmp_path / "objects.onnx").stat().st_size < 1.2 * (tmp_path / "raw.onnx").stat().st_size + 50_000


def test_suppression_is_torchvisions():
    torch.manual_seed(0)
    corners = torch.rand(2, 200, 2) * 60
    boxes, scores = torch.cat([corners, corners + 20], 2), torch.rand(2, 3, 200)
    kept = suppressed(boxes, scores, 0.5, 0.4)
    for number in range(2):
        labels, places = (scores[number] > 0.4).nonzero(as_tuple=True)
        best = batched_nms(boxes[number, places], scores[number, labels, places], labels, 0.5)
        expected = torch.zeros(3, 200)
        expected[labels[best], places[best]] = scores[number, labels[best], places[best]]
        assert torch.equal(kept[number], expected)
    assert 0 < (kept > 0).sum() < (scores > 0.4).sum()
    shifted = suppressed(boxes - 40, scores, 0.5, 0.4)  # beyond the image
    assert torch.equal(shifted, kept)
    torch.library.opcheck(suppressed, (boxes, scores, 0.5, 0.4))


def objects(scores, labels, left):
    corners = torch.tensor(left, dtype=torch.float32)[None, :, None].expand(1, -1, 2)
    return {
        "boxes": torch.cat([corners, corners + 10], 2),
        "scores": torch.tensor([scores]),
        "labels": torch.tensor([labels]),
    }


def test_objects_are_compared_one_by_one():
    own = objects([0.9, 0.5, 0.5, 0.1], [1, 2, 3, 1], [0, 20, 40, 60])
    assert difference_of_objects(own, own) == 0
    assert difference_of_objects(objects([0.9, 0.5, 0.5, 0.1], [1, 3, 2, 1], [0, 40, 20, 60]), own) == 0  # as likely
    assert difference_of_objects(objects([0.9, 0.5, 0.5, 0.1], [1, 2, 3, 1], [0, 20, 40, 80]), own) == 0  # the last one
    for other in (
        objects([0.9, 0.5, 0.5, 0.1], [2, 2, 3, 1], [0, 20, 40, 60]),  # a label
        objects([0.9, 0.5, 0.5, 0.1], [1, 2, 3, 1], [1, 20, 40, 60]),  # a box
        objects([0.8, 0.5, 0.5, 0.1], [1, 2, 3, 1], [0, 20, 40, 60]),  # a score
        objects([0.5, 0.5, 0.1, 0.0], [2, 3, 1, 1], [20, 40, 60, 0]),  # an object
    ):
        assert difference_of_objects(other, own) > 0.1
    nothing = objects([0.0], [1], [0])
    assert difference_of_objects(nothing, nothing) == 0
