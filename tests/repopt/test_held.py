"""Held branches: any rule on the plain model is that rule on the multi-branch network, to rounding."""

import copy

import pytest
import timm.optim
import torch
import torch.nn.functional as F
from check_equivalency import ALL_BLOCKS, BLOCKS, one_block

import repopt
from repopt.blocks import declared_blocks
from repopt.branches import held_state, hold_branches, share_branches
from repopt.optim.held import BranchOptimizer
from repopt.reparam import param_groups

# The rule, its settings; whether it takes vectors and matrices alike.
RULES = {
    "sgd": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "nesterov": True}),
    "sgd, dampened": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "dampening": 0.3}),
    "adam, coupled decay": (torch.optim.Adam, {"lr": 0.01}),
    "adamw": (torch.optim.AdamW, {"lr": 0.01}),
    "rmsprop": (torch.optim.RMSprop, {"lr": 0.01}),
    "adafactor": (torch.optim.Adafactor, {"lr": 0.01}),
    "muon": (timm.optim.Muon, {"lr": 0.01}),
    "lars": (timm.optim.Lars, {"lr": 0.1, "momentum": 0.9}),
    "lamb": (timm.optim.Lamb, {"lr": 0.01}),
}
DECAY = 0.05


def images_of(model):
    block = model.block.target
    _, per_group, *size = block.shape
    return torch.randn(8, per_group * block.groups, *[7 for _ in size], dtype=torch.float64)


def pair(block="3x3 + 1x1 + identity", mode="hs"):
    torch.manual_seed(0)
    branched = one_block(ALL_BLOCKS[block], mode).double()
    with torch.no_grad():
        for name, scale in branched.named_parameters():
            if name.startswith("scale"):
                scale.uniform_(0.5, 1.5)
    other, plain = copy.deepcopy(branched), one_block(ALL_BLOCKS[block], "target").double()
    branches = share_branches(other, plain)
    plain.branched = (other,)  # no submodule
    return branched, plain, branches


def train(model, optimizer, steps=6, max_norm=None, images=None):
    torch.manual_seed(1)
    losses = []
    for _ in range(steps):
        logits = model(images_of(model))
        loss = F.cross_entropy(logits, torch.arange(8) % logits.shape[1])
        optimizer.zero_grad()
        loss.backward()
        if max_norm:
            torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()
        losses.append(loss.item())
    return losses


def difference(branched, plain):
    with torch.no_grad():
        pairs = zip(declared_blocks(branched), declared_blocks(plain), strict=True)
        return max(float((a.kernel() - b.kernel()).norm() / a.kernel().norm()) for (_, a), (_, b) in pairs)


@pytest.mark.parametrize("mode", ["hs", "csla"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("block", ALL_BLOCKS)
def test_any_rule_is_exact(block, rule, mode):
    branched, plain, branches = pair(block, mode)
    make, settings = RULES[rule]
    reference = make(param_groups(branched, DECAY), **settings)
    optimizer = BranchOptimizer(param_groups(plain, DECAY), make, branches, **settings)
    assert train(branched, reference) == train(plain, optimizer)  # bit for bit
    assert difference(branched, plain) == 0
    state = plain.branched[0].state_dict()
    assert all(torch.equal(value, state[name]) for name, value in branched.state_dict().items())


@pytest.mark.parametrize("rule", ["sgd", "adamw"])
def test_clipping_takes_the_norm_of_the_multi_branch_network(rule):
    branched, plain, branches = pair()
    settings = {**RULES[rule][1], "weight_decay": DECAY}
    reference = repopt.build_optimizer(rule, branched, **settings)
    optimizer = repopt.build_optimizer(rule, plain, branches=branches, max_norm=0.01, **settings)
    assert train(branched, reference, max_norm=0.01) == train(plain, optimizer)
    assert difference(branched, plain) == 0  # bit for bit
    squares = sum(param.grad.square().sum() for param in branched.parameters()) ** 0.5
    assert optimizer.norm > 0.01 and torch.isclose(squares, torch.tensor(0.01).double(), rtol=1e-4)


def accumulate(model, optimizer, images, labels):
    optimizer.zero_grad()
    for part in range(2):
        F.cross_entropy(model(images[part::2]), labels[part::2]).backward()
    optimizer.step()


def by_closure(model, optimizer, images, labels):
    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        return loss

    loss = F.cross_entropy(model(images), labels)
    assert optimizer.step(closure) == loss


def scale_the_loss(model, optimizer, images, labels):
    """Every other step overflows, and is skipped."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**6)
    for overflows in (True, False):
        optimizer.zero_grad()
        scaler.scale(F.cross_entropy(model(images), labels)).backward()
        if overflows:
            first = next(param for param in model.parameters() if param.grad is not None)
            first.grad = torch.full_like(first, torch.inf)
        before = copy.deepcopy(model.state_dict())
        scaler.step(optimizer)
        scaler.update()
        assert all(torch.equal(v, before[n]) for n, v in model.named_parameters()) is overflows
    assert scaler.get_scale() == 2.0**5


def compile_the_model(model, optimizer, images, labels):
    optimizer.zero_grad()
    F.cross_entropy(torch.compile(model, backend="aot_eager")(images), labels).backward()
    optimizer.step()


@pytest.mark.parametrize("way", [accumulate, by_closure, scale_the_loss, compile_the_model])
@pytest.mark.parametrize("rule", RULES)
def test_ways_of_training(rule, way):
    branched, plain, branches = pair()
    make, settings = RULES[rule]
    reference = make(param_groups(branched, DECAY), **settings)
    optimizer = BranchOptimizer(param_groups(plain, DECAY), make, branches, **settings)
    average, kernel = torch.optim.swa_utils.AveragedModel(plain), 0
    for step in range(4):
        torch.manual_seed(step)
        images = images_of(plain)
        labels = torch.arange(8) % plain(images).shape[1]
        way(branched, reference, images, labels)
        way(plain, optimizer, images, labels)
        average.update_parameters(plain)
        kernel = kernel + branched.kernel().detach() / 4
    assert difference(branched, plain) < 1e-13
    torch.testing.assert_close(average.module.conv.weight, kernel, rtol=1e-12, atol=1e-14)


def test_gradients_of_the_model_stay():
    _, plain, branches = pair()
    optimizer = BranchOptimizer(param_groups(plain, DECAY), torch.optim.SGD, branches, max_norm=1e-3, lr=0.1)
    plain(images_of(plain)).sum().backward()
    before = {name: param.grad.clone() for name, param in plain.named_parameters()}
    optimizer.step()
    assert all(torch.equal(param.grad, before[name]) for name, param in plain.named_parameters())


@pytest.mark.parametrize("rule", RULES)
def test_the_state_dict_holds_the_branches(rule):
    make, settings = RULES[rule]
    _, plain, branches = pair()
    optimizer = BranchOptimizer(param_groups(plain, DECAY), make, branches, **settings)
    train(plain, optimizer)
    _, other, others = pair()
    restored = BranchOptimizer(param_groups(other, DECAY), make, others, **settings)
    other.load_state_dict(plain.state_dict())
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert train(plain, optimizer) == train(other, restored)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("rule", RULES)
def test_it_goes_on_from_the_state_of_the_multi_branch_network(rule):
    make, settings = RULES[rule]
    branched, _, _ = pair()
    reference = make(param_groups(branched, DECAY), **settings)
    train(branched, reference)
    other, plain = copy.deepcopy(branched), one_block(BLOCKS["3x3 + 1x1 + identity"], "target").double()
    branches = share_branches(other, plain)
    optimizer = BranchOptimizer(param_groups(plain, DECAY), make, branches, **settings)
    optimizer.load_state_dict(held_state(optimizer, other, copy.deepcopy(reference.state_dict())))
    assert train(branched, reference) == train(plain, optimizer)


def test_a_deep_copy_goes_its_own_way():
    _, plain, branches = pair()
    optimizer = BranchOptimizer(param_groups(plain, DECAY), torch.optim.AdamW, branches, lr=0.01)
    train(plain, optimizer)
    other, copied = copy.deepcopy((plain, optimizer))
    assert train(plain, optimizer) == train(other, copied)
    train(other, copied)
    assert difference(plain, other) > 0


def test_schedulers_reach_the_branches():
    branched, plain, branches = pair()
    settings = {"lr": 0.05, "momentum": 0.9}
    reference = torch.optim.SGD(param_groups(branched, DECAY), **settings)
    optimizer = BranchOptimizer(param_groups(plain, DECAY), torch.optim.SGD, branches, **settings)
    schedules = [torch.optim.lr_scheduler.ExponentialLR(o, 0.5) for o in (reference, optimizer)]
    for _ in range(3):
        assert train(branched, reference, steps=2) == train(plain, optimizer, steps=2)
        for schedule in schedules:
            schedule.step()


@pytest.mark.parametrize("max_norm", [None, 0.05])
def test_frozen_sgd_collapses_exactly(max_norm):
    _, plain, branches = pair()
    settings = {"lr": 0.05, "momentum": 0.9, "nesterov": True, "max_norm": max_norm}
    optimizer = BranchOptimizer(param_groups(plain, DECAY), torch.optim.SGD, branches, **settings)
    train(plain, optimizer)
    with pytest.raises(repopt.UserError, match="searched still"):
        optimizer.collapsed()
    optimizer.freeze_scales()
    other, held = copy.deepcopy((plain, optimizer))
    scales = {name: scale.clone() for name, scale in branches["conv.weight"].scales.items()}
    compact = optimizer.collapsed()
    train(plain, compact)
    train(other, held)
    assert max_norm is None or compact.norm > max_norm
    assert difference(plain, other) < 1e-14
    assert all(torch.equal(held.branches["conv.weight"].scales[name], scale) for name, scale in scales.items())


@pytest.mark.parametrize("rule", RULES)
def test_frozen_branches_are_those_of_constant_scales(rule):
    """After the freeze the path is that of the csla network whose kernels have these states; resumed, too."""
    make, settings = RULES[rule]
    _, plain, branches = pair()
    optimizer = BranchOptimizer(param_groups(plain, DECAY), make, branches, **settings)
    train(plain, optimizer)
    optimizer.freeze_scales()
    other = copy.deepcopy(plain)
    held = hold_branches(other, repopt.extract_scales(plain, branches))
    resumed = BranchOptimizer(param_groups(other, DECAY), make, held, **settings)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert train(plain, optimizer) == train(other, resumed)
    assert difference(plain, other) == 0


def test_how_moments_forget_the_search():
    """What a branch's moments are away from those of the plain gradient shrinks by beta1 and beta2 a step."""
    _, plain, branches = pair()
    settings = {"lr": 0.01, "betas": (0.9, 0.99)}
    optimizer = BranchOptimizer(param_groups(plain, DECAY), torch.optim.AdamW, branches, **settings)
    train(plain, optimizer)
    optimizer.freeze_scales()
    held = branches["conv.weight"]
    moments = {"exp_avg": torch.zeros_like(plain.conv.weight), "exp_avg_sq": torch.zeros_like(plain.conv.weight)}

    def away():
        state = optimizer.state_dict()["state"][0]
        powers = {"exp_avg": 1, "exp_avg_sq": 2}
        scales = {own: scale.view(-1, 1, 1, 1) for own, scale in held.scales.items()}
        return [
            (
                state[f"{b.kernel}/{name}"]
                - scales[b.scale] ** power * b.scatter_view(moments[name], held.block.target)
            ).norm()
            for b in held.block.branches
            if b.scale is not None
            for name, power in powers.items()
        ]

    before = away()
    for _ in range(3):
        train(plain, optimizer, steps=1)
        gradient = plain.conv.weight.grad
        for name, beta, new in (("exp_avg", 0.9, gradient), ("exp_avg_sq", 0.99, gradient**2)):
            moments[name] = beta * moments[name] + (1 - beta) * new
        after = away()
        torch.testing.assert_close(
            torch.stack(after), torch.stack(before) * torch.tensor([0.9, 0.99]).double().repeat(2)
        )
        before = after


def test_a_clip_that_nothing_would_do_is_refused():
    with pytest.raises(repopt.UserError, match="max_norm is of an optimizer with scales or branches"):
        repopt.build_optimizer("sgd", pair()[1], max_norm=1.0, lr=0.1)


def test_weights_are_kept_where_that_is_asked_for():
    _, plain, _ = pair()
    before = copy.deepcopy(plain.state_dict())
    branches = hold_branches(plain, keep_weights=True)
    assert all(torch.equal(value, before[name]) for name, value in plain.state_dict().items())
    assert torch.allclose(branches["conv.weight"].merged(), before["conv.weight"], rtol=1e-15, atol=0)
