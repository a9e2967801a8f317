"""How little a step asks of a device: every operation is a kernel that a GPU's host has to launch."""

import benchmark
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import repopt
from repopt.optim.compiled import _Scalars

ON_HOST = {  # they make views, or no tensors at all
    *("alias", "as_strided", "detach", "diagonal", "expand", "permute", "select", "slice", "split", "split_with_sizes"),
    *("t", "unbind", "unsqueeze", "view", "promote_types", "_record_function_enter_new", "_record_function_exit"),
}


class Operations(TorchDispatchMode):
    """Notes the names of operations that compute or copy something."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name not in ON_HOST:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def model():
    """28 kernels with multipliers and 58 other parameters, as the larger VGGs have, with gradients as on a GPU."""
    model = repopt.create_model("RepOpt-VGG-nano", mode="target", num_classes=10)
    model.to(memory_format=torch.channels_last)
    for param in model.parameters():
        param.grad = torch.randn_like(param)
    return model


@pytest.fixture
def on_device(monkeypatch):
    """As if only the device knew whether a step counts, and kernels were not cut into pieces for a cache."""
    monkeypatch.setattr("repopt.optim.base._on_host", lambda answer: False)
    monkeypatch.setattr("repopt.optim.update.CHUNK_NUMEL", 2**40)


def optimizer_of(model, rule, implementation):
    scales = repopt.constant_scales(model, "initial")
    settings = {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}
    optimizer = repopt.build_optimizer(rule, model, scales, implementation=implementation, **settings)
    optimizer.found_inf = torch.zeros(())
    return optimizer


def test_clipping(model):
    mults = repopt.grad_mults(model, repopt.constant_scales(model, "initial"), degree=1)
    with Operations() as seen:
        repopt.clip_grad_norm_(model.named_parameters(), 5.0, mults)
    assert len(mults) == 28
    assert len(seen.names) <= len(mults) + 20


@pytest.mark.parametrize(("rule", "most"), [("sgd", 460), ("adamw", 640)])
def test_an_eager_step(model, on_device, rule, most):
    optimizer = optimizer_of(model, rule, "eager")
    optimizer.step()
    optimizer.step()
    with Operations() as seen:
        optimizer.step()
    assert len(seen.names) <= most


@pytest.mark.parametrize(
    ("rule", "operations"),
    [
        ("sgd", ["fill_", "copy_"]),  # the rate, and whether the step is skipped
        ("adamw", ["fill_", "copy_", "copy_", "copy_", "copy_", "copy_"]),  # and two corrections of two groups
    ],
)
def test_scalars_of_a_compiled_step(monkeypatch, model, on_device, rule, operations):
    seen = Operations()
    write = _Scalars.set

    def watched(*arguments):
        with seen:
            write(*arguments)

    monkeypatch.setattr(_Scalars, "set", watched)
    monkeypatch.setattr("repopt.optim.compiled._update", lambda *arguments: None)
    optimizer = optimizer_of(model, rule, "compiled")
    optimizer.step()
    optimizer.step()
    assert seen.names == operations


def test_corrections_of_a_compiled_step(monkeypatch, model, on_device):
    """Numbers of steps that only the device knows are counted together."""
    monkeypatch.setattr("repopt.optim.compiled._update", lambda *arguments: None)
    optimizer = optimizer_of(model, "adamw", "compiled")
    optimizer.step()
    optimizer.step()
    with Operations() as seen:
        optimizer.step()
    assert len(seen.names) <= 60


def test_launches_are_counted_on_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["benchmark.py", "launches", "--device", "cpu"])
    assert benchmark.main() == 2
    assert capsys.readouterr().err == "benchmark.py: launches are counted on a GPU (--device cuda), not on cpu\n"
