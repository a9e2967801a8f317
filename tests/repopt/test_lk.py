"""RepOpt-LK: its sizes, its scales, its baseline, and that the plain network follows the multi-branch one."""

import check_equivalency
import pytest
import torch
import torch.nn.functional as F
from check_equivalency import BOUND, Setup, largest_difference, one_block
from model_helpers import with_statistics

import repopt
from repopt.models import lk

NANO = "RepOpt-LK-nano"


def test_the_papers_size():
    """RepLKNet-31B has 79 M parameters."""
    with torch.device("meta"):
        model = repopt.create_model("RepOpt-LK-B", mode="target")
    kernels = [tuple(module.kernel().shape) for _, module in repopt.declared_blocks(model)]
    stages = [(2, 128, 31), (2, 256, 29), (18, 512, 27), (2, 1024, 13)]
    assert kernels == [(width, 1, size, size) for depth, width, size in stages for _ in range(depth)]
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == 79


def test_names_of_scales_and_where_they_start():
    scales = repopt.extract_scales(repopt.create_model(NANO, mode="hs"))
    starts = {"stage1.1": 2, "stage2.2": 2, "stage3.2": 2, "stage3.4": 1, "stage4.2": 2}  # squared: 2 / l
    assert scales.keys() == {f"{at}.depthwise.scale_{name}.weight" for at in starts for name in ("large", "small")}
    for name, values in scales.items():
        expected = starts[name.partition(".depthwise")[0]] ** 0.5
        torch.testing.assert_close(values, torch.full_like(values, expected), msg=name)


def difference(csla, target, rule, form, images, steps):
    return largest_difference(csla.double(), target.double(), rule, 0.5, images, steps, form)


@pytest.mark.parametrize("rule", ["sgd", "adamw"])
@pytest.mark.parametrize("form", ["compact", "held"])
def test_the_plain_network_follows_the_branches(rule, form):
    torch.manual_seed(0)
    csla, target = (check_equivalency.create(NANO, mode) for mode in ("csla", "target"))
    images = torch.randn(4, 3, 64, 64, dtype=torch.float64)
    assert difference(csla, target, rule, form, images, steps=3) < BOUND


@pytest.mark.parametrize("form", ["compact", "held"])
def test_so_does_a_block_of_the_papers_size(form):
    torch.manual_seed(0)
    setup = Setup(lk.lk_block(4, 31))
    csla, target = one_block(setup, "csla"), one_block(setup, "target")
    assert difference(csla, target, "sgd", form, torch.randn(8, 4, 16, 16, dtype=torch.float64), steps=20) < BOUND


def test_by_plain_sgd_it_does_not(monkeypatch):
    monkeypatch.setattr("repopt.reparam.grad_mults", lambda *_, **__: {})
    torch.manual_seed(0)
    csla, target = (check_equivalency.create(NANO, mode) for mode in ("csla", "target"))
    images = torch.randn(4, 3, 64, 64, dtype=torch.float64)
    assert difference(csla, target, "sgd", "compact", images, steps=3) > 1e-3


def test_the_small_kernel_is_in_the_centre_of_the_baselines():
    """The kernel that a trained block is folded into, by hand."""
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    block = lk.RepLargeKernel(3, 13, initial_scale=1.0).double()
    with_statistics(block, lambda: block(x)).eval()
    deployed = repopt.deploy(block)
    factors = (bn.weight / (bn.running_var + bn.eps).sqrt() for bn in (block.bn_large, block.bn_small))
    kernels = (conv.weight.detach() for conv in (block.conv_large, block.conv_small))
    large, small = (factor.detach().view(-1, 1, 1, 1) * kernel for factor, kernel in zip(factors, kernels, strict=True))
    torch.testing.assert_close(deployed[0].weight.detach(), large + F.pad(small, [4] * 4))
    torch.testing.assert_close(deployed(x), block(x))


def test_a_large_kernel_is_not_smaller_than_the_small_one():
    with pytest.raises(repopt.UserError, match=r"a branch of size \(5, 5\) \(conv_small\) has no place"):
        lk.lk_block(4, 3)
