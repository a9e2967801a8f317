"""The compiled step is the eager step, to rounding."""

import gc
import logging
import weakref

import check_equivalency
import pytest
import torch
from check_equivalency import BLOCKS, FIXED, SETTINGS

import repopt
from repopt.layers import RepConv2d
from repopt.optim import RULES, RepSGD
from repopt.optim.compiled import MAX_PROGRAMS, mult_layout

WIDE = check_equivalency.Setup(  # 16 input channels: the tiled layout
    repopt.Block(repopt.Target("conv", (32, 32, 3, 3)), BLOCKS["3x3 + 1x1 + identity"].block.branches)
)
MIXED = WIDE._replace(  # a matrix per filter
    block=repopt.Block(WIDE.block.target, FIXED["3x3 + Sobel x + Sobel y + Laplacian"].block.branches)
)
NETWORK = [*BLOCKS.values(), WIDE]
FEW = [BLOCKS["3x3 + 1x1 + identity"], BLOCKS["5x5 + 3x3 + 1x1"], WIDE]


def network(channels_last, setups=NETWORK):
    torch.manual_seed(0)
    model = torch.nn.ModuleList(RepConv2d(setup.block, "target") for setup in setups)
    model.append(torch.nn.BatchNorm2d(7)).append(torch.nn.Linear(3, 2))
    model = model.double()
    return model.to(memory_format=torch.channels_last) if channels_last else model


def scales_of(model):
    torch.manual_seed(1)
    names = [f"{path}.{b.searched_name}.weight" for path, m in repopt.declared_blocks(model) for b in m.block.branches]
    sizes = [m.block.target.shape[0] for _, m in repopt.declared_blocks(model) for _ in m.block.branches]
    return {name: torch.randn(size, dtype=torch.float64) for name, size in zip(names, sizes, strict=True)}


def trained(rule, implementation, channels_last, steps=3, strided=False, setups=NETWORK):
    model = network(channels_last, setups)
    name, settings = SETTINGS[rule]
    settings = settings | {"implementation": implementation}
    optimizer = repopt.build_optimizer(name, model, scales_of(model), **settings)
    generator = torch.Generator().manual_seed(2)
    gradients = []
    for step in range(steps):
        for param in model.parameters():
            gradient = torch.randn(param.shape, generator=generator, dtype=param.dtype)
            param.grad = gradient if strided else torch.empty_like(param).copy_(gradient)
            gradients.append((param, param.grad.clone()))
        optimizer.param_groups[0]["lr"] *= 0.9
        optimizer.step()
        assert all(torch.equal(param.grad, gradient) for param, gradient in gradients[-len(gradients) // (step + 1) :])
    assert optimizer.implementation == implementation
    return [param.detach() for param in model.parameters()]


@pytest.mark.parametrize("rule", SETTINGS)
def test_compiled_is_eager(rule):
    """Every block under a rule of either degree, some under every rule."""
    setups = NETWORK if rule in ("sgd", "adamw") else FEW
    compiled, eager = (trained(rule, way, False, setups=setups) for way in ("compiled", "eager"))
    for a, b in zip(compiled, eager, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("channels_last", [False, True])
def test_compiled_is_eager_where_entries_are_mixed(channels_last):
    setups = [*FIXED.values(), MIXED]
    compiled = trained("sgd", "compiled", channels_last, setups=setups)
    for a, b in zip(compiled, trained("sgd", "eager", False, setups=setups), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("strided", [False, True])
def test_channels_last(strided):
    compiled = trained("sgd", "compiled", True, strided=strided)
    for a, b in zip(compiled, trained("sgd", "eager", False), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("degree", [0, 1])
def test_the_layout_is_the_multiplier(degree, channels_last):
    model = network(channels_last)
    kernels = dict(model.named_parameters())
    for name, mult in repopt.grad_mults(model, scales_of(model), degree=degree).items():
        last = channels_last and not kernels[name].is_contiguous()
        layout = mult_layout(mult, channels_last=last)
        dense = mult.dense().movedim(1, -1) if last else mult.dense()
        laid_out = layout(torch.ones(layout.shape, dtype=torch.float64))
        torch.testing.assert_close(laid_out.reshape(-1), dense.reshape(-1), rtol=1e-15, atol=1e-15)


def test_multipliers_stay_small():
    model = network(False)
    for rule in RULES.values():
        optimizer = rule.rep(
            repopt.param_groups(model, 0.0),
            grad_mults=repopt.grad_mults(model, scales_of(model), degree=rule.rep.degree),
        )
        before = optimizer.multiplier_bytes()
        assert before > 0
        assert before == sum(tensor.nbytes for mult in optimizer.grad_mults.values() for tensor in mult.tensors())


@pytest.fixture
def warnings(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("repopt"), "propagate", True)
    with caplog.at_level("WARNING", logger="repopt"):
        yield caplog


def without_a_compiler(*_):
    raise torch._dynamo.exc.TorchDynamoException("no C++ compiler\nwas found")


@pytest.mark.parametrize("name", ["RepSGD", "BranchOptimizer"])
def test_where_compiling_fails_it_says_so_and_steps_eagerly(monkeypatch, warnings, name):
    monkeypatch.setattr(torch, "compile", lambda *_, **__: without_a_compiler)
    model = network(False)
    form = {"scales": scales_of(model)} if name == "RepSGD" else {"branches": repopt.hold_branches(model)}
    optimizer = repopt.build_optimizer("sgd", model, lr=0.1, momentum=0.9, implementation="compiled", **form)
    before = [param.detach().clone() for param in model.parameters()]
    for _ in range(3):
        for param in model.parameters():
            param.grad = torch.ones_like(param)
        optimizer.step()
    assert optimizer.implementation == "eager"
    assert [record.message for record in warnings.records] == [
        f"{name}: not compiled any more, so steps are eager and slower: no C++ compiler"
    ]
    assert not any(torch.equal(param, old) for param, old in zip(model.parameters(), before, strict=True))


def test_gradients_come_and_go_and_hyperparameters_change(warnings):
    """Each is another compiled function; a schedule of the momentum would be one a step, and is left to eager."""
    found = []
    for implementation in ("compiled", "eager"):
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 2).double()
        optimizer = RepSGD(model.named_parameters(), lr=0.1, momentum=0.9, grad_mults={}, implementation=implementation)
        for step in range(MAX_PROGRAMS + 10):
            for param in model.parameters():
                param.grad = torch.full_like(param, step)
            if step in (3, 5, 7):
                model.bias.grad = None  # the same two functions, again and again
            if step >= 9:
                optimizer.param_groups[0]["momentum"] = 0.9 - 0.01 * step
            optimizer.step()
            if step == 8 and implementation == "compiled":
                assert len(optimizer._compiled_update._update._programs) == 2
        found.append(torch.cat([param.detach().reshape(-1) for param in model.parameters()]))
    torch.testing.assert_close(*found, rtol=1e-13, atol=0)
    (record,) = warnings.records
    assert "change again and again" in record.message


def test_memory_that_is_replaced_is_followed():
    """Offloading the state and back; a gradient of another dtype."""
    found = []
    for implementation in ("compiled", "eager"):
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 2).bfloat16()
        model.weight.grad_dtype = model.bias.grad_dtype = None
        optimizer = RepSGD(model.named_parameters(), lr=0.1, momentum=0.9, grad_mults={}, implementation=implementation)
        for step, dtype in enumerate([torch.bfloat16] * 3 + [torch.float32] * 3):
            for param in model.parameters():
                param.grad = torch.full_like(param, step + 1, dtype=dtype)
            if step == 2:
                for state in optimizer.state.values():
                    state["momentum_buffer"].data = state["momentum_buffer"].data.clone()
            optimizer.step()
        found.append([state["momentum_buffer"] for state in optimizer.state.values()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=0)
        assert a.abs().min() > 15


def test_small_outer_kernels_keep_their_precision():
    """A 7x7 of tiny scales around a 5x5 of large ones: their difference would cancel."""
    block = repopt.Block(
        repopt.Target("conv", (16, 16, 7, 7)),
        (repopt.ConvBranch("a", "s", size=7), repopt.ConvBranch("b", "t", size=5)),
    )
    mult = block.grad_mult({"s": torch.full((16,), 1e-3), "t": torch.full((16,), 1.1)}, 1)
    layout = mult_layout(mult, channels_last=False)
    torch.testing.assert_close(layout(torch.ones(layout.shape)).view(mult.shape), mult.dense(), rtol=1e-6, atol=0)


def test_other_layouts_are_eager_and_it_says_so(warnings):
    weights = []
    for implementation in ("compiled", "eager"):
        generator = torch.Generator().manual_seed(0)
        odd = torch.nn.Parameter(torch.randn(2, 3, 4, generator=generator, dtype=torch.float64).permute(2, 0, 1))
        even = torch.nn.Parameter(torch.randn(2, 3, generator=generator, dtype=torch.float64))
        optimizer = RepSGD(
            [("odd", odd), ("even", even)], lr=0.1, momentum=0.9, grad_mults={}, implementation=implementation
        )
        optimizer._flat_params.flatten = lambda tasks: tasks  # both are small, and would be done as one
        for _ in range(3):
            odd.grad, even.grad = torch.ones_like(odd), torch.ones_like(even)
            optimizer.step()
        weights += [odd.detach(), even.detach()]
    assert torch.equal(weights[0], weights[2])
    torch.testing.assert_close(weights[1], weights[3], rtol=1e-14, atol=0)
    (record,) = warnings.records
    assert "neither contiguous nor channels_last" in record.message
    assert "1, the first of the shape (4, 2, 3)" in record.message


def test_auto_compiles_large_networks_only(monkeypatch):
    model = network(False)
    optimizer = repopt.build_optimizer("sgd", model, scales_of(model), lr=0.1)
    assert not optimizer._compiles()
    monkeypatch.setattr("repopt.optim.base.COMPILE_FROM", 1000)
    optimizer = repopt.build_optimizer("sgd", model, scales_of(model), lr=0.1)
    assert optimizer._compiles()


def test_what_was_compiled_is_freed_with_its_optimizer():
    """Also when a state is loaded, after which it is compiled anew: a sweep in one process does not grow."""
    layer = torch.nn.Linear(3, 3)
    optimizer = repopt.RepSGD(layer.named_parameters(), lr=0.1, momentum=0.9, grad_mults={}, implementation="compiled")
    codes = []
    for _ in range(3):
        for _ in range(2):
            layer(torch.ones(2, 3)).sum().backward()
            optimizer.step()
        assert optimizer.implementation == "compiled"
        codes.append(weakref.ref(optimizer._compiled_update._update._compiled._torchdynamo_orig_callable.__code__))
        optimizer.load_state_dict(optimizer.state_dict())
    del optimizer
    gc.collect()
    assert [code() for code in codes] == [None] * 3


class TestHeldBranches:
    """What is compiled of a step are the gradients of the branches and their sum, under any rule."""

    @pytest.mark.parametrize("rule", ["sgd", "lamb"])
    def test_it_is_the_eager_one(self, rule):
        found = []
        for implementation in ("eager", "compiled"):
            torch.manual_seed(0)
            model = network(False)
            settings = {"lr": 0.01, "weight_decay": 0.01, "momentum": 0.9, "implementation": implementation}
            optimizer = repopt.build_optimizer(rule, model, branches=repopt.hold_branches(model), **settings)
            for step in range(6):
                if step == 3:
                    optimizer.freeze_scales()
                for param in model.parameters():
                    param.grad = torch.randn_like(param)
                if step == 1:
                    next(iter(model.parameters())).grad = None
                optimizer.step()
            assert optimizer.implementation == implementation
            found.append(torch.cat([param.detach().reshape(-1) for param in model.parameters()]))
        torch.testing.assert_close(*found, rtol=1e-9, atol=1e-12)
