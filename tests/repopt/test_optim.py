"""RepOptimizers against torch's own, and what is particular to them."""

import copy
import pickle

import pytest
import torch
from check_equivalency import ALL_BLOCKS, BLOCKS, FIXED, one_block
from timm.optim import Lion

import repopt
from repopt.csla import Block, ConvBranch, Target
from repopt.errors import UserError
from repopt.optim import RULES, RepAdam, RepAdamW, RepLion, RepOptimizer, RepRMSprop, RepSGD


def network(seed=0):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Conv2d(3, 6, 3), torch.nn.Flatten(), torch.nn.Linear(24, 5)).double()


def steps(model, optimizer, count=6):
    generator = torch.Generator().manual_seed(7)
    for _ in range(count):
        x = torch.randn(4, 3, 4, 4, generator=generator, dtype=torch.float64)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def assert_same(a, b):
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14, msg=name)


def mults(model, degree=1):
    block = Block(Target("0", (6, 3, 3, 3)), (ConvBranch("a", "s", size=3), ConvBranch("b", "t", size=1)))
    generator = torch.Generator().manual_seed(1)
    scales = {name: torch.randn(6, generator=generator, dtype=torch.float64) for name in "st"}
    return {"0.weight": block.grad_mult(scales, degree)}


SETTINGS = [
    (RepSGD, torch.optim.SGD, {"lr": 0.1}),
    (RepSGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}),
    (RepSGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    (RepSGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}),
    (RepAdamW, torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.1}),
    (RepAdamW, torch.optim.AdamW, {"lr": 0.01, "betas": (0.8, 0.9), "eps": 1e-3}),
    (RepAdamW, torch.optim.AdamW, {"lr": 0.01, "betas": (0.8, 0.9), "amsgrad": True}),
    (RepAdam, torch.optim.Adam, {"lr": 0.01, "eps": 1e-3}),
    (RepAdam, torch.optim.Adam, {"lr": 0.01, "weight_decay": 0.1, "decoupled_weight_decay": True}),
    (RepRMSprop, torch.optim.RMSprop, {"lr": 0.01, "alpha": 0.8, "eps": 1e-3}),
    (RepRMSprop, torch.optim.RMSprop, {"lr": 0.01, "momentum": 0.9, "centered": True}),
    (RepLion, Lion, {"lr": 0.01, "betas": (0.8, 0.9), "weight_decay": 0.1}),
]


@pytest.mark.parametrize(("rep", "plain", "settings"), SETTINGS)
def test_without_multipliers_it_is_torchs_own(rep, plain, settings):
    a, b = network(), network()
    steps(a, rep(a.named_parameters(), **settings, grad_mults={}))
    steps(b, plain(b.parameters(), **settings))
    assert_same(a, b)


@pytest.mark.parametrize(("rep", "plain", "settings"), SETTINGS)
def test_it_goes_on_from_torchs_state_and_back(rep, plain, settings):
    a, b = network(), network()
    first, other = plain(a.named_parameters(), **settings), plain(b.named_parameters(), **settings)
    steps(a, first, 3)
    steps(b, other, 6)
    second = rep(a.named_parameters(), **settings, grad_mults={})
    second.load_state_dict(first.state_dict())
    generator = torch.Generator().manual_seed(7)
    xs = [torch.randn(4, 3, 4, 4, generator=generator, dtype=torch.float64) for _ in range(6)]
    for x, optimizer in zip(xs[3:], (second, second, plain(a.named_parameters(), **settings)), strict=True):
        if optimizer is not second:
            optimizer.load_state_dict(second.state_dict())
        optimizer.zero_grad()
        a(x).square().mean().backward()
        optimizer.step()
    assert_same(a, b)


def test_sgd_multiplies_the_gradient_and_leaves_it_as_it_is():
    model = network()
    mult = mults(model)
    model(torch.ones(1, 3, 4, 4, dtype=torch.float64)).sum().backward()
    weight, gradient = model[0].weight.detach().clone(), model[0].weight.grad.clone()
    RepSGD(model.named_parameters(), lr=0.5, weight_decay=0.1, grad_mults=mult).step()
    assert torch.equal(model[0].weight.grad, gradient)
    expected = weight - 0.5 * (gradient * mult["0.weight"].dense() + 0.1 * weight)
    torch.testing.assert_close(model[0].weight.detach(), expected, rtol=1e-14, atol=0)


def test_adamw_multiplies_the_update_and_not_the_decay():
    a, b = network(), network()
    mult = mults(a, degree=0)
    start = a[0].weight.detach().clone()
    steps(a, RepAdamW(a.named_parameters(), lr=0.01, weight_decay=0.0, grad_mults=mult), 1)
    steps(b, torch.optim.AdamW(b.parameters(), lr=0.01, weight_decay=0.0), 1)
    moved = mult["0.weight"].dense() * (b[0].weight - start)
    torch.testing.assert_close(a[0].weight - start, moved, rtol=1e-10, atol=1e-16)
    c = network()
    steps(c, RepAdamW(c.named_parameters(), lr=0.01, weight_decay=0.3, grad_mults=mult), 1)
    torch.testing.assert_close(c[0].weight - a[0].weight, -0.01 * 0.3 * start, rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize(("rep", "settings"), [(s[0], s[2]) for s in SETTINGS])
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["copy", "pickle"]
)
def test_copies_go_on_alike(rep, settings, copied):
    model = network()
    optimizer = rep(model.named_parameters(), **settings, grad_mults=mults(model, rep.degree))
    steps(model, optimizer, 2)
    other, other_optimizer = copied((model, optimizer))
    steps(model, optimizer)
    steps(other, other_optimizer)
    assert_same(model, other)


def test_gradients_that_are_none_are_passed_over():
    model = network()
    optimizer = RepSGD(model.named_parameters(), lr=0.1, grad_mults=mults(model))
    before = copy.deepcopy(model)
    model[2](torch.ones(1, 24, dtype=torch.float64)).sum().backward()
    optimizer.step()
    assert torch.equal(model[0].weight, before[0].weight)
    assert not torch.equal(model[2].weight, before[2].weight)


def test_schedulers_and_closures_work():
    a, b = network(), network()
    for model, optimizer in (
        (a, RepSGD(a.named_parameters(), lr=0.1, momentum=0.9, grad_mults={})),
        (b, torch.optim.SGD(b.parameters(), lr=0.1, momentum=0.9)),
    ):
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
        x = torch.ones(2, 3, 4, 4, dtype=torch.float64)

        def closure(model=model, optimizer=optimizer, x=x):
            optimizer.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            return loss

        for _ in range(5):
            assert optimizer.step(closure) > 0
            schedule.step()
    assert_same(a, b)


def test_rmsprop_decays_as_adamw_does():
    a, b = network(), network()
    rep, plain = (
        RepRMSprop(a.named_parameters(), lr=0.01, weight_decay=0.1, grad_mults={}),
        torch.optim.RMSprop(b.parameters(), lr=0.01),
    )
    for _ in range(3):
        steps(a, rep, 1)
        steps(b, plain, 0)
        x = torch.randn(4, 3, 4, 4, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
        plain.zero_grad()
        b(x).square().mean().backward()
        with torch.no_grad():
            for p in b.parameters():
                p.mul_(1 - 0.01 * 0.1)
        plain.step()
    assert_same(a, b)


@pytest.mark.parametrize("settings", [{"lr": 0.1, "momentum": 0.9, "dampening": 0.5, "weight_decay": 0.1}])
def test_large_parameters_are_updated_in_pieces(settings, monkeypatch):
    a, b = network(), network()
    steps(a, RepSGD(a.named_parameters(), **settings, grad_mults=mults(a)))
    monkeypatch.setattr("repopt.optim.update.CHUNK_NUMEL", 40)  # entries: one filter has 27
    steps(b, RepSGD(b.named_parameters(), **settings, grad_mults=mults(b)))
    assert_same(a, b)


def test_multipliers_follow_the_parameters_dtype():
    a, b = network().float(), network()
    optimizer = RepSGD(b.named_parameters(), lr=0.1, grad_mults=mults(b))
    b.float()
    x = torch.ones(1, 3, 4, 4)
    for model, other in ((a, RepSGD(a.named_parameters(), lr=0.1, grad_mults=mults(a))), (b, optimizer)):
        model(x).sum().backward()
        other.step()
    assert_same(a, b)
    assert b[0].weight.dtype == torch.float32


def test_mistakes_are_named():
    model = network()
    with pytest.raises(UserError, match="named parameters"):
        RepSGD(model.parameters(), lr=0.1, grad_mults=mults(model))
    with pytest.raises(UserError, match="no parameter of that name"):
        RepSGD(model.named_parameters(), lr=0.1, grad_mults={"1.weight": mults(model)["0.weight"]})
    with pytest.raises(UserError, match="not \\(5, 24\\)"):
        RepSGD(model.named_parameters(), lr=0.1, grad_mults={"2.weight": mults(model)["0.weight"]})
    with pytest.raises(UserError, match="not negative"):
        RepSGD(model.named_parameters(), lr=-0.1, grad_mults={})
    with pytest.raises(UserError, match="betas"):
        RepAdamW(model.named_parameters(), betas=(0.9, 1.0), grad_mults={})
    with pytest.raises(UserError, match="Nesterov"):
        RepSGD(model.named_parameters(), lr=0.1, nesterov=True, grad_mults={})
    with pytest.raises(UserError, match="degree 1, and RepAdamW has degree 0"):
        RepAdamW(model.named_parameters(), grad_mults=mults(model, degree=1))
    with pytest.raises(UserError, match="'compild'; did you mean 'compiled'"):
        RepSGD(model.named_parameters(), grad_mults={}, implementation="compild")
    with pytest.raises(UserError, match="decoupled_weight_decay=True"):
        RepAdam(model.named_parameters(), weight_decay=0.1, grad_mults=mults(model, degree=0))
    with pytest.raises(UserError, match="alpha"):
        RepRMSprop(model.named_parameters(), alpha=1.0, grad_mults={})


class _Rule(RepOptimizer):
    """A user's own rule, in the fewest lines."""

    degree = 1

    def __init__(self, params, grad_mults):
        super().__init__(params, {"lr": 0.1, "weight_decay": 0.01}, grad_mults, "eager")

    def state_names(self, group):
        return ()

    @staticmethod
    def compute_update(gradient, state, hyper):
        return gradient


def test_a_users_own_rule():
    a, b = network(), network()
    steps(a, _Rule(a.named_parameters(), mults(a)))
    steps(b, RepSGD(b.named_parameters(), lr=0.1, weight_decay=0.01, grad_mults=mults(b)))
    assert_same(a, b)


@pytest.mark.parametrize(
    ("degree", "compute_update"),
    [
        (0, lambda g, state, hyper: g),  # of degree 1
        (1, lambda g, state, hyper: g.sign()),  # of degree 0
        (1, lambda g, state, hyper: g / g.norm()),  # as LARS
        (0, lambda g, state, hyper: torch.linalg.qr(g).Q),  # as Muon
        (0, lambda g, state, hyper: g / g.square().mean(0).sqrt()),  # as Adafactor
        (1, lambda g, state, hyper: g.abs()),  # not odd
        (1, lambda g, state, hyper: g.sign() * state["m"].copy_(torch.maximum(state["m"], g.abs()))),  # not linear
    ],
)
def test_rules_that_break_the_equivalence_are_refused(degree, compute_update, monkeypatch):
    monkeypatch.setattr(_Rule, "degree", degree)
    monkeypatch.setattr(_Rule, "compute_update", staticmethod(compute_update))
    monkeypatch.setattr(_Rule, "state_names", lambda self, group: ("m",))
    model = network()
    with pytest.raises(UserError, match=f"_Rule cannot be re-parameterized.*degree {degree}"):
        _Rule(model.named_parameters(), mults(model, degree))


@pytest.mark.parametrize("name", ["muon", "lars", "lamb", "adafactor"])
def test_known_rules_that_break_the_equivalence_are_refused_by_name(name):
    with pytest.raises(UserError, match="cannot be re-parameterized: it"):
        repopt.build_optimizer(name, network(), {}, lr=0.1)


@pytest.mark.parametrize("rule", ["adamw", "rmsprop"])
def test_what_epsilon_means(rule):
    """The CSLA network that is followed has the epsilon |s| e in a branch of the scale s (uniform scales here)."""
    setup, constants = BLOCKS["3x3 + 1x1 + identity"], {"scale_3": -0.5, "scale_1": 3.0}
    epsilon = {"kernel_3": 0.5, "kernel_1": 3.0, "identity": 1.0}
    difference = {}
    for exact in (True, False):
        csla, target = (one_block(setup, mode).double() for mode in ("csla", "target"))
        target.load_state_dict(csla.state_dict(), strict=False)
        scales = {
            name: torch.full_like(values, constants.get(name.split(".")[0], 1.0))
            for name, values in repopt.extract_scales(csla).items()
        }
        for model in (csla, target):
            torch.manual_seed(0)
            repopt.initialize(model, scales)
        settings = {"lr": 0.01, "eps": 0.01}
        groups = [
            {"params": [(name, param)], "eps": 0.01 * (epsilon.get(name.split(".")[0], 1.0) if exact else 1.0)}
            for name, param in csla.named_parameters()
        ]
        plain = torch.optim.AdamW if rule == "adamw" else torch.optim.RMSprop
        optimizers = (
            plain(groups, weight_decay=0.0, **settings),
            repopt.build_optimizer(rule, target, scales, momentum=0.0, **settings),
        )
        x = torch.randn(8, 6, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        for _ in range(10):
            for model, optimizer in zip((csla, target), optimizers, strict=True):
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(model(x), torch.arange(8) % 6).backward()
                optimizer.step()
        difference[exact] = float((csla.kernel() - target.kernel()).detach().norm() / target.kernel().detach().norm())
    assert difference[True] < 1e-12
    assert difference[False] > 1e-4


def test_clipping_halves():
    model = torch.nn.Linear(4, 4).half()
    for param in model.parameters():
        param.grad = torch.full_like(param, 300.0)
    norm = repopt.clip_grad_norm_(model.named_parameters(), 1.0, {})
    torch.testing.assert_close(norm, torch.tensor(300.0 * 20**0.5))
    torch.testing.assert_close(model.bias.grad.float(), torch.full((4,), 20**-0.5), rtol=1e-3, atol=0)


def test_a_plain_state_that_is_not_followed_is_refused():
    model = network()
    plain = torch.optim.SGD(model.named_parameters(), maximize=True)
    with pytest.raises(UserError, match="minimizes"):
        RepSGD(model.named_parameters(), grad_mults={}).load_state_dict(plain.state_dict())
    plain = torch.optim.Adam(model.named_parameters(), weight_decay=0.5)
    adam = RepAdam(model.named_parameters(), grad_mults={})
    with pytest.raises(UserError, match="decoupled_weight_decay"):
        adam.load_state_dict(plain.state_dict())
    copy.deepcopy(adam).add_param_group({"params": [("more", torch.nn.Parameter(torch.ones(2)))]})
    with pytest.raises(UserError, match="complex"):
        RepSGD([("c", torch.nn.Parameter(torch.ones(2, dtype=torch.complex64)))], grad_mults={})


def test_clipping_knows_its_multipliers():
    model = network()
    model(torch.ones(1, 3, 4, 4, dtype=torch.float64)).sum().backward()
    with pytest.raises(UserError, match="degree 1, whatever"):
        repopt.clip_grad_norm_(model.named_parameters(), 1.0, mults(model, degree=0))
    named = [(f"module.{name}", param) for name, param in model.named_parameters()]
    for call in (
        lambda: repopt.clip_grad_norm_(named, 1.0, mults(model)),
        lambda: RepSGD(named, grad_mults=mults(model)),
    ):
        with pytest.raises(UserError, match=r"'0.weight', but no parameter .*: 'module.0.weight' is of a wrapper"):
            call()


@pytest.mark.parametrize(
    ("rule", "block"),
    [(rule, "3x3 + 1x1 + identity, 2 groups") for rule in ("sgd", "adamw")] + [("sgd", block) for block in FIXED],
)
def test_clipped_plain_network_is_the_clipped_csla_network(rule, block):
    setup = ALL_BLOCKS[block]
    torch.manual_seed(0)
    csla, target = (one_block(setup, mode).double() for mode in ("csla", "target"))
    scales = {name: torch.randn_like(v) for name, v in repopt.extract_scales(csla).items()}
    for model in (csla, target):
        torch.manual_seed(1)
        repopt.initialize(model, scales)
    settings = {"lr": 0.05, "momentum": 0.9, "eps": 1e-30, "weight_decay": 0.01}
    optimizers = (
        repopt.build_optimizer(rule, csla, **settings),
        repopt.build_optimizer(rule, target, scales, **settings),
    )
    squares = repopt.grad_mults(target, scales, degree=1)
    clipped = 0
    for _ in range(10):
        x = torch.randn(setup.input_shape(), dtype=torch.float64)
        for model, optimizer in zip((csla, target), optimizers, strict=True):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x), torch.arange(8) % setup.block.target.shape[0]).backward()
        expected = torch.nn.utils.clip_grad_norm_(csla.parameters(), 0.05)
        norm = repopt.clip_grad_norm_(target.named_parameters(), 0.05, squares)
        torch.testing.assert_close(norm, expected, rtol=1e-12, atol=0)
        clipped += int(norm > 0.05)
        for optimizer in optimizers:
            optimizer.step()
    assert clipped > 5
    torch.testing.assert_close(target.kernel(), csla.kernel(), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("name", RULES)
def test_hooks_of_others_and_groups_added_later(name):
    """A plain rule makes what its first step needs without a hook; in groups that come later, too."""
    model, called = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)), []
    settings = {"momentum": 0.9} if name == "sgd" else {}
    optimizer = repopt.build_optimizer(name, model[0], lr=0.1, **settings)
    for _ in range(2):
        optimizer.register_step_pre_hook(lambda *_: called.append(1))
    optimizer.add_param_group({"params": list(model[1].named_parameters())})
    for _ in range(2):
        model(torch.ones(2, 3)).sum().backward()
        optimizer.found_inf = torch.ones(())  # both steps are skipped
        optimizer.step()
    assert len(called) == 4
    if name == "sgd":
        assert all(not optimizer.state[param]["momentum_buffer"].any() for param in model.parameters())


@pytest.mark.parametrize("rule", [repopt.RepAdamW, repopt.RepLion])
@pytest.mark.parametrize("implementation", ["eager", "compiled"])
def test_betas_may_be_a_list(rule, implementation):
    found = []
    for betas in ((0.9, 0.95), [0.9, 0.95]):
        torch.manual_seed(0)
        layer = torch.nn.Linear(3, 3)
        optimizer = rule(layer.named_parameters(), betas=betas, grad_mults={}, implementation=implementation)
        for _ in range(3):
            layer(torch.ones(2, 3)).sum().backward()
            optimizer.step()
            optimizer.load_state_dict(optimizer.state_dict())
        found.append(layer.weight)
    assert torch.equal(*found)
    with pytest.raises(UserError, match="betas of an optimizer is not negative"):
        rule(layer.named_parameters(), betas=[-0.1, 0.9], grad_mults={})
