"""RepOpt-VGG: names and shapes of the published release, and the registry."""

import math

import pytest
import torch

import repopt
from repopt.errors import UserError
from repopt.models import list_archs, parse_arch

NANO = "RepOpt-VGG-nano"


@pytest.mark.parametrize(
    ("key", "name", "arguments"),
    [
        ("RepOpt-VGG-B1 target", "RepOpt-VGG-B1", {"mode": "target"}),
        ("RepOpt-VGG-B1 hs", "RepOpt-VGG-B1", {"mode": "hs", "num_classes": 100}),
        ("RepOpt-VGG-B1 repvgg", "RepOpt-VGG-B1", {"mode": "repvgg"}),
        ("RepOpt-VGG-B1 target, use_post_se", "RepOpt-VGG-B1", {"mode": "target", "se": True}),
    ],
)
def test_published_names_and_shapes(published_keys, key, name, arguments):
    with torch.device("meta"):
        state = repopt.create_model(name, **arguments).state_dict()
    assert {name: list(value.shape) for name, value in state.items()} == published_keys[key]


def test_csla_and_hs_have_the_same_names():
    hs, csla = (repopt.create_model(NANO, mode=mode) for mode in ("hs", "csla"))
    assert hs.state_dict().keys() == csla.state_dict().keys()
    trained = {name for name, _ in hs.named_parameters()} - {name for name, _ in csla.named_parameters()}
    assert trained == {k for k in hs.state_dict() if k.endswith(("scale_conv.weight", "scale_1x1.weight"))}


@pytest.mark.parametrize(
    ("name", "layers", "channels", "params"),
    [
        ("RepOpt-VGG-B1", [4, 6, 16, 1], [128, 256, 512, 2048], 51.8),
        ("RepOpt-VGG-B2", [4, 6, 16, 1], [160, 320, 640, 2560], 80.3),
        ("RepOpt-VGG-L1", [8, 14, 24, 1], [128, 256, 512, 2048], 76.0),
        ("RepOpt-VGG-L2", [8, 14, 24, 1], [160, 320, 640, 2560], 118.1),
    ],
)
def test_table_1(name, layers, channels, params):
    model = repopt.create_model(name, mode="target")
    stages = [model.stage1, model.stage2, model.stage3, model.stage4]
    assert [len(stage) for stage in stages] == layers
    assert [stage[0].bn.num_features for stage in stages] == channels
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == params


@pytest.mark.parametrize(("name", "mode"), sorted({arch[:2] for arch in list_archs().values()}))
def test_every_architecture(name, mode):
    with torch.device("meta"):
        model = repopt.create_model(name, mode=mode, num_classes=7)
        assert model(torch.empty(2, 3, 64, 64)).shape == (2, 7)
    buffers = dict(model.named_buffers())
    kept = {key: value.numel() for key, value in model.state_dict().items() if key not in buffers}
    assert kept == {key: parameter.numel() for key, parameter in model.named_parameters()}
    assert sum(kept.values()) == sum(parameter.numel() for parameter in model.parameters())


def test_scales_start_by_depth():
    scales = repopt.extract_scales(repopt.create_model(NANO, mode="hs"))
    for name, values in scales.items():
        stage, _, block = name.split(".")[0], *name.split(".")[:2]
        index = int(block) if stage != "stage0" else 0
        expected = 1.0 if index == 0 or "scale_identity" in name else math.sqrt(2 / index)
        assert torch.equal(values, torch.full_like(values, expected)), name


@pytest.mark.parametrize("mode", ["hs", "csla", "target", "repvgg"])
@pytest.mark.parametrize("se", [False, True])
def test_parameters_of_the_deployed_network(mode, se):
    """Those of the target less one number per channel: a batch norm's two become a bias."""
    target = repopt.create_model(NANO, mode="target", se=se)
    norms = sum(m.num_features for m in target.modules() if isinstance(m, torch.nn.BatchNorm2d))
    deployed = repopt.deploy(repopt.create_model(NANO, mode=mode, se=se))
    assert sum(p.numel() for p in deployed.parameters()) == sum(p.numel() for p in target.parameters()) - norms


def test_every_arch_is_named_once():
    archs = list_archs()
    assert {"RepOpt-VGG-L2-se-target", "RepOpt-VGG-A0-hs", "RepOpt-VGG-B1-target-norepopt"} <= archs.keys()
    assert parse_arch("RepOpt-VGG-B1-target-norepopt") == ("RepOpt-VGG-B1", "target", False)
    assert parse_arch("RepOpt-VGG-B1-target").repopt
    assert not parse_arch("RepOpt-VGG-B1-repvgg").repopt


def test_unknown_names_get_the_nearest():
    with pytest.raises(UserError, match="did you mean 'RepOpt-VGG-B1-target'"):
        parse_arch("repopt-vgg-b1-targt")
    with pytest.raises(UserError, match="needs a mode"):
        parse_arch("RepOpt-VGG-B1")
    with pytest.raises(UserError, match="did you mean 'RepOpt-VGG-B1'"):
        repopt.create_model("RepOpt-VGG-B11", mode="hs")
    with pytest.raises(UserError, match="allowed: csla, hs, repvgg, target"):
        repopt.create_model("RepOpt-VGG-B1", mode="rep")
