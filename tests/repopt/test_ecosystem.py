"""RepOptimizers among what people train with: torch's schedulers, scalers, wrappers, state dicts."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from check_equivalency import BLOCKS

import repopt
from repopt.errors import UserError
from repopt.layers import RepConv2d
from repopt.optim import RepAdamW, RepRMSprop, RepSGD

BLOCK = BLOCKS["3x3 + 1x1 + identity"].block


class Net(torch.nn.Module):
    """Two declared blocks and a classifier, (N, 6, H, W) -> (N, 4)."""

    def __init__(self, mode="target"):
        super().__init__()
        self.first, self.second = RepConv2d(BLOCK, mode), RepConv2d(BLOCK, mode)
        self.bn = torch.nn.BatchNorm2d(6)
        self.head = torch.nn.Linear(6, 4)

    def forward(self, x):
        return self.head(self.bn(self.second(torch.relu(self.first(x)))).mean((2, 3)))


def net(seed=0):
    torch.manual_seed(seed)
    return Net().double()


def scales(seed=1):
    generator = torch.Generator().manual_seed(seed)
    found = repopt.extract_scales(Net("hs"))
    return {name: torch.randn(v.shape, generator=generator, dtype=torch.float64) for name, v in found.items()}


def batches(count, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(8, 6, 5, 5, generator=generator, dtype=torch.float64) for _ in range(count)]


def loss_of(model, x):
    return torch.nn.functional.cross_entropy(model(x), torch.arange(8, device=x.device) % 4)


def train(model, optimizer, xs, after=lambda: None):
    for x in xs:
        optimizer.zero_grad()
        loss_of(model, x).backward()
        optimizer.step()
        after()


def assert_same(a, b):
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14, msg=name)


SGD = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}


def test_a_group_that_is_added_later_brings_its_multipliers():
    a, b = net(), net()
    mults = repopt.grad_mults(a, scales(), degree=1)
    whole = RepSGD(a.named_parameters(), **SGD, grad_mults=mults)
    first = [(n, p) for n, p in b.named_parameters() if not n.startswith("second")]
    rest = [(n, p) for n, p in b.named_parameters() if n.startswith("second")]
    grown = RepSGD(first, **SGD, grad_mults={n: m for n, m in mults.items() if not n.startswith("second")})
    with pytest.raises(UserError, match=r"Grad Mult for 'secnd.conv.weight'"):
        grown.add_param_group({"params": rest, "grad_mults": {"secnd.conv.weight": mults["second.conv.weight"]}})
    assert len(grown.param_groups) == 1
    grown.add_param_group({"params": rest, "grad_mults": {"second.conv.weight": mults["second.conv.weight"]}})
    assert grown.grad_mults.keys() == whole.grad_mults.keys()
    train(a, whole, batches(4))
    train(b, grown, batches(4))
    assert_same(a, b)


def test_a_state_of_other_parameters_is_refused():
    model = net()
    optimizer = repopt.build_optimizer("sgd", model, scales(), **SGD)
    train(model, optimizer, batches(1))
    state = copy.deepcopy(optimizer.state_dict())
    names = state["param_groups"][0]["param_names"]
    names[0], names[1] = names[1], names[0]
    with pytest.raises(UserError, match=r"it has 'second.conv.weight' where 'first.conv.weight' is"):
        optimizer.load_state_dict(state)


@pytest.mark.parametrize("rule", ["sgd", "adamw", "rmsprop", "lion"])
def test_stopped_and_gone_on_is_never_stopped(rule, tmp_path):
    settings = {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.01}
    a, b = net(), net()
    xs = batches(6)
    train(a, repopt.build_optimizer(rule, a, scales(), **settings), xs)
    first = repopt.build_optimizer(rule, b, scales(), **settings)
    train(b, first, xs[:3])
    torch.save({"model": b.state_dict(), "optimizer": first.state_dict()}, tmp_path / "c.pth")
    c, kept = net(5), torch.load(tmp_path / "c.pth", weights_only=True)
    c.load_state_dict(kept["model"])
    second = repopt.build_optimizer(rule, c, scales(), **settings)
    second.load_state_dict(kept["optimizer"])
    train(c, second, xs[3:])
    for p, q in zip(a.parameters(), c.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("rule", ["sgd", "adamw"])
@pytest.mark.parametrize("form", ["compact", "held"])
def test_a_state_of_other_scales_is_refused(form, rule):
    def optimizer_with(seed, dtype=torch.float64):
        model = net().to(dtype)
        if form == "compact":
            optimizer = repopt.build_optimizer(rule, model, scales(seed), **SGD)
        else:
            branches = repopt.hold_branches(model, scales(seed))
            optimizer = repopt.build_optimizer(rule, model, branches=branches, **SGD)
        train(model, optimizer, [x.to(dtype) for x in batches(1)])
        return optimizer

    state = optimizer_with(1).state_dict()
    before = copy.deepcopy(state)
    other = optimizer_with(2)
    with pytest.raises(UserError, match="of a training with other scales"):
        other.load_state_dict(state)
    for precision in (torch.float64, torch.float32):
        optimizer_with(1, precision).load_state_dict(state)
    assert str(before) == str(state)
    if form == "compact":  # what does not say loads as before
        plain = repopt.build_optimizer(rule, net(), **SGD)
        other.load_state_dict(plain.state_dict())
        plain.load_state_dict(state)


def of_form(form, rule, model, **settings):
    """An optimizer that keeps multipliers ("compact") or the branches of constant scales ("held")."""
    torch.manual_seed(0)
    if form == "compact":
        repopt.initialize(model, scales())
        return repopt.build_optimizer(rule, model, scales(), **settings)
    return repopt.build_optimizer(rule, model, branches=repopt.hold_branches(model, scales()), **settings)


@pytest.mark.parametrize("rule", ["sgd", "adamw"])
@pytest.mark.parametrize(("form", "steps_before"), [("compact", 0), ("held", 0), ("held", 2)])
def test_master_copies_in_the_groups_are_the_parameters(form, rule, steps_before):
    """As mixed precision and FSDP2 under Accelerate do it: others of the same names are stepped."""
    a, b = net(), net()
    plain, mastered = (of_form(form, rule, model, **SGD) for model in (a, b))
    train(a, plain, batches(6))
    train(b, mastered, batches(6)[:steps_before])
    for group in mastered.param_groups:
        group["params"] = [param.detach().clone().requires_grad_() for param in group["params"]]
    masters = {n: p for g in mastered.param_groups for n, p in zip(g["param_names"], g["params"], strict=True)}
    for x in batches(6)[steps_before:]:
        b.zero_grad()
        loss_of(b, x).backward()
        for name, param in b.named_parameters():
            masters[name].grad = param.grad
        mastered.step()
        with torch.no_grad():
            for name, param in b.named_parameters():
                param.copy_(masters[name])
    assert_same(a, b)


@pytest.mark.parametrize("change", ["flat", "gone", "without names"])
@pytest.mark.parametrize("form", ["compact", "held"])
def test_a_step_that_does_not_meet_a_multiplier_is_refused(form, change):
    model = net()
    optimizer = of_form(form, "sgd", model, **SGD)
    before = copy.deepcopy(model.state_dict())
    group = optimizer.param_groups[0]
    if change == "flat":  # as ZeRO does it
        group["params"] = [torch.cat([param.detach().flatten() for param in group["params"]]).requires_grad_()]
    elif change == "gone":
        group["params"], group["param_names"] = group["params"][1:], group["param_names"][1:]
    else:
        group["params"] = [param.detach().clone().requires_grad_() for param in group["params"]]
        del group["param_names"]
    loss_of(model, batches(1)[0]).backward()
    with pytest.raises(UserError, match=r"the optimizer's groups have lost 'first\.conv\.weight'"):
        optimizer.step()
    for name, param in model.named_parameters():
        assert torch.equal(param, before[name])


def test_momentum_that_a_scheduler_changes():
    a, b = net(), net()
    for model, optimizer in (
        (a, RepSGD(a.named_parameters(), **SGD, grad_mults={})),
        (b, torch.optim.SGD(b.parameters(), **SGD)),
    ):
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=7)
        train(model, optimizer, batches(6), schedule.step)
    assert_same(a, b)


@pytest.mark.filterwarnings("ignore:gradients were changed in place")  # by the test: the overflow
def test_a_step_that_grad_scaler_skips_changes_nothing():
    model = net().float()
    optimizer = repopt.build_optimizer("adamw", model, scales(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    before = copy.deepcopy(model.state_dict())
    (x,) = (x.float() for x in batches(1))
    for infinite in (True, False):
        optimizer.zero_grad()
        scaler.scale(loss_of(model, x)).backward()
        if infinite:
            model.first.conv.weight.grad[0, 0, 0, 0] = torch.inf
        scaler.step(optimizer)
        scaler.update()
        changed = any(not torch.equal(p, before[n]) for n, p in model.named_parameters())
        assert changed is not infinite
        assert bool(optimizer.state) is not infinite
    assert scaler.get_scale() == 2.0**9


@pytest.mark.parametrize("scale", [None, 2.0**6])
@pytest.mark.parametrize("rule", ["sgd", "adamw", "rmsprop", "lion"])
@pytest.mark.parametrize("implementation", ["eager", "compiled"])
def test_a_clip_within_the_step_is_that_before_it(rule, implementation, scale):
    """After the gradients were unscaled, and without a trace in them."""
    a, b = net(), net()
    settings = {**SGD, "lr": 0.01, "implementation": implementation}
    before = repopt.build_optimizer(rule, a, scales(), **settings)
    within = repopt.build_optimizer(rule, b, scales(), max_norm=0.05, **settings)
    mults = repopt.grad_mults(a, scales(), degree=1)
    clipped = 0
    for x in batches(6):
        a.zero_grad()
        loss_of(a, x).backward()
        norm = repopt.clip_grad_norm_(a.named_parameters(), 0.05, mults)
        before.step()
        within.zero_grad()
        (loss_of(b, x) * (scale or 1)).backward()
        gradient = b.head.weight.grad.clone()
        within.found_inf, within.grad_scale = torch.zeros(()), None if scale is None else torch.tensor(scale)
        within.step()
        torch.testing.assert_close(within.norm, norm, rtol=1e-12, atol=0)
        assert torch.equal(b.head.weight.grad, gradient)
        clipped += int(norm > 0.05)
    assert clipped > 3
    assert_same(a, b)


def test_clips_that_nothing_would_do_are_refused():
    model = net()
    optimizer = repopt.build_optimizer("adamw", model, scales(), lr=0.1)
    with pytest.raises(UserError, match="degree 1, whatever"):
        optimizer.clip_to(1.0)
    with pytest.raises(UserError, match=r"Grad Mult for 'other', but no parameter"):
        optimizer.clip_to(1.0, {"other": repopt.grad_mults(model, scales(), degree=1)["first.conv.weight"]})
    copied = copy.deepcopy(repopt.build_optimizer("sgd", model, scales(), lr=0.1, max_norm=3.0))
    assert copied.max_norm == 3.0


@pytest.mark.filterwarnings("ignore:gradients were changed in place")  # by the test: the overflow
@pytest.mark.parametrize("rule", ["sgd", "adamw", "rmsprop", "lion"])
@pytest.mark.parametrize("implementation", ["eager", "compiled"])
@pytest.mark.parametrize("on_host", [True, False])  # as on a CPU, and as on a GPU
def test_steps_that_are_left_out(monkeypatch, rule, implementation, on_host):
    """Those in between are as if there had been no others; the scaled gradients are those of the loss."""
    monkeypatch.setattr("repopt.optim.base._on_host", lambda answer: on_host)
    a, b = net(), net()
    settings = {**SGD, "lr": 0.01, "implementation": implementation}
    plain, told = (repopt.build_optimizer(rule, model, scales(), **settings) for model in (a, b))
    for x, bad in zip(batches(7), (False, True, False, False, True, True, False), strict=True):
        told.zero_grad()
        (loss_of(b, x) * 2**6).backward()
        told.found_inf, told.grad_scale = torch.tensor(float(bad)), torch.tensor(2.0**6)
        if bad:
            b.first.conv.weight.grad[0, 0, 0, 0] = torch.nan
        told.step()
        if not bad:
            train(a, plain, [x])
    assert_same(a, b)
    for state, other in zip(plain.state.values(), told.state.values(), strict=True):
        assert state.keys() == other.keys()
        for name, value in state.items():
            torch.testing.assert_close(value, other[name], rtol=1e-12, atol=1e-14, check_dtype=False)


@pytest.mark.parametrize("change", ["gradients come and go", "another state is loaded", "numbers are written"])
def test_parameters_that_have_taken_different_steps_are_corrected_each_by_its_own(monkeypatch, change):
    """As on a GPU, where only the device knows the numbers: those that are equal are counted together."""
    monkeypatch.setattr("repopt.optim.base._on_host", lambda answer: False)
    a, b = net(), net()
    settings = {"lr": 0.01, "weight_decay": 0.01, "implementation": "eager"}
    plain, told = (repopt.build_optimizer("adamw", model, scales(), **settings) for model in (a, b))
    told.found_inf, told.grad_scale = torch.zeros(()), None
    for step, x in enumerate(batches(8)):
        for model, optimizer in ((a, plain), (b, told)):
            optimizer.zero_grad()
            loss_of(model, x).backward()
            if change == "gradients come and go" and step in (1, 2, 5):
                model.head.bias.grad = model.first.conv.weight.grad = None
            if change == "another state is loaded" and step == 4:
                state = copy.deepcopy(optimizer.state_dict())
                state["state"][1]["step"] += 5
                optimizer.load_state_dict(state)
            if change == "numbers are written" and step == 4:
                optimizer.state[model.head.weight]["step"].fill_(1)
            optimizer.step()
    assert_same(a, b)
    numbers = [[state["step"].item() for state in optimizer.state.values()] for optimizer in (plain, told)]
    assert numbers[0] == numbers[1]
    assert len(set(numbers[0])) == 2


@pytest.mark.parametrize("rule", ["sgd", "adamw"])
@pytest.mark.parametrize("rate", [0.01, torch.tensor(0.01, dtype=torch.float64)], ids=["number", "tensor"])
def test_small_parameters_are_updated_as_one_however_their_rate_is_given(monkeypatch, rule, rate):
    monkeypatch.setattr("repopt.optim.base._on_host", lambda answer: False)
    model = net()
    optimizer = repopt.build_optimizer(rule, model, scales(), lr=rate, weight_decay=0.01)
    flatten, sizes = optimizer._flat_params.flatten, []
    optimizer._flat_params.flatten = lambda tasks: sizes.append((len(tasks), len(flat := flatten(tasks)))) or flat
    for x in batches(3):
        optimizer.found_inf = torch.zeros(())
        train(model, optimizer, [x])
    # A weight that is decayed, and the bias and both parameters of the norm; the first steps are taken one by one.
    assert sizes[-1] == (6, 4)


@pytest.mark.parametrize("rule", [RepAdamW, RepRMSprop])
@pytest.mark.parametrize("implementation", ["eager", "compiled"])
def test_capturable_steps_and_rates_are_tensors(rule, implementation):
    """What a CUDA graph needs: nothing of a step is a number that would be captured."""
    a, b = net(), net()
    mults = repopt.grad_mults(a, scales(), degree=0)
    rate = torch.tensor(0.01, dtype=torch.float64)
    numbers = rule(a.named_parameters(), lr=0.01, grad_mults=mults)
    tensors = rule(b.named_parameters(), lr=rate, capturable=True, grad_mults=mults, implementation=implementation)
    for x in batches(5):
        train(a, numbers, [x])
        train(b, tensors, [x])
        numbers.param_groups[0]["lr"] *= 0.5
        rate.mul_(0.5)
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)


@pytest.mark.cuda
@pytest.mark.parametrize("rule", ["sgd", "adamw"])
def test_cuda_graph(rule):
    a, b = net().cuda(), net().cuda()
    rate = torch.tensor(0.01, device="cuda", dtype=torch.float64)
    settings = {"implementation": "eager"} | ({"capturable": True} if rule == "adamw" else {"momentum": 0.9})
    plain = repopt.build_optimizer(rule, a, scales(), lr=0.01, **settings)
    captured = repopt.build_optimizer(rule, b, scales(), lr=rate, **settings)
    for model in (a, b):
        for param in model.parameters():
            param.grad = torch.ones_like(param)
    captured.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.step()
    for _ in range(3):
        graph.replay()
    for _ in range(4):
        plain.step()
    assert_same(a, b)


def test_a_compiled_model():
    a, b = net(), net()
    train(a, repopt.build_optimizer("sgd", a, scales(), **SGD), batches(3))
    compiled = torch.compile(b, backend="eager")
    repopt.bind(compiled, scales())
    train(compiled, repopt.build_optimizer("sgd", compiled, scales(), **SGD), batches(3))
    assert_same(a, b)


def test_frozen_kernels_take_no_part():
    model = net()
    model.first.requires_grad_(requires_grad=False)
    before = copy.deepcopy(model.state_dict())
    optimizer = repopt.build_optimizer("sgd", model, scales(), **SGD)
    assert optimizer.grad_mults.keys() == {"second.conv.weight"}
    train(model, optimizer, batches(2))
    assert torch.equal(model.first.conv.weight, before["first.conv.weight"])
    assert not torch.equal(model.second.conv.weight, before["second.conv.weight"])
    model.first.requires_grad_()
    mults = repopt.grad_mults(model, scales(), degree=1)
    group = {"params": list(model.first.named_parameters("first")), "weight_decay": 0.01}
    optimizer.add_param_group(group | {"grad_mults": {"first.conv.weight": mults["first.conv.weight"]}})
    train(model, optimizer, batches(2))
    assert not torch.equal(model.first.conv.weight, before["first.conv.weight"])


def test_a_shared_kernel_has_one_multiplier():
    csla, target = (Net(mode).double() for mode in ("csla", "target"))
    for model in (csla, target):
        model.second = model.first
    one = {name: v for name, v in scales().items() if name.startswith("first")}
    for model in (csla, target):
        torch.manual_seed(0)
        repopt.initialize(model, one)
    target.load_state_dict({n: v for n, v in csla.state_dict().items() if n[:2] in ("bn", "he")}, strict=False)
    train(csla, repopt.build_optimizer("sgd", csla, **SGD), batches(5))
    train(target, repopt.build_optimizer("sgd", target, one, **SGD), batches(5))
    torch.testing.assert_close(csla.first.kernel(), target.first.kernel(), rtol=1e-11, atol=1e-13)


def test_a_kernel_in_two_blocks():
    model = net()
    model.second.conv.weight = model.first.conv.weight
    equal = scales()
    equal |= {name.replace("first", "second"): v for name, v in equal.items() if name.startswith("first")}
    assert repopt.grad_mults(model, equal, degree=1).keys() == {"first.conv.weight"}
    with pytest.raises(UserError, match=r"'second' shares its kernel with 'first.conv.weight', but has other scales"):
        repopt.grad_mults(model, scales(), degree=1)


@pytest.mark.cuda
def test_parameters_moved_after_construction():
    a, b = net(), net()
    optimizer = repopt.build_optimizer("sgd", b, scales(), **SGD)
    b.cuda()
    xs = batches(3)
    train(a, repopt.build_optimizer("sgd", a, scales(), **SGD), xs)
    train(b, optimizer, [x.cuda() for x in xs])
    assert_same(a, b.cpu())


def test_parameters_changed_after_construction():
    """Another dtype, another memory format, and other memory: the optimizer goes where the parameters are."""
    a, b = net(), net()
    settings = {**SGD, "implementation": "compiled"}
    optimizer = repopt.build_optimizer("sgd", b, scales(), **settings)
    xs = batches(6)
    b.float()
    b.double()
    a.load_state_dict(b.state_dict())
    train(a, repopt.build_optimizer("sgd", a, scales(), **SGD), xs)
    train(b, optimizer, xs[:2])
    b.to(memory_format=torch.channels_last)
    train(b, optimizer, xs[2:4])
    for param in b.parameters():
        param.data = param.data.clone()
    train(b, optimizer, xs[4:])
    assert_same(a, b)


def test_momentum_that_is_switched_on_later():
    a, b = net(), net()
    mults = repopt.grad_mults(a, scales(), degree=1)
    for model, how in ((a, "eager"), (b, "compiled")):
        optimizer = RepSGD(model.named_parameters(), lr=0.1, grad_mults=mults, implementation=how)
        train(model, optimizer, batches(2))
        optimizer.param_groups[0]["momentum"] = 0.9
        train(model, optimizer, batches(3, seed=4))
        assert all("momentum_buffer" in state for state in optimizer.state.values())
    assert_same(a, b)


WORKER = """
import sys
sys.path[:0] = [".", "tests", "tests/repopt", "scripts"]
import warnings, torch, torch.distributed as dist, repopt
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel
from test_ecosystem import SGD, batches, loss_of, net, scales, train

dist.init_process_group("gloo")
warnings.filterwarnings("error", "gradients were changed in place")
for rule in ("sgd", "adamw"):
    alone, sharded, wrapped = net(), net(), DistributedDataParallel(net(), gradient_as_bucket_view=True)
    handed = net()  # sharded when it has its optimizer already, as Accelerate does it
    late = repopt.build_optimizer(rule, handed, scales(), max_norm=1e3, **SGD)
    for model in (sharded, handed):
        for module in (model.first, model.second, model):
            fully_shard(module, mesh=torch.distributed.init_device_mesh("cpu", (2,)))
    for group in late.param_groups:
        group["params"] = [dict(handed.named_parameters())[name] for name in group["param_names"]]
    optimizers = [repopt.build_optimizer(rule, model, scales(), **SGD) for model in (alone, sharded, wrapped)]
    squares = [repopt.grad_mults(model, scales(), degree=1) for model in (alone, sharded)]
    for x in batches(4):
        norms = []
        for model, optimizer in zip((alone, sharded, wrapped), optimizers):
            optimizer.zero_grad()
            loss_of(model, x).backward()
        for model, mults in zip((alone, sharded), squares):
            norms.append(repopt.clip_grad_norm_(model.named_parameters(), 1e3, mults))
        torch.testing.assert_close(*norms, rtol=1e-12, atol=0)
        late.zero_grad()
        loss_of(handed, x).backward()
        for optimizer in (*optimizers, late):
            optimizer.step()
        torch.testing.assert_close(late.norm, norms[0], rtol=1e-12, atol=0)
    for (name, a), b, c in zip(alone.named_parameters(), sharded.parameters(), wrapped.parameters()):
        torch.testing.assert_close(a, b.full_tensor(), rtol=1e-12, atol=1e-14, msg=name)
        torch.testing.assert_close(a, handed.get_parameter(name).full_tensor(), rtol=1e-12, atol=1e-14, msg=name)
        torch.testing.assert_close(a, c, rtol=1e-12, atol=1e-14, msg=name)
    optimizers[2].zero_grad()
    loss_of(wrapped, x).backward()
    torch.nn.utils.clip_grad_norm_(wrapped.parameters(), 1e-3)
    try:
        optimizers[2].step()
        raise AssertionError("a clip by the plain norm was not seen")
    except repopt.EquivalenceWarning:
        pass
for params in (net().parameters(), net().named_parameters()):
    try:
        ZeroRedundancyOptimizer(params, repopt.RepSGD, lr=0.1, grad_mults=repopt.grad_mults(net(), scales(), degree=1))
    except (repopt.UserError, TypeError) as error:
        if dist.get_rank() == 0:
            print("refused:", error)
dist.destroy_process_group()
"""


def test_many_processes(tmp_path):
    """DDP and FSDP2 follow one process; ZeroRedundancyOptimizer, which hands over no names, is refused."""
    (tmp_path / "worker.py").write_text(WORKER)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*command, tmp_path / "worker.py"], cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("refused: a RepOptimizer takes named parameters") == 1, done.stdout
    assert done.stdout.count("refused: ") == 2, done.stdout
