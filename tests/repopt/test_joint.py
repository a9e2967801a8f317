"""Several optimizers as one: each does what it does alone, but for the clip, which is of all."""

import copy
import pickle

import pytest
import torch
from test_ecosystem import SGD, Net, assert_same, batches, loss_of, net, of_form, scales, train
from torch import nn

import repopt
from repopt.errors import UserError

FORMS = pytest.mark.parametrize(
    ("form", "rule"), [("compact", "sgd"), ("compact", "adamw"), ("held", "sgd"), ("held", "muon")]
)


def backbone_of(model):
    return nn.ModuleDict({"first": model.first, "second": model.second, "bn": model.bn})


def joint(form, rule, model, other=torch.optim.AdamW, **settings):
    backbone = of_form(form, rule, backbone_of(model), **SGD)
    return repopt.JointOptimizer({"backbone": backbone, "head": other(model.head.parameters(), lr=0.01)}, **settings)


def apart(form, rule, model):
    return [of_form(form, rule, backbone_of(model), **SGD), torch.optim.AdamW(model.head.parameters(), lr=0.01)]


@FORMS
def test_it_is_its_optimizers(form, rule):
    a, b = net(), net()
    together, each = joint(form, rule, a), apart(form, rule, b)
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9) for optimizer in (together, *each)]
    for x in batches(4):
        train(a, together, [x])
        for optimizer in each:
            optimizer.zero_grad()
        loss_of(b, x).backward()
        for optimizer in each:
            optimizer.step()
        for scheduler in schedulers:
            scheduler.step()
    assert_same(a, b)
    assert together.param_groups[0] is together.optimizers["backbone"].param_groups[0]


@pytest.mark.parametrize("form", ["compact", "held"])
@pytest.mark.parametrize("scale", [1.0, 2.0**10])
def test_it_clips_by_the_norm_of_the_multi_branch_network(form, scale):
    """Which the network with branches has under torch's own clip."""
    csla, target = Net("csla").double(), net()
    torch.manual_seed(0)
    repopt.initialize(csla, scales())
    for module in ("bn", "head"):
        target.get_submodule(module).load_state_dict(csla.get_submodule(module).state_dict())
    optimizer = joint(form, "sgd", target, max_norm=0.05)
    other = torch.optim.AdamW(csla.head.parameters(), lr=0.01)
    of_branches = repopt.build_optimizer("sgd", backbone_of(csla), **SGD)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    for x in batches(4):
        csla.zero_grad()
        loss_of(csla, x).backward()
        norm = nn.utils.clip_grad_norm_(csla.parameters(), 0.05)
        other.step()
        of_branches.step()
        optimizer.zero_grad()
        scaler.scale(loss_of(target, x)).backward()
        scaler.step(optimizer)
        scaler.update()
        torch.testing.assert_close(optimizer.norm, norm, rtol=1e-10, atol=0)
        assert norm > 0.05
    for name in ("first", "second"):
        torch.testing.assert_close(getattr(target, name).kernel(), getattr(csla, name).kernel(), rtol=1e-10, atol=0)
    torch.testing.assert_close(target.head.weight, csla.head.weight, rtol=1e-10, atol=1e-13)


@FORMS
def test_an_overflow_skips_all(form, rule):
    model = net()
    optimizer = joint(form, rule, model)
    before = copy.deepcopy(model.state_dict())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    hook = model.head.weight.register_hook(lambda gradient: gradient * torch.inf)
    scaler.scale(loss_of(model, batches(1)[0])).backward()
    scaler.step(optimizer)
    assert all(torch.equal(param, before[name]) for name, param in model.named_parameters())
    hook.remove()


@FORMS
def test_gradients_stay(form, rule):
    model = net()
    optimizer = joint(form, rule, model, max_norm=0.01)
    loss_of(model, batches(1)[0]).backward()
    before = [param.grad.clone() for param in model.parameters()]
    optimizer.step()
    for param, gradient in zip(model.parameters(), before, strict=True):
        assert torch.equal(param.grad, gradient)


@FORMS
@pytest.mark.parametrize("way", ["state", "copy", "pickle"])
def test_stopped_and_gone_on_is_never_stopped(form, rule, way):
    a, b = net(), net()
    xs = batches(6)
    train(a, joint(form, rule, a, max_norm=0.05), xs)
    optimizer = joint(form, rule, b, max_norm=0.05)
    train(b, optimizer, xs[:3])
    if way == "state":
        states = copy.deepcopy((b.state_dict(), optimizer.state_dict()))
        b = net(5)
        optimizer = joint(form, rule, b, max_norm=0.05)
        b.load_state_dict(states[0])
        optimizer.load_state_dict(states[1])
    else:
        b, optimizer = copy.deepcopy((b, optimizer)) if way == "copy" else pickle.loads(pickle.dumps((b, optimizer)))
    train(b, optimizer, xs[3:])
    assert_same(a, b)


def test_a_closure():
    a, b = net(), net()
    x = batches(1)[0]
    train(a, joint("compact", "sgd", a, max_norm=0.05), [x])
    optimizer = joint("compact", "sgd", b, max_norm=0.05)

    def closure():
        optimizer.zero_grad()
        loss = loss_of(b, x)
        loss.backward()
        return loss

    assert optimizer.step(closure) > 0
    assert_same(a, b)


@FORMS
@pytest.mark.parametrize("max_norm", [None, 0.05])
def test_a_clip_before_the_step_is_told_of(form, rule, max_norm):
    model = net()
    optimizer = joint(form, rule, model, max_norm=max_norm)
    loss_of(model, batches(1)[0]).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    with pytest.warns(repopt.EquivalenceWarning, match="gradients were changed in place"):
        optimizer.step()


def test_a_clip_of_scaled_gradients_is_refused():
    model = net()
    optimizer, scaler = joint("compact", "sgd", model), torch.amp.GradScaler("cpu")
    scaler.scale(loss_of(model, batches(1)[0])).backward()
    repopt.clip_grad_norm_(model.named_parameters(), 0.01, repopt.grad_mults(model, scales(), degree=1))
    with pytest.raises(UserError, match=r"^the gradients were clipped while they were multiplied by the loss scale"):
        scaler.step(optimizer)


def test_refused():
    model = net()
    backbone = of_form("compact", "sgd", model, **SGD)
    with pytest.raises(UserError, match=r"^optimizers 'backbone' and 'head' have a parameter in common$"):
        repopt.JointOptimizer({"backbone": backbone, "head": torch.optim.SGD(model.head.parameters(), lr=0.1)})
    with pytest.raises(UserError, match=r"^optimizer 'backbone' clips by itself: give JointOptimizer the max_norm$"):
        repopt.JointOptimizer({"backbone": backbone.clip_to(1.0)})
    optimizer = joint("compact", "sgd", model)
    with pytest.raises(UserError, match=r"add the group to one of JointOptimizer's optimizers"):
        optimizer.add_param_group({"params": [torch.zeros(1, requires_grad=True)]})
    with pytest.raises(UserError, match=r"^the state is of \['param_groups', 'state'\], the optimizers are"):
        optimizer.load_state_dict(backbone.state_dict())
