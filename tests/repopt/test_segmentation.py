"""UPerNet on our backbones: the equivalence within it, and its mIoU."""

import math

import pytest
import torch
from torch import nn

import repopt
from repopt import segmentation
from repopt.errors import UserError
from train.evaluation import segmentation as evaluation
from train.precision import Precision

NANO = "RepOpt-VGG-nano"
CPU = Precision(torch.device("cpu"))
NAMES = ("sky", "road", "car")


def segmenter(mode, name=NANO, **arguments):
    torch.manual_seed(0)
    return segmentation.create_segmenter(name, mode=mode, num_classes=3, channels=8, **arguments).double()


def mixed_scales(name=NANO):
    """Scales of both signs."""
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.randn(len(values), generator=generator, dtype=torch.float64)
        for name, values in repopt.extract_scales(segmenter("hs", name)).items()
    }


@pytest.mark.parametrize("name", [NANO, "timm/repghostnet_050"])
def test_a_repoptimizer_within_a_segmenter_follows_the_csla_network(name):
    # By SGD: the decoder has parameters without effect, whose gradients are rounding, and Adam takes their signs.
    scales = mixed_scales(name)
    target, csla = segmenter("target", name), segmenter("csla", name)
    csla.load_state_dict(csla.state_dict() | shared(target, csla))
    for model in (target, csla):
        torch.manual_seed(2)
        repopt.initialize(model, scales)
    settings = {"lr": 0.01, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-2}
    optimizers = (
        repopt.build_optimizer("sgd", target, scales, **settings),
        repopt.build_optimizer("sgd", csla, **settings),
    )
    generator = torch.Generator().manual_seed(3)
    for _ in range(4):
        images = torch.randn(2, 3, 64, 64, generator=generator, dtype=torch.float64)
        labels = torch.randint(3, (2, 64, 64), generator=generator)
        before = target.state_dict()["decoder.fusion_block.0.weight"].clone()
        for model, optimizer in zip((target, csla), optimizers, strict=True):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
        assert not torch.equal(before, target.state_dict()["decoder.fusion_block.0.weight"])
    torch.testing.assert_close(target.eval()(images), csla.eval()(images), rtol=1e-7, atol=1e-9)


def shared(target, csla):
    """Weights by names that both have, in one shape."""
    own = csla.state_dict()
    return {
        name: value for name, value in target.state_dict().items() if name in own and own[name].shape == value.shape
    }


def test_only_declared_kernels_of_the_backbone_have_multipliers():
    model = segmenter("target")
    mults = repopt.grad_mults(model, mixed_scales(), degree=1)
    assert len(mults) == 28
    assert all(name.startswith(f"{segmentation.BODY}.") and name.endswith(".conv.weight") for name in mults)


def test_searched_scales_go_through_a_file(tmp_path):
    search = segmenter("hs").float()
    repopt.save_scales(repopt.extract_scales(search), tmp_path / "scales.pth")
    repopt.initialize(segmenter("target"), repopt.load_scales(tmp_path / "scales.pth"))


@pytest.mark.parametrize("mode", ["target", "repvgg", "hs"])
def test_deployed_it_is_the_same_function(mode):
    model = segmenter(mode)
    model(torch.randn(2, 3, 64, 64, dtype=torch.float64))
    images = torch.randn(1, 3, 64, 96, dtype=torch.float64)
    expected = model.eval()(images)
    assert expected.shape == (1, 3, 64, 96)
    torch.testing.assert_close(repopt.deploy(model)(images), expected)


def test_the_miou_is_that_of_its_definition():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(2, (5, 48, 40), generator=generator)  # the class "car" does not occur
    labels[:, :7] = segmentation.IGNORED
    logits = torch.randn(5, 3, 64, 64, generator=generator)
    logits[:, 2] = -math.inf

    class Known(nn.Module):
        def forward(self, images):
            assert images.shape[2:] == (64, 64)
            return logits[images[:, 0, 0, 0].long()]

    images = torch.arange(5.0).view(5, 1, 1, 1).expand(5, 3, 48, 40)
    batches = [(images[:3], labels[:3]), (images[3:], labels[3:])]
    found = evaluation.evaluate(Known(), batches, CPU, class_names=NAMES)
    predicted, counts = logits[:, :, :48, :40].argmax(1), labels != segmentation.IGNORED
    expected = []
    for index in range(2):
        there, said = (labels == index) & counts, (predicted == index) & counts
        expected.append(100 * ((there & said).sum() / (there | said).sum()).item())
    assert [found.iou["sky"], found.iou["road"]] == pytest.approx(expected, rel=1e-6)
    assert math.isnan(found.iou["car"])
    assert found.miou == found.score == pytest.approx(sum(expected) / 2, rel=1e-6)
    assert found.pixel_accuracy == pytest.approx(100 * (predicted == labels)[counts].double().mean().item(), rel=1e-6)
    assert found.images == 5
    assert found.numbers()["iou road"] == found.iou["road"]
    assert "IoU sky" in str(found)


def test_an_evaluation_gives_up_when_asked():
    batches = [(torch.zeros(1, 3, 32, 32), torch.zeros(1, 32, 32, dtype=torch.int64))]
    stop = evaluation.evaluate(nn.Identity(), batches, CPU, class_names=NAMES, stops=lambda: True)
    assert stop is None


@pytest.mark.parametrize(("size", "window", "stride"), [((70, 100), (32, 64), None), ((64, 64), (64, 64), (10, 10))])
def test_windows_cover_an_image_and_overlaps_are_averaged(size, window, stride):
    model = nn.Conv2d(3, 4, 1).double()  # what it says of a pixel depends on no other
    images = torch.randn(2, 3, *size, dtype=torch.float64)
    torch.testing.assert_close(
        segmentation.predict(model, images, window, stride), model(images), check_dtype=False, rtol=1e-5, atol=1e-6
    )


def test_a_window_sees_no_more_than_itself():
    seen = []

    class Seen(nn.Module):
        def forward(self, images):
            seen.append(images)
            return images

    images = torch.randn(1, 3, 40, 50)
    segmentation.predict(Seen(), images, (32, 32), (16, 16))
    assert [tuple(part.shape[2:]) for part in seen] == [(32, 32)] * 6
    assert torch.equal(seen[-1], images[:, :, 8:, 18:])


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        (
            NANO,
            {"mode": "target", "strides": (1, 2, 2, 2, 2)},
            "those of RepOpt-VGG-nano are 2, 4, 8, 16 times smaller",
        ),
        ("timm/vit_tiny_patch16_224", {"mode": "plain"}, "timm/vit_tiny_patch16_224 cannot be a backbone"),
        ("timm/coatnet_pico_rw_224", {"mode": "plain"}, "timm/coatnet_pico_rw_224 cannot be a backbone"),
        ("timm/resnet18", {"mode": "target"}, "has no block of a registered type"),
        ("torchvision/resnet18", {"mode": "plain"}, "one of ours or timm/NAME, not torchvision/resnet18"),
        (NANO, {"mode": "hsx"}, "unknown mode of RepOpt-VGG-nano 'hsx'"),
    ],
)
def test_other_backbones_are_refused(name, arguments, message):
    with pytest.raises(UserError, match=message):
        segmentation.create_segmenter(name, num_classes=3, **arguments)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_backbones_of_timm(checkpointed):
    model = segmentation.create_segmenter(
        "timm/resnet18", mode="plain", num_classes=3, channels=8, use_checkpoint=checkpointed
    )
    assert model.training
    assert model.get_submodule(segmentation.BODY).grad_checkpointing == checkpointed
    logits = model(torch.randn(2, 3, 64, 64))
    assert logits.shape == (2, 3, 64, 64)
    logits.sum().backward()


def test_measures_take_no_other_algorithm_where_torch_is_to_be_deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        with evaluation._any_algorithm():
            assert not torch.are_deterministic_algorithms_enabled()
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_classifiers_weights_fit_the_backbone():
    classifier = repopt.create_model(NANO, mode="target", num_classes=7).double().state_dict()
    body = segmenter("target").get_submodule(segmentation.BODY)
    repopt.load_weights(body, {name: classifier[name] for name in body.state_dict()})
    assert set(classifier) - set(body.state_dict()) == {"linear.weight", "linear.bias"}
