"""What holds for the models of every family: their modes are the same function where they should be."""

import pytest
import torch
from model_helpers import with_statistics

import repopt
from repopt.layers import MODES, RepConv2d

SIZES = {"RepOpt-VGG-nano": 32, "RepOpt-VGG-nano with se": 32, "RepOpt-GhostNet-0.5x": 64, "RepOpt-LK-nano": 32}
BASELINES = {"RepOpt-VGG-nano": ("repvgg", "qarepvgg"), "RepOpt-GhostNet-0.5x": ("rep",), "RepOpt-LK-nano": ("rep",)}
EVERY = [(name, mode) for name in SIZES for mode in (*MODES, *BASELINES[name.removesuffix(" with se")])]


def create(name, mode, **arguments):
    """A network in float64 whose batch norms have seen data."""
    se = {"se": True} if name.endswith(" with se") else {}
    model = repopt.create_model(name.removesuffix(" with se"), mode=mode, num_classes=10, **se, **arguments).double()
    return with_statistics(model, lambda: model(images(name)))


def images(name):
    return torch.randn(4, 3, SIZES[name], SIZES[name], dtype=torch.float64)


@pytest.mark.parametrize(("name", "mode"), EVERY)
def test_deployed_network_is_the_same_function(name, mode):
    model = create(name, mode).eval()
    x = images(name)
    expected = model(x)
    assert expected.std() > 1e-3
    deployed = repopt.deploy(model)
    assert not any(isinstance(m, torch.nn.BatchNorm2d | RepConv2d) for m in deployed.modules())
    torch.testing.assert_close(deployed(x), expected, rtol=1e-8, atol=1e-11)
    assert torch.equal(repopt.deploy(deployed)(x), deployed(x))


@pytest.mark.parametrize("name", SIZES)
def test_all_modes_deploy_to_the_same_network(name):
    modes = [mode for family, mode in EVERY if family == name]
    shapes = [{k: v.shape for k, v in repopt.deploy(create(name, mode)).state_dict().items()} for mode in modes]
    assert all(found == shapes[0] for found in shapes)


@pytest.mark.parametrize(("name", "mode"), EVERY)
def test_activation_checkpointing_changes_nothing(name, mode):
    plain, checkpointed = create(name, mode), create(name, mode, use_checkpoint=True)
    checkpointed.load_state_dict(plain.state_dict())
    x = images(name)
    for model in (plain, checkpointed):
        torch.manual_seed(1)  # of dropout
        model(x).square().mean().backward()
    for (key, p), q in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-13, msg=key)
    for (key, a), b in zip(plain.named_buffers(), checkpointed.buffers(), strict=True):
        assert torch.equal(a, b), key


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("identity", ["searched", "one"])
def test_csla_and_target_start_as_the_same_function(name, identity):
    scales = {key: torch.randn_like(v) for key, v in repopt.extract_scales(create(name, "hs")).items()}
    csla, target = create(name, "csla").eval(), create(name, "target").eval()
    target.load_state_dict(csla.state_dict(), strict=False)
    for model in (csla, target):
        torch.manual_seed(5)
        repopt.initialize(model, scales, identity=identity)
    x = images(name)
    torch.testing.assert_close(csla(x), target(x), rtol=1e-9, atol=1e-11)
    found = repopt.extract_scales(csla)
    searched_kernels = {
        f"{path}.{branch.kernel}.weight"
        for path, module in csla.named_modules()
        if isinstance(module, RepConv2d)
        for branch in module.block.branches
        if branch.scale is None
    }
    for key, values in scales.items():
        at_one = identity == "one" and key in searched_kernels
        assert torch.equal(found[key], torch.ones_like(found[key]) if at_one else values), key
