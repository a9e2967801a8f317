"""RepOpt-GhostNet: names and shapes of the published release, and its scales."""

import math

import pytest
import torch

import repopt
from repopt.models import parse_arch

GHOST = "RepOpt-GhostNet-0.5x"
GHOSTS = [name for name in repopt.list_models() if name.startswith("RepOpt-GhostNet")]
MODES = ["hs", "csla", "target", "rep"]


@pytest.mark.parametrize(("mode", "classes"), [("target", 1000), ("hs", 100), ("rep", 1000)])
def test_published_names_and_shapes(published_keys, mode, classes):
    state = repopt.create_model("ghost", mode=mode, num_classes=classes).state_dict()
    assert {name: list(value.shape) for name, value in state.items()} == published_keys[f"{GHOST} {mode}"]


def test_all_widths_have_all_modes():
    widths = ("0.5", "0.58", "0.8", "1.0", "1.11", "1.3", "1.5", "2.0")
    assert set(GHOSTS) == {f"RepOpt-GhostNet-{width}x" for width in widths}
    assert parse_arch("ghost-target") == parse_arch("RepOpt-GhostNet-0.5x-target") == (GHOST, "target", True)
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
    fusions = {
        name for name in repopt.create_model("ghost", mode="hs").state_dict() if name.endswith("fusion_scale.weight")
    }
    assert len(fusions) == 32
    for mode, expected in (("hs", set()), ("csla", fusions), ("target", set()), ("rep", set())):
        model = repopt.create_model("ghost", mode=mode)
        decayed = {name for name, _ in repopt.param_groups(model, 1e-5)[0]["params"]}
        matrices = {name for name, p in model.named_parameters() if p.dim() > 1}
        assert decayed - matrices == expected
