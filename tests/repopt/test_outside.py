"""What people add around an optimizer: what keeps the equivalence, and what breaks it (docs/equivalence.md)."""

import pytest
import torch
import torch.nn.functional as F
from check_equivalency import BLOCKS, one_block
from timm.optim import Lookahead
from timm.utils import adaptive_clip_grad
from torch import nn

import repopt

SGD = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01}
LABELS = torch.arange(8) % 6


def backward(model, optimizer, x):
    optimizer.zero_grad()
    F.cross_entropy(model(x), LABELS).backward()


def plainly(model, optimizer, x):
    backward(model, optimizer, x)
    optimizer.step()


def penalty_in_the_loss(model, optimizer, x):
    optimizer.zero_grad()
    penalty = sum(param.square().sum() for param in model.parameters())
    (F.cross_entropy(model(x), LABELS) + 0.05 * penalty).backward()
    optimizer.step()


def centralized(model, optimizer, x):
    backward(model, optimizer, x)
    for param in model.parameters():
        if param.grad.dim() > 1:
            param.grad -= param.grad.mean((1, 2, 3), keepdim=True)
    optimizer.step()


def clipped_by_value(model, optimizer, x):
    backward(model, optimizer, x)
    nn.utils.clip_grad_value_(model.parameters(), 0.005)
    optimizer.step()


def clipped_by_the_plain_norm(model, optimizer, x):
    backward(model, optimizer, x)
    nn.utils.clip_grad_norm_(model.parameters(), 0.05)
    optimizer.step()


def clipped_adaptively(model, optimizer, x):
    backward(model, optimizer, x)
    adaptive_clip_grad(model.parameters(), 0.01)
    optimizer.step()


def sharpness_aware(model, optimizer, x):
    backward(model, optimizer, x)
    norm = nn.utils.get_total_norm([param.grad for param in model.parameters()])
    ascent = [0.5 * param.grad / norm for param in model.parameters()]
    with torch.no_grad():
        torch._foreach_add_([*model.parameters()], ascent)
    backward(model, optimizer, x)
    with torch.no_grad():
        torch._foreach_sub_([*model.parameters()], ascent)
    optimizer.step()


def distance(step, wrap=lambda optimizer: optimizer, kernel_of=lambda model, average: model.kernel()):
    """The relative difference of the plain kernel from the multi-branch network's after six steps."""
    torch.manual_seed(0)
    csla, target = (one_block(BLOCKS["3x3 + 1x1 + identity"], mode).double() for mode in ("csla", "target"))
    scales = {name: 0.5 + torch.rand_like(value) for name, value in repopt.extract_scales(csla).items()}
    found = []
    for model, own in ((csla, None), (target, scales)):
        torch.manual_seed(1)
        repopt.initialize(model, scales)
        optimizer = wrap(repopt.build_optimizer("sgd", model, own, **SGD))
        average = torch.optim.swa_utils.AveragedModel(model)
        for number in range(6):
            torch.manual_seed(2 + number)
            step(model, optimizer, torch.randn(8, 6, 7, 7, dtype=torch.float64))
            average.update_parameters(model)
        found.append(kernel_of(model, average.module).detach())
    return float((found[0] - found[1]).norm() / found[0].norm())


@pytest.mark.parametrize(
    "around",
    [
        {"step": plainly},
        {"step": plainly, "wrap": lambda optimizer: Lookahead(optimizer, alpha=0.5, k=2)},
        {"step": plainly, "kernel_of": lambda model, average: average.kernel()},
    ],
    ids=["nothing", "lookahead", "averaged weights"],
)
def test_what_keeps_it(around):
    assert distance(**around) < 1e-13


@pytest.mark.parametrize("step", [penalty_in_the_loss, sharpness_aware])
def test_what_breaks_it(step):
    assert distance(step) > 1e-4


@pytest.mark.parametrize("step", [centralized, clipped_by_value, clipped_by_the_plain_norm, clipped_adaptively])
def test_what_breaks_it_and_is_told_of(step):
    with pytest.warns(repopt.EquivalenceWarning, match="gradients were changed in place"):
        assert distance(step) > 1e-4
