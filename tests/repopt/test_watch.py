"""What breaks the equivalence without the optimizer's doing, and can be seen: a warning, and none for what keeps it."""

import copy
import gc
import pickle
import warnings

import pytest
import torch
from test_ecosystem import SGD, batches, loss_of, net, of_form, scales, train
from timm.utils import adaptive_clip_grad
from torch import nn

import repopt
from repopt.errors import UserError
from repopt.optim import watch

CHANGED = "gradients were changed in place between the backward pass and the step"
FORMS = pytest.mark.parametrize(
    ("form", "rule"), [("compact", "sgd"), ("compact", "adamw"), ("held", "sgd"), ("held", "adamw")]
)


def said(call):
    """The equivalence warnings of a call."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(warning.message) for warning in caught if warning.category is repopt.EquivalenceWarning]


def initialized(seed=0):
    model = net(seed)
    repopt.initialize(model, scales())
    return model


def centralized(params):
    for param in params:
        if param.grad.dim() > 1:
            param.grad.sub_(param.grad.mean(dim=tuple(range(1, param.grad.dim())), keepdim=True))


@FORMS
@pytest.mark.parametrize(
    "change",
    [
        lambda params: nn.utils.clip_grad_norm_(params, 0.01),
        lambda params: nn.utils.clip_grad_value_(params, 0.01),
        lambda params: adaptive_clip_grad(params, 0.01),
        centralized,
    ],
    ids=["norm", "value", "adaptive", "centralized"],
)
def test_gradients_that_are_changed_are_told_of_once(form, rule, change):
    model = initialized()
    optimizer = of_form(form, rule, model, **SGD)

    def steps():
        for x in batches(3):
            optimizer.zero_grad()
            loss_of(model, x).backward()
            change([*model.parameters()])
            optimizer.step()

    (warning,) = said(steps)
    assert warning.startswith(CHANGED)
    assert warning.endswith("(where that is meant: warnings.simplefilter('ignore', repopt.EquivalenceWarning))")


def accumulated(model, optimizer, x):
    for part in x.split(4):
        (nn.functional.cross_entropy(model(part), torch.arange(4)) / 2).backward()
    optimizer.step()


def recomputed(model, optimizer, x):
    torch.utils.checkpoint.checkpoint(loss_of, model, x.requires_grad_(), use_reentrant=True).backward()
    loss_of(model, x).backward()
    optimizer.step()


def two_losses(model, optimizer, x):
    """Of which the second goes through one of the kernels alone."""
    loss_of(model, x).backward()
    (model.second.kernel().square().sum() / 100).backward()
    optimizer.step()


def by_closure(model, optimizer, x):
    def closure():
        optimizer.zero_grad()
        loss = loss_of(model, x)
        loss.backward()
        return loss

    optimizer.step(closure)


def scaled(model, optimizer, x, then=lambda scaler, optimizer: None):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scaler.scale(loss_of(model, x)).backward()
    then(scaler, optimizer)
    scaler.step(optimizer)


def unscaled(model, optimizer, x):
    scaled(model, optimizer, x, lambda scaler, optimizer: scaler.unscale_(optimizer))


def unscaled_unseen(model, optimizer, x):
    optimizer._step_supports_amp_scaling = False
    scaled(model, optimizer, x)


def failed_before(model, optimizer, x):
    """A backward pass that raises leaves the next one watched."""
    hook = model.head.weight.register_hook(lambda gradient: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        loss_of(model, x).backward()
    hook.remove()
    optimizer.zero_grad()
    loss_of(model, x).backward()
    optimizer.step()


@FORMS
@pytest.mark.parametrize(
    "step", [accumulated, recomputed, two_losses, by_closure, scaled, unscaled, unscaled_unseen, failed_before]
)
def test_what_keeps_gradients_is_not_told_of(form, rule, step):
    model = initialized()
    optimizer = of_form(form, rule, model, max_norm=0.01, **SGD)

    def steps():
        for x in batches(3):
            optimizer.zero_grad()
            step(model, optimizer, x)

    assert said(steps) == []


@FORMS
@pytest.mark.parametrize("before", [unscaled, unscaled_unseen])
def test_a_clip_after_an_unscaling_is_told_of(form, rule, before):
    model = initialized()
    optimizer = of_form(form, rule, model, **SGD)
    optimizer._step_supports_amp_scaling = before is unscaled

    def step():
        def unscale_and_clip(scaler, optimizer):
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 0.01)

        scaled(model, optimizer, batches(1)[0], unscale_and_clip)

    assert [warning.startswith(CHANGED) for warning in said(step)] == [True]


def test_another_default_type():
    watch._versions_of_an_unscaling.cache_clear()
    torch.set_default_dtype(torch.float64)
    try:
        assert watch._versions_of_an_unscaling() in (0, 1)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("unscaled", [True, False])
def test_the_clip_of_the_multi_branch_norm_knows_of_loss_scales(unscaled):
    """Clipped while they are multiplied by 65,536, gradients would be 65,536 times too small."""
    a, b = initialized(), initialized()
    mults = repopt.grad_mults(a, scales(), degree=1)
    inside = repopt.build_optimizer("sgd", a, scales(), max_norm=0.01, **SGD)
    outside = repopt.build_optimizer("sgd", b, scales(), **SGD)

    def clip(scaler, optimizer):
        if unscaled:
            scaler.unscale_(optimizer)
        repopt.clip_grad_norm_(b.named_parameters(), 0.01, mults)

    x = batches(1)[0]
    scaled(a, inside, x)
    before = copy.deepcopy(b.state_dict())
    if unscaled:
        assert said(lambda: scaled(b, outside, x, clip)) == []
        for p, q in zip(a.parameters(), b.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)
    else:
        with pytest.raises(UserError, match=r"^the gradients were clipped while they were multiplied by the loss"):
            scaled(b, outside, x, clip)
        assert all(torch.equal(param, before[name]) for name, param in b.named_parameters())


@FORMS
def test_copies_are_watched(form, rule):
    model = initialized()
    pair = model, of_form(form, rule, model, **SGD)
    train(*pair, batches(1))
    for model, optimizer in (copy.deepcopy(pair), pickle.loads(pickle.dumps(pair))):
        loss_of(model, batches(1)[0]).backward()
        nn.utils.clip_grad_value_(model.parameters(), 0.01)
        assert [warning.startswith(CHANGED) for warning in said(optimizer.step)] == [True]


def test_an_optimizer_that_is_gone_watches_no_more():
    model = initialized()
    for _ in range(3):
        optimizer = repopt.build_optimizer("sgd", model, scales(), **SGD)
        gc.collect()
    assert len(model.first.conv.weight._post_accumulate_grad_hooks) == 1
    del optimizer
    gc.collect()
    assert not model.first.conv.weight._post_accumulate_grad_hooks
    assert not any(model.first.conv.weight in w._names for w in watch._WATCHES)


# ------------------------------------------------------------------------------------------------- forgotten steps


def loaded():
    model = net()
    model.load_state_dict(net(1).state_dict())
    return model


def trained():
    model = net()
    train(model, torch.optim.SGD(model.parameters(), lr=0.1), batches(1))
    return model


@pytest.mark.parametrize("begin", [net, initialized, loaded, trained])
def test_a_start_that_is_none(begin):
    model = begin()
    optimizer = repopt.build_optimizer("sgd", model, scales(), **SGD)
    told = said(lambda: train(model, optimizer, batches(2)))
    assert [warning.startswith("'first.conv.weight' is as it was drawn by default") for warning in told] == (
        [True] if begin is net else []
    )


def test_a_state_that_is_loaded_into_what_is_built_is_a_start():
    model = net()
    optimizer = repopt.build_optimizer("sgd", model, scales(), **SGD)
    model.load_state_dict(net(1).state_dict())
    assert said(lambda: train(model, optimizer, batches(2))) == []


def test_a_clip_without_multipliers():
    model = initialized()
    loss_of(model, batches(1)[0]).backward()
    (warning,) = said(lambda: repopt.clip_grad_norm_(model.named_parameters(), 0.1, {}))
    assert warning.startswith("clip_grad_norm_ has no multipliers, so that it clips by the plain norm")


@pytest.mark.parametrize("form", ["compact", "held"])
@pytest.mark.parametrize("forgotten", [True, False])
def test_a_later_group_without_multipliers(form, forgotten):
    key = {"compact": "grad_mults", "held": "branches"}[form]
    model = initialized()
    model.second.requires_grad_(requires_grad=False)
    optimizer = of_form(form, "sgd", model, **SGD)
    model.second.requires_grad_()
    group = {"params": list(model.second.named_parameters("second"))}
    told = said(lambda: optimizer.add_param_group(group | ({} if forgotten else {key: {}})))
    assert [text.startswith(f"a group with kernels was added without {key!r}") for text in told] == [True] * forgotten


@FORMS
def test_compiled_autograd(form, rule):
    """It traces hooks, and takes no callbacks: nothing is watched there, and nothing breaks."""
    a, b = net(), net()
    compiled, plain = (of_form(form, rule, model, **SGD) for model in (a, b))
    torch._dynamo.reset()
    with torch._dynamo.config.patch(compiled_autograd=True):
        backward = torch.compile(lambda x: loss_of(a, x).backward(), backend="eager")
        for x in batches(3):
            compiled.zero_grad()
            backward(x)
            compiled.step()
    train(b, plain, batches(3))
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)
