"""RepOpt-VGG: names and shapes of the published release, and modes that are the same function."""

import math

import pytest
import torch

import repopt
from repopt.errors import UserError
from repopt.layers import RepConv2d
from repopt.models import list_archs, parse_arch

VGGS = [name for name in repopt.list_models() if name.startswith("RepOpt-VGG")]
NANO = "RepOpt-VGG-nano"


def create(mode, **arguments):
    """A nano in float64 whose batch norms have seen data."""
    model = repopt.create_model(NANO, mode=mode, num_classes=10, **arguments).double()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias)
            module.momentum = None  # the running statistics are plain averages
    for _ in range(2):
        model(images())
    return model


def images():
    return torch.randn(4, 3, 32, 32, dtype=torch.float64)


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


@pytest.mark.parametrize("name", VGGS)
@pytest.mark.parametrize("mode", ["hs", "csla", "target", "repvgg"])
def test_every_model_runs_in_every_mode(name, mode):
    with torch.device("meta"):
        model = repopt.create_model(name, mode=mode, num_classes=7)
        assert model(torch.empty(2, 3, 64, 64)).shape == (2, 7)


def test_scales_start_by_depth():
    scales = repopt.extract_scales(repopt.create_model(NANO, mode="hs"))
    for name, values in scales.items():
        stage, _, block = name.split(".")[0], *name.split(".")[:2]
        index = int(block) if stage != "stage0" else 0
        expected = 1.0 if index == 0 or "scale_identity" in name else math.sqrt(2 / index)
        assert torch.equal(values, torch.full_like(values, expected)), name


@pytest.mark.parametrize("mode", ["hs", "csla", "target", "repvgg"])
@pytest.mark.parametrize("se", [False, True])
def test_deployed_network_is_the_same_function(mode, se):
    model = create(mode, se=se).eval()
    x = images()
    expected = model(x)
    assert expected.std() > 1e-3
    deployed = repopt.deploy(model)
    assert not any(isinstance(m, torch.nn.BatchNorm2d | RepConv2d) for m in deployed.modules())
    torch.testing.assert_close(deployed(x), expected, rtol=1e-9, atol=1e-12)
    target_parameters = sum(
        p.numel() for p in repopt.create_model(NANO, mode="target", num_classes=10, se=se).parameters()
    )
    batch_norms = sum(m.num_features for m in create("target").modules() if isinstance(m, torch.nn.BatchNorm2d))
    assert sum(p.numel() for p in deployed.parameters()) == target_parameters - batch_norms


@pytest.mark.parametrize("mode", ["hs", "target", "repvgg"])
def test_activation_checkpointing_changes_nothing(mode):
    plain, checkpointed = create(mode), create(mode, use_checkpoint=True)
    checkpointed.load_state_dict(plain.state_dict())
    x = images()
    for model in (plain, checkpointed):
        model(x).square().mean().backward()
    for (name, p), q in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-10, atol=1e-14, msg=name)
    for (name, a), b in zip(plain.named_buffers(), checkpointed.buffers(), strict=True):
        assert torch.equal(a, b), name


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
