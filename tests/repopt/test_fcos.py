"""FCOS on our backbones: the equivalence in it, its parts beside torchvision's, and what is to become integers."""

import copy

import pytest
import torch
from model_helpers import with_statistics
from test_detection import SGD, assert_target_follows, batch, csla_and_target, detector, differences, searched, train
from torch import nn
from torchvision.models.detection import fcos

import repopt
from repopt import export
from repopt.detection import BODY, FCOS

ADAMW = {"lr": 1e-3, "weight_decay": 1e-2, "eps": 1e-30}
PYRAMID = {f"backbone.fpn.layer_blocks.{level}" for level in range(3)} | {
    f"backbone.{part}.{level}" for part in ("halving", "merged") for level in "23"
}
HEADS = {
    f"head.{level}.{end}_head.conv.{layer}"
    for level in "123"
    for end in ("classification", "regression")
    for layer in range(2)
}
LARGE = {"sizes": (288,), "max_size": 288}  # to which images of 96 px are enlarged


def images_and_targets():
    """Images with an object for each of the levels at `LARGE`."""
    images, _ = batch()
    boxes = [[70.0, 4.0, 82.0, 14.0], [10.0, 10.0, 67.0, 67.0], [1.0, 1.0, 95.0, 95.0]]
    target = {"boxes": torch.tensor(boxes, dtype=torch.float64), "labels": torch.tensor([1, 3, 2])}
    return images, [target] * 2


def trained_a_little(model):
    """A detector in eval mode whose batch norms have seen data."""
    return with_statistics(model, lambda: model(*images_and_targets())).eval()


def assert_found(one, other, **tolerance):
    for a, b in zip(one, other, strict=True):
        assert len(a["boxes"]) > 10
        assert a.keys() == b.keys() == {"boxes", "labels", "scores"}
        for key in a:
            torch.testing.assert_close(a[key], b[key], msg=key, **tolerance)


@pytest.mark.parametrize(("rule", "settings"), [("sgd", SGD), ("adamw", ADAMW)])
def test_target_follows_csla(rule, settings):
    scales = searched(head=FCOS)
    csla, target = csla_and_target(scales, FCOS, **LARGE)
    assert_target_follows(csla, target, scales, rule, settings, steps=3, of=images_and_targets())


def test_without_the_multipliers_it_does_not():
    csla, target = csla_and_target(searched(head=FCOS), FCOS)
    for model in (csla, target):
        train(model, repopt.build_optimizer("sgd", model, **SGD))
    assert max(differences(csla, target).values()) > 1e-3


def test_every_3x3_convolution_is_a_declared_block():
    model = detector(head=FCOS)
    blocks = {path for path, _ in repopt.declared_blocks(model)}
    assert {path for path in blocks if not path.startswith(BODY)} == PYRAMID | HEADS
    kernels = {path: module.kernel_size for path, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    assert {size for path, size in kernels.items() if path.removesuffix(".conv") in blocks} == {(3, 3)}
    assert {size for path, size in kernels.items() if path.removesuffix(".conv") not in blocks} == {(1, 1)}


def test_scales_have_the_same_names_in_every_mode():
    names = repopt.extract_scales(detector(head=FCOS, mode="hs")).keys()
    assert {name for name in detector(head=FCOS, mode="csla").state_dict() if "scale_" in name} >= names
    mults = repopt.grad_mults(detector(head=FCOS), searched(head=FCOS), degree=1)
    assert {name.rpartition(".scale")[0] for name in names} == {name.removesuffix(".conv.weight") for name in mults}


@pytest.mark.parametrize("mode", ["target", "repvgg"])
def test_deployed_detector_finds_the_same(mode):
    model = trained_a_little(detector(head=FCOS, mode=mode, **LARGE))
    deployed = repopt.deploy(model)
    assert not any(isinstance(m, nn.BatchNorm2d | repopt.RepConv2d) for m in deployed.modules())
    images, _ = images_and_targets()
    assert_found(model(images), deployed(images), rtol=1e-6, atol=1e-8)


def test_detections_are_those_of_the_raw_predictions():
    """Of images of two sizes; whatever else predicts as the predictor does may take its place."""
    model = trained_a_little(detector(head=FCOS))
    images = [torch.rand(3, 96, 72, dtype=torch.float64), torch.rand(3, 64, 96, dtype=torch.float64)]
    sizes = [(96, 72), (64, 96)]
    batch, _ = model.transform(images)
    found = model(images)
    assert_found(found, model.detections(model.predictor(batch.tensors), batch, sizes), rtol=0, atol=0)
    other = copy.deepcopy(model)
    other.backbone, other.head = model.predictor, nn.Identity()
    assert_found(found, other(images), rtol=0, atol=0)


@pytest.mark.parametrize("multiple", [None, 32])
def test_raw_predictions_are_exported(multiple, tmp_path):
    """For images of one size or of any; of which the detector makes what it finds itself."""
    model = trained_a_little(detector(head=FCOS)).float()
    predictor = repopt.deploy(model).predictor
    written = {name: tmp_path / name for name in ("raw.onnx", "raw.pt2")}
    for path, write in zip(written.values(), (export.write_onnx, export.write_program), strict=True):
        write(predictor, torch.rand(2, 3, 96, 128), path, {"task": "detect"}, multiple)
    network, program = export.OnnxNetwork(written["raw.onnx"]), torch.export.load(written["raw.pt2"]).module()
    assert network.input_shape == ((3, 96, 128) if multiple is None else (3, None, None))
    assert network.output_names == ("cls_logits", "bbox_regression", "bbox_ctrness")
    sizes = [(48, 64)] * 3 if multiple is None else [(40, 64), (96, 96), (64, 48)]
    images = [torch.rand(3, *size) for size in sizes]
    batch, _ = model.transform(images)
    for raw in (network(batch.tensors), program(batch.tensors)):
        assert_found(model(images), model.detections(raw, batch, sizes), rtol=1e-4, atol=1e-3)


class Maps(nn.Module):
    """Images -> maps of their means, 8, 16 and 32 times smaller, which torchvision's FCOS takes for features."""

    out_channels = 32

    def forward(self, x):
        return {
            str(r): nn.functional.avg_pool2d(x, r).mean(1, keepdim=True).expand(-1, 32, -1, -1) for r in (8, 16, 32)
        }


def torchvisions(head):
    """torchvision's FCOS around a head that is given its raw predictions, which has a logit for label 0 too."""
    sizes = tuple((size,) for size in (8, 16, 32))
    return fcos.FCOS(
        Maps(),
        num_classes=4,
        min_size=96,
        max_size=128,
        image_mean=[0.5] * 3,
        image_std=[0.25] * 3,
        anchor_generator=fcos.AnchorGenerator(sizes, ((1.0,),) * 3),
        head=head,
        score_thresh=0.05,
        size_divisible=32,
    ).double()


class Answers(fcos.FCOSHead):
    """Says what it was told, and that nothing is of label 0."""

    def __init__(self, raw):
        super().__init__(32, num_anchors=1, num_classes=4)
        nothing = torch.full_like(raw["cls_logits"][..., :1], -1e3)
        self.raw = raw | {"cls_logits": torch.cat((nothing, raw["cls_logits"]), 2)}

    def forward(self, x):
        return self.raw


def test_losses_and_detections_are_torchvisions():
    model = trained_a_little(detector(head=FCOS))
    images, targets = batch()
    with torch.no_grad():
        raw = model.predictor(model.transform(images)[0].tensors)
    theirs = torchvisions(Answers(raw))
    assert_found(model(images), theirs.eval()(images), rtol=0, atol=0)
    losses = model.losses(raw, *model.transform(images, targets))
    for name, loss in theirs.train()(images, targets).items():
        torch.testing.assert_close(losses.pop(name), loss, rtol=1e-12, atol=0)
        assert loss > 0
    assert not losses


def test_coordinates_keep_their_precision_under_autocast():
    model = detector(head=FCOS).float()
    images, _ = batch(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        transformed, _ = model.transform(images)
        raw = model.predictor(transformed.tensors)
        assert {values.dtype for values in raw.values()} == {torch.bfloat16}
        found = model.eval().detections(raw, transformed, [(960, 960)] * 2)
    assert all(values["boxes"].dtype == torch.float32 and len(values["boxes"]) for values in found)
    assert any((values["boxes"] != values["boxes"].bfloat16()).any() for values in found)
