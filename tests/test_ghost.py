"""RepOpt-GhostNet: names and shapes of the published release, its scales, and modes that are the same function."""

import math

import pytest
import torch

import repopt
from repopt.models import parse_arch

GHOST = "RepOpt-GhostNet-0.5x"
GHOSTS = [name for name in repopt.list_models() if name.startswith("RepOpt-GhostNet")]
MODES = ["hs", "csla", "target", "rep"]


def create(mode, **arguments):
    """A network in float64 whose batch norms have seen data."""
    model = repopt.create_model(GHOST, mode=mode, num_classes=10, **arguments).double()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias)
            module.momentum = None  # the running statistics are plain averages
    for _ in range(2):
        model(images())
    return model


def images():
    return torch.randn(4, 3, 64, 64, dtype=torch.float64)


@pytest.mark.parametrize(("mode", "classes"), [("target", 1000), ("hs", 100), ("rep", 1000)])
def test_published_names_and_shapes(published_keys, mode, classes):
    state = repopt.create_model("ghost", mode=mode, num_classes=classes).state_dict()
    assert {name: list(value.shape) for name, value in state.items()} == published_keys[f"{GHOST} {mode}"]


def test_all_widths_have_all_modes():
    widths = ("0.5", "0.58", "0.8", "1.0", "1.11", "1.3", "1.5", "2.0")
    assert set(GHOSTS) == {f"RepOpt-GhostNet-{width}x" for width in widths}
    assert parse_arch("ghost-target") == ("ghost", "target", True)
    assert parse_arch("RepOpt-GhostNet-1.11x-target-norepopt") == ("RepOpt-GhostNet-1.11x", "target", False)


@pytest.mark.parametrize("name", GHOSTS)
@pytest.mark.parametrize("mode", MODES)
def test_every_width_runs_in_every_mode(name, mode):
    with torch.device("meta"):
        model = repopt.create_model(name, mode=mode, num_classes=7)
        assert model(torch.empty(2, 3, 64, 64)).shape == (2, 7)
    channels = {value.shape[0] for key, value in model.state_dict().items() if key.endswith("cheap_operation.0.weight")}
    assert all(number % 4 == 0 for number in channels)


def test_scales_start_by_their_number_in_a_run():
    scales = repopt.extract_scales(repopt.create_model("ghost", mode="hs"))
    runs = [
        ["0.0"], ["1.0", "2.0"], ["3.0", "4.0"], ["5.0", "6.0", "6.1", "6.2"], ["6.3", "6.4"],
        ["7.0", "8.0", "8.1", "8.2", "8.3"],
    ]  # fmt: skip
    for run in runs:
        modules = [f"blocks.{block}.ghost{i}" for block in run for i in (1, 2)]
        for number, module in enumerate(modules, 1):
            found = scales.pop(f"{module}.cheap_operation.1.weight")
            assert torch.equal(found, torch.full_like(found, math.sqrt(2 / (number + 1)))), module
            assert torch.equal(scales.pop(f"{module}.fusion_scale.weight"), torch.ones_like(found))
    assert not scales


def test_released_scales(shared, tmp_path):
    path = shared / "released_scales" / "RepOptGhostNet_0_5x_scales.pth"
    scales = repopt.load_scales(path)
    target = repopt.create_model("ghost", mode="target")
    repopt.initialize(target, scales)
    assert len(repopt.grad_mults(target, scales, degree=1)) == 32
    hs = repopt.create_model("ghost", mode="hs")
    found = repopt.extract_scales(hs)
    assert {key: value.shape for key, value in found.items()} == {key: value.shape for key, value in scales.items()}
    # The published search hardly moved the deepest scales, so the file shows where they started.
    for key in (key for key in scales if key.startswith("blocks.8.") and key.endswith("cheap_operation.1.weight")):
        torch.testing.assert_close(scales[key].mean(), found[key].mean(), rtol=0, atol=1e-3)
    repopt.save_scales(found, tmp_path / "scales.pth")
    again = repopt.load_scales(tmp_path / "scales.pth")
    assert all(torch.equal(again[key], found[key]) for key in scales)


def test_what_is_decayed():
    fusions = {name for name in create("hs").state_dict() if name.endswith("fusion_scale.weight")}
    assert len(fusions) == 32
    for mode, expected in (("hs", set()), ("csla", fusions), ("target", set()), ("rep", set())):
        model = create(mode)
        decayed = {name for name, _ in repopt.param_groups(model, 1e-5)[0]["params"]}
        matrices = {name for name, p in model.named_parameters() if p.dim() > 1}
        assert decayed - matrices == expected


@pytest.mark.parametrize("mode", MODES)
def test_deployed_network_is_the_same_function(mode):
    model = create(mode).eval()
    x = images()
    expected = model(x)
    assert expected.std() > 1e-3
    deployed = repopt.deploy(model)
    assert not any(isinstance(m, torch.nn.BatchNorm2d | repopt.RepConv2d) for m in deployed.modules())
    torch.testing.assert_close(deployed(x), expected, rtol=1e-8, atol=1e-11)


def test_all_modes_deploy_to_the_same_network():
    shapes = [{k: v.shape for k, v in repopt.deploy(create(mode)).state_dict().items()} for mode in MODES]
    assert all(found == shapes[0] for found in shapes)


@pytest.mark.parametrize("mode", ["hs", "rep"])
def test_activation_checkpointing_changes_nothing(mode):
    plain, checkpointed = create(mode), create(mode, use_checkpoint=True)
    checkpointed.load_state_dict(plain.state_dict())
    x = images()
    for model in (plain, checkpointed):
        torch.manual_seed(1)  # of dropout
        model(x).square().mean().backward()
    for (name, p), q in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-13, msg=name)
    for (name, a), b in zip(plain.named_buffers(), checkpointed.buffers(), strict=True):
        assert torch.equal(a, b), name


def test_csla_and_target_start_as_the_same_function():
    scales = {name: torch.randn_like(v) for name, v in repopt.extract_scales(create("hs")).items()}
    csla, target = create("csla").eval(), create("target").eval()
    target.load_state_dict(csla.state_dict(), strict=False)
    for model in (csla, target):
        torch.manual_seed(5)
        repopt.initialize(model, scales)
    x = images()
    torch.testing.assert_close(csla(x), target(x), rtol=1e-9, atol=1e-11)
