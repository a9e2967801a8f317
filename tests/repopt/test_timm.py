"""Our models in timm's registry, and what others build on them."""

import copy
from collections import OrderedDict

import pytest
import timm
import torch
from model_helpers import with_statistics
from torch import nn
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork

import repopt
from data.registry import IMAGENET_MEAN, IMAGENET_STD
from repopt.errors import UserError

NAMES = timm.list_models("repopt_*")
SMALL = {
    "repopt_vgg_nano": "RepOpt-VGG-nano",
    "repopt_ghostnet_050": "RepOpt-GhostNet-0.5x",
    "repopt_lk_nano": "RepOpt-LK-nano",
}
HEADS = {
    "repopt_vgg_nano": {"linear"},
    "repopt_ghostnet_050": {"blocks.9", "conv_head", "classifier"},
    "repopt_lk_nano": {"classifier"},
}
MODES = [
    ("repopt_vgg_nano", "target"),
    ("repopt_vgg_nano", "hs"),
    ("repopt_vgg_nano", "repvgg"),
    ("repopt_ghostnet_050", "target"),
    ("repopt_ghostnet_050", "csla"),
    ("repopt_ghostnet_050", "rep"),
    ("repopt_lk_nano", "target"),
    ("repopt_lk_nano", "rep"),
]


def create(name, **arguments):
    """In float64, from the same seed."""
    torch.manual_seed(1)
    return timm.create_model(name, **arguments).double()


def images(size=64, channels=3):
    return torch.randn(2, channels, size, size, dtype=torch.float64)


def searched(model_name, prefix=""):
    """Random scales of a classifier, some of them negative, by the names that they have in what is built on it."""
    scales = repopt.extract_scales(repopt.create_model(SMALL[model_name], mode="hs"))
    return {prefix + key: torch.randn_like(values) for key, values in scales.items()}


def check_step(model, scales, loss):
    """One step of a RepOptimizer: multiplied gradients where blocks are declared, plain ones elsewhere."""
    repopt.initialize(model, scales)
    optimizer = repopt.build_optimizer("sgd", model, scales, lr=0.1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    loss(model).backward()
    optimizer.step()
    mults = {name: mult.dense() for name, mult in repopt.grad_mults(model, scales, degree=1).items()}
    assert len(mults) == len(list(repopt.declared_blocks(model))) > 0
    for name, p in model.named_parameters():
        assert p.grad is not None, f"{name} is not used"
        gradient = p.grad * mults[name].to(p) if name in mults else p.grad
        torch.testing.assert_close(p.detach(), before[name] - 0.1 * gradient, rtol=1e-5, atol=1e-7, msg=name)
        assert name not in mults or p.grad.abs().max() > 0, name


def test_every_model_is_there():
    assert {"repopt_vgg_nano", "repopt_vgg_l2_se", "repopt_ghostnet_050", "repopt_ghostnet_111"} <= set(NAMES)
    assert "repopt_ghostnet_200" in NAMES
    assert len(NAMES) == len(repopt.list_models()) - 1  # which has an alias
    assert all(map(timm.is_model, NAMES))


@pytest.mark.parametrize("name", NAMES)
def test_features_are_as_described(name):
    with torch.device("meta"):
        model = timm.create_model(name, features_only=True)
        features = model(torch.empty(2, 3, 64, 64))
    assert model.feature_info.reduction() == [2, 4, 8, 16, 32]
    sizes = [64 // reduction for reduction in model.feature_info.reduction()]
    assert [f.shape for f in features] == [
        (2, c, s, s) for c, s in zip(model.feature_info.channels(), sizes, strict=True)
    ]


def test_features_are_the_last_of_their_resolution():
    model = timm.create_model("repopt_ghostnet_050", features_only=True)
    assert model.feature_info.module_name() == [f"blocks.{index}" for index in (0, 2, 4, 6, 8)]


@pytest.mark.parametrize(("name", "mode"), MODES)
def test_the_same_model_as_ours(name, mode):
    model = create(name, mode=mode, num_classes=10)
    torch.manual_seed(1)
    ours = repopt.create_model(SMALL[name], mode=mode, num_classes=10).double()
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), ours.state_dict().values(), strict=True))
    x = images()
    outputs = []
    for network in (model, ours):
        torch.manual_seed(2)  # of dropout
        outputs.append(network(x))
    assert outputs[0].shape == (2, 10)
    assert outputs[0].std() > 1e-3
    assert torch.equal(*outputs)


@pytest.mark.parametrize(("name", "mode"), MODES)
def test_features_are_outputs_of_the_classifiers_stages(name, mode):
    classifier, backbone = create(name, mode=mode).eval(), create(name, mode=mode, features_only=True).eval()
    gone = {key for key in classifier.state_dict() if key not in backbone.state_dict()}
    assert gone == {key for key in classifier.state_dict() if any(key.startswith(f"{part}.") for part in HEADS[name])}
    outputs = {}
    for stage in backbone.feature_info.module_name():
        classifier.get_submodule(stage).register_forward_hook(lambda _m, _x, y, stage=stage: outputs.update({stage: y}))
    x = images()
    classifier(x)
    assert all(torch.equal(a, b) for a, b in zip(backbone(x), outputs.values(), strict=True))


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize(("wanted", "found"), [((1, 2), [1, 2]), ((3, 0), [0, 3]), ((-2, 1), [1, 3]), (2, [3, 4])])
def test_out_indices(name, wanted, found):
    every, some = create(name, features_only=True).eval(), create(name, features_only=True, out_indices=wanted).eval()
    x = images()
    expected = [every(x)[index] for index in found]
    assert all(torch.equal(a, b) for a, b in zip(some(x), expected, strict=True))
    assert some.feature_info.channels() == [feature.shape[1] for feature in expected]
    assert (len(some.state_dict()) < len(every.state_dict())) == (found[-1] < 4)


@pytest.mark.parametrize("name", SMALL)
def test_intermediates(name):
    model = create(name).eval()
    x = images()
    last, features = model.forward_intermediates(x)
    expected = create(name, features_only=True).eval()(x)
    assert all(torch.equal(a, b) for a, b in zip(features, expected, strict=True))
    assert torch.equal(last, model.forward_features(x))
    stopped, features = model.forward_intermediates(x, [1], stop_early=True)
    assert torch.equal(stopped, expected[1])
    assert torch.equal(features[0], expected[1])
    for kind in ("getter", "hook", "fx"):
        theirs = create(name, features_only=True, feature_cls=kind, out_indices=(1, 2)).eval()(x)
        assert all(torch.equal(a, b) for a, b in zip(theirs, expected[1:3], strict=True)), kind


@pytest.mark.parametrize("name", SMALL)
def test_head(name):
    model, x = create(name, num_classes=10).eval(), images()
    features = model.forward_features(x)
    assert features.shape == (2, model.num_features, 2, 2)
    hidden = model.forward_head(features, pre_logits=True)
    assert hidden.shape == (2, model.head_hidden_size)
    assert torch.equal(model.get_classifier()(hidden), model(x))
    assert torch.equal(create(name, num_classes=0).eval()(x), hidden)
    maps = create(name, num_classes=0, global_pool="").eval()(x)
    assert maps.shape == (2, model.head_hidden_size, 2, 2)
    pooled = model.hidden(features.amax((2, 3), keepdim=True)).flatten(1)
    assert torch.equal(create(name, num_classes=0, global_pool="max").eval()(x), pooled)
    model.reset_classifier(7, "max")
    assert torch.equal(model(x), model.get_classifier()(pooled))
    assert model(x).shape == (2, model.num_classes) == (2, 7)
    model.reset_classifier(0)
    assert torch.equal(model(x), pooled)


@pytest.mark.parametrize("name", SMALL)
def test_channels_and_dropout(name):
    assert create(name, in_chans=1)(images(channels=1)).shape == (2, 1000)
    model = create(name, drop_rate=0.75)
    features = torch.rand(64, model.num_features, 2, 2, dtype=torch.float64)
    zeros = [
        (m.forward_head(features, pre_logits=True) == 0).double().mean() for m in (model, copy.deepcopy(model).eval())
    ]
    assert abs(zeros[0] - (0.75 + 0.25 * zeros[1])) < 0.02


@pytest.mark.parametrize("name", SMALL)
def test_default_cfg(name):
    model = create(name)
    cfg = model.default_cfg
    assert (cfg["mean"], cfg["std"], cfg["input_size"]) == (IMAGENET_MEAN, IMAGENET_STD, (3, 224, 224))
    assert cfg["interpolation"] == "bilinear"
    assert model.get_submodule(cfg["classifier"]) is model.get_classifier()
    assert model.get_submodule(cfg["first_conv"]).in_channels == 3
    assert model.feature_info[-1]["reduction"] * cfg["pool_size"][0] == 224


@pytest.mark.parametrize("name", SMALL)
def test_weights_of_a_file(name, tmp_path):
    """A classifier's, for another number of classes and of channels, and for features."""
    torch.save(create(name, num_classes=10).state_dict(), tmp_path / "weights.pth")
    classifier = create(name, num_classes=10).eval()
    arguments = {
        "pretrained": True,
        "pretrained_cfg_overlay": {"file": str(tmp_path / "weights.pth"), "num_classes": 10},
    }
    torch.manual_seed(3)
    backbone = timm.create_model(name, features_only=True, **arguments).double().eval()
    x = images()
    expected = classifier.forward_intermediates(x, intermediates_only=True)
    for a, b in zip(backbone(x), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)  # the file's are of float64
    assert timm.create_model(name, num_classes=3, in_chans=1, **arguments)(torch.randn(2, 1, 64, 64)).shape == (2, 3)


@pytest.mark.parametrize(("name", "mode"), MODES)
def test_deployed_backbone_is_the_same_function(name, mode):
    model = create(name, mode=mode, features_only=True, out_indices=(1, 3))
    with_statistics(model, lambda: model(images())).eval()
    deployed, x = repopt.deploy(model), images()
    assert not any(isinstance(m, nn.BatchNorm2d | repopt.RepConv2d) for m in deployed.modules())
    for a, b in zip(deployed(x), model(x), strict=True):
        assert b.std() > 1e-3
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("out_indices", [(0, 1, 2, 3, 4), (1, 2)])
def test_scales_of_the_classifier_train_the_backbone(name, out_indices):
    model = create(name, features_only=True, out_indices=out_indices)
    check_step(model, searched(name), lambda model: sum(f.square().mean() for f in model(images())))


def test_scales_of_a_deeper_model_are_still_refused():
    scales = repopt.extract_scales(repopt.create_model("RepOpt-VGG-nano", mode="hs"))
    model = timm.create_model("repopt_vgg_nano", features_only=True, out_indices=(1, 2))
    with pytest.raises(UserError, match=r"'stage1\.4\.scale_conv.weight', and the model has no such block"):
        repopt.bind(model, scales | {"stage1.4.scale_conv.weight": torch.ones(16)})


@pytest.mark.parametrize("name", SMALL)
def test_scales_are_searched_on_a_backbone(name):
    scales = repopt.extract_scales(create(name, mode="hs", features_only=True))
    assert scales.keys() == searched(name).keys()


class Pyramid(nn.Module):
    """A backbone and a feature pyramid, as torchvision's detectors take them."""

    def __init__(self, name):
        super().__init__()
        self.body = timm.create_model(name, features_only=True, out_indices=(2, 3, 4))
        self.out_channels = 16
        self.fpn = FeaturePyramidNetwork(self.body.feature_info.channels(), self.out_channels)

    def forward(self, x):
        return self.fpn(OrderedDict((str(index), feature) for index, feature in enumerate(self.body(x))))


@pytest.mark.parametrize("name", SMALL)
def test_detection(name):
    anchors = AnchorGenerator(((16,), (32,), (48,)), ((1.0,),) * 3)
    model = RetinaNet(Pyramid(name), 3, min_size=96, max_size=96, anchor_generator=anchors)
    targets = [{"boxes": torch.tensor([[8.0, 8.0, 60.0, 50.0]]), "labels": torch.tensor([1])}] * 2
    check_step(
        model,
        searched(name, "backbone.body."),
        lambda model: sum(model([torch.rand(3, 96, 96) for _ in range(2)], targets).values()),
    )
    assert len(model.eval()([torch.rand(3, 96, 96)])) == 1


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize(
    ("architecture", "arguments"),
    [("Unet", {}), ("Unet", {"encoder_depth": 3, "decoder_channels": (32, 16, 8)}), ("FPN", {}), ("UPerNet", {})],
)
def test_segmentation(name, architecture, arguments):
    import segmentation_models_pytorch as smp

    model = getattr(smp, architecture)(f"tu-{name}", encoder_weights=None, classes=2, **arguments).double()
    assert model(images()).shape == (2, 2, 64, 64)
    check_step(model, searched(name, "encoder.model."), lambda model: model(images()).square().mean())


@pytest.mark.parametrize("name", SMALL)
def test_gradient_checkpointing_is_switched(name):
    plain, checkpointed, x = create(name, features_only=True), create(name, features_only=True), images()
    checkpointed.set_grad_checkpointing()
    assert checkpointed.use_checkpoint
    for model in (plain, checkpointed):
        sum(f.square().mean() for f in model(x)).backward()
    for p, q in zip(plain.parameters(), checkpointed.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pretrained": True}, r"no weights .* are published through timm.*repopt.load_weights"),
        ({"output_stride": 16}, "output stride 32 only, not 16"),
        ({"mode": "hss"}, "did you mean 'hs'"),
        ({"global_pool": "catavgmax"}, "none of '', 'avg', 'max', 'avgmax'"),
        ({"global_pool": ""}, "goes with num_classes 0"),
        ({"features_only": True, "out_indices": (5,)}, "there are 5 features"),
        ({"features_only": True, "out_indices": 6}, "there are 5 features"),
        ({"features_only": True, "out_indices": ()}, "there are 5 features"),
        ({"drop_path_rate": 0.1}, "unknown argument of .* 'drop_path_rate'; did you mean 'drop_rate'"),
    ],
)
@pytest.mark.parametrize("name", SMALL)
def test_mistakes(name, arguments, message):
    with pytest.raises(UserError, match=message) as caught:
        timm.create_model(name, **arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "mode"), MODES)
def test_timm_folds_what_repopt_deploys(name, mode):
    """By the hook that its own re-parameterized networks have: validate.py --reparam, benchmark.py, onnx_export.py."""
    model = create(name, mode=mode, num_classes=10).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # as after a training
            nn.init.uniform_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    folded, deployed = timm.utils.reparameterize_model(model), repopt.deploy(model)
    convolutions = [
        [type(m) for m in n.modules() if isinstance(m, (nn.Conv2d, repopt.RepConv2d))] for n in (folded, deployed)
    ]
    assert convolutions[0] == convolutions[1]
    x = images()
    torch.testing.assert_close(folded(x), model(x), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(folded(x), deployed(x), rtol=1e-9, atol=1e-9)
