"""What only a GPU can show: `pytest -m cuda`.

Tests that take the fixture `device` are true on a CPU as well: REPOPT_TEST_DEVICE=cpu runs them there.
"""

import copy
import functools
import re
from argparse import Namespace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import test_detection
import test_segmentation
import torch
import torch.distributed as dist
from benchmarks.data import resident_loader
from benchmarks.infer import as_if_trained
from torch import nn
from train_helpers import run_epoch

import repopt
from benchmarks import device as of_the_device
from main_repopt import main
from repopt import quantization
from repopt.optim import RULES
from train.command import EXIT_DONE, EXIT_INTERRUPTED
from train.compilation import COMPILE_MODES, compiled
from train.distributed import World
from train.nonfinite import NonFiniteGuard
from train.parallel import average_statistics, data_parallel
from train.precision import Precision
from train.trainer import Trainer

pytestmark = pytest.mark.cuda
CUDA = torch.device("cuda")
README = Path(__file__).resolve().parents[2] / "README.md"
SETTINGS = {"lr": 0.01, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}


def network(mode="target", dtype=torch.float64):
    torch.manual_seed(0)
    return repopt.create_model("RepOpt-VGG-nano", mode=mode, num_classes=10).to(dtype)


def scales_of(model, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    found = repopt.constant_scales(model, "initial")
    return {name: 0.5 + torch.rand(v.shape, generator=generator, dtype=dtype) for name, v in found.items()}


def give_gradients(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for param in model.parameters():
        gradient = torch.randn(param.shape, generator=generator, dtype=torch.float64)
        param.grad = torch.empty_like(param).copy_(gradient)


def assert_same(here, there):
    for (name, p), q in zip(here.named_parameters(), there.parameters(), strict=True):
        torch.testing.assert_close(p, q.cpu(), rtol=1e-10, atol=1e-12, msg=name)


class Ingredients:
    """Of a training of nano, as `main_repopt.py` makes them."""

    def __init__(self, mode, device, dtype):
        self.model = network(mode, torch.float32).to(device, memory_format=torch.channels_last)
        scales = scales_of(self.model, torch.float32) if mode == "target" else None
        own = {"implementation": "compiled", "max_norm": 5.0} if scales else {}  # it clips by itself
        self.optimizer = repopt.build_optimizer("sgd", self.model, scales, **own, **SETTINGS)
        params = list(self.model.parameters())
        self.clip = None if scales else functools.partial(nn.utils.clip_grad_norm_, params, 5.0)
        self.precision = Precision(device, dtype)

    def train(self, batches, called=None, **hooks):
        """The mean loss of so many batches of 32 images."""
        pixels = np.random.default_rng(0).integers(0, 256, (batches * 32, 32, 32, 3), dtype=np.uint8)
        loader = resident_loader("cf100", pixels, self.precision.device, batch_size=32)
        world = World(0, 1, self.precision.device)
        settings = {"model": called, "precision": self.precision, "clip": self.clip, "world": world}
        return run_epoch(self.model, loader, self.optimizer, **settings, **hooks)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("implementation", ["eager", "compiled"])
@pytest.mark.parametrize("rule", sorted(RULES))
def test_steps_are_those_of_the_cpu(rule, implementation, layout, device):
    a = network()
    b = copy.deepcopy(a).to(device, memory_format=layout)
    scales = scales_of(a)
    settings = SETTINGS | ({"weight_decay": 0.0} if rule == "adam" else {})
    here = repopt.build_optimizer(rule, a, scales, implementation="eager", **settings)
    there = repopt.build_optimizer(rule, b, scales, implementation=implementation, **settings)
    for step, bad in enumerate((False, False, True, False)):
        for model in (a, b):
            give_gradients(model, step)
        there.found_inf, there.grad_scale = torch.tensor(float(bad), device=device), None
        there.step()
        if not bad:
            here.step()
    assert there.implementation == implementation  # it has not fallen back
    assert_same(a, b)


def test_clipping_is_that_of_the_cpu(device):
    a = network()
    b = copy.deepcopy(a).to(device, memory_format=torch.channels_last)
    mults = repopt.grad_mults(a, scales_of(a), degree=1)
    norms = []
    for model in (a, b):
        give_gradients(model, 0)
        norms.append(repopt.clip_grad_norm_(list(model.named_parameters()), 1.0, mults).cpu())
    torch.testing.assert_close(*norms, rtol=1e-10, atol=0.0)
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad.cpu(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("rate", [0.01, torch.tensor(0.01, dtype=torch.float64)], ids=["number", "tensor"])
def test_a_compiled_step_in_a_cuda_graph(rate):
    a = network()
    b = copy.deepcopy(a).to(CUDA, memory_format=torch.channels_last)
    plain = repopt.build_optimizer("sgd", a, scales_of(a), implementation="eager", **SETTINGS)
    rate = rate.to(CUDA) if isinstance(rate, torch.Tensor) else rate
    settings = SETTINGS | {"lr": rate, "implementation": "compiled"}
    captured = repopt.build_optimizer("sgd", b, scales_of(a), **settings)
    for model in (a, b):
        give_gradients(model, 0)
    for _ in range(3):  # the first makes the momentum, the second compiles
        captured.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.step()
    for _ in range(2):
        graph.replay()
    for _ in range(5):
        plain.step()
    assert captured.implementation == "compiled"
    assert_same(a, b)


@pytest.mark.parametrize("mode", ["hs", "target"])
def test_nothing_waits_for_the_device(monkeypatch, mode):
    """Between two reports a training only gives the device work."""
    schedule = mock.Mock()  # the first steps make state, and compile
    schedule.step_update = lambda step: torch.cuda.set_sync_debug_mode("error" if step >= 4 else "default")
    monkeypatch.setattr(Trainer, "report", lambda trainer, step: torch.cuda.set_sync_debug_mode("default"))
    try:
        Ingredients(mode, CUDA, torch.bfloat16).train(8, schedule=schedule, PRINT_FREQ=100)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_step_that_is_not_finite_is_left_out(dtype, device):
    if dtype is torch.float16 and device.type == "cpu":
        pytest.skip("CPUs have no fp16 training")
    of = Ingredients("target", device, dtype)
    model, scaler = of.model, of.precision.scaler
    guard = NonFiniteGuard(model, of.optimizer, device)
    images, labels = torch.randn(8, 3, 32, 32, device=device), torch.arange(8, device=device)
    for bad in (False, False, True, False):
        before = copy.deepcopy(model.state_dict())
        with of.precision.autocast():
            loss = nn.functional.cross_entropy(model(images * (torch.inf if bad else 1.0)), labels)
        scaler.scale(guard.nan_if_not_finite(loss)).backward()
        scaler.unscale_(of.optimizer)
        guard.step(None)
        scaler.update()
        of.optimizer.zero_grad()
        changed = any(not torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert changed != bad
    assert guard.skipped() == (1, 0)


@pytest.mark.parametrize("compile_mode", COMPILE_MODES)
@pytest.mark.parametrize("mode", ["hs", "target"])
def test_a_compiled_network_goes_the_way_of_the_eager_one(mode, compile_mode):
    eager, compiled = (Ingredients(mode, CUDA, None) for _ in range(2))
    loss = compiled.train(20, compiled(compiled.model, CUDA, compile_mode))
    assert loss == pytest.approx(eager.train(20), rel=1e-2)


def images_and_network(device):
    """As if trained: in a fresh network, gradients that pass the quantized batch norms are far too large."""
    images = torch.randn(8, 3, 32, 32, device=device).contiguous(memory_format=torch.channels_last)
    model = as_if_trained(network("target", torch.float32), images)
    return images, model.to(memory_format=torch.channels_last)


def test_quantization_after_training(device):
    images, model = images_and_network(device)
    observed = quantization.prepare(model, images, "ptq", "default")
    quantization.calibrate(observed, [images])
    int8 = quantization.convert(observed)
    there = int8(images).cpu()
    torch.testing.assert_close(int8.cpu()(images.cpu()), there, rtol=0.1, atol=0.1)


def test_quantization_by_training_on(device):
    images, model = images_and_network(device)
    labels = torch.arange(8, device=device)
    observed = quantization.prepare(model, images, "qat", "default")
    quantization.calibrate(observed, [images])
    optimizer = repopt.build_optimizer("sgd", observed, scales_of(model, torch.float32), **SETTINGS)
    guard = NonFiniteGuard(observed, optimizer, device)
    losses = []
    for bad in (False, True, False):
        before = copy.deepcopy(observed.state_dict())
        loss = nn.functional.cross_entropy(observed.train()(images * (torch.inf if bad else 1.0)), labels)
        guard.nan_if_not_finite(loss).backward()
        guard.step(None)
        optimizer.zero_grad()
        losses.append(loss.item())
        if bad:
            assert all(torch.equal(value, before[name]) for name, value in observed.state_dict().items())
    assert losses[2] < losses[0]


@pytest.mark.parametrize("task", ["segmentation", "detection"])
def test_ten_steps_of_other_tasks(task, device):
    torch.manual_seed(0)
    if task == "segmentation":
        model = test_segmentation.segmenter("target").float()
        images, labels = torch.randn(2, 3, 64, 64, device=device), torch.ones(2, 64, 64, device=device).long()

        def loss_of():
            return nn.functional.cross_entropy(model(images), labels)
    else:
        model = test_detection.detector().float()
        images, targets = test_detection.batch(dtype=torch.float32)
        images = [image.to(device) for image in images]
        targets = [{name: value.to(device) for name, value in target.items()} for target in targets]

        def loss_of():
            return sum(model(images, targets).values())

    scales = scales_of(model, torch.float32)
    model.to(device, memory_format=torch.channels_last)
    optimizer = repopt.build_optimizer("sgd", model, scales, lr=0.03, momentum=0.9)
    losses = []
    for _ in range(10):
        torch.manual_seed(0)  # of the boxes that are sampled
        with torch.autocast(device.type, torch.bfloat16):
            loss = loss_of()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_one_process_of_nccl(tmp_path):
    dist.init_process_group("nccl", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        parallel, alone = (Ingredients("target", CUDA, torch.bfloat16) for _ in range(2))
        found = parallel.train(6, data_parallel(compiled(parallel.model, CUDA), CUDA))
        average_statistics(parallel.model)
    finally:
        dist.destroy_process_group()
    assert found == pytest.approx(alone.train(6), rel=1e-2)


def test_a_training_that_is_stopped_ends_the_same(tmp_path, stopping, device):
    def train(tag):
        command = ["--arch", "RepOpt-VGG-nano-hs", "--cfg", "configs/digits/search.yaml", "--output", str(tmp_path)]
        options = ["--opts", "TRAIN.EPOCHS", "4", "DETERMINISTIC", "True", "SAVE_EVERY_STEPS", "3"]
        return main([*command, "--tag", tag, *options])

    try:
        assert train("whole") == EXIT_DONE
        with stopping():
            codes = [train("parts")]
            while codes[-1] == EXIT_INTERRUPTED:
                codes.append(train("parts"))
    finally:
        torch.use_deterministic_algorithms(mode=False)
    assert codes[-1] == EXIT_DONE and len(codes) > 4
    whole, parts = (
        repopt.checkpoint.read(tmp_path / "RepOpt-VGG-nano-hs" / tag / "latest.pth")["model"]
        for tag in ("whole", "parts")
    )
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())


def test_the_demos_accuracy(device):
    """That of README.md, means over seeds on a CPU in fp32, to 5 points: one seed in bf16; plain SGD is far below."""
    *_, (_, rows) = of_the_device.digits(Namespace(epochs=of_the_device.EPOCHS), device)
    found = {row["training"]: row["top-1 (%)"] for row in rows}
    for training, row in {"hyper-search": "searched network", "plain network": "plain network, RepOptimizer"}.items():
        documented = re.search(rf"^\| {row}[^|]*\| ([\d.]+)", README.read_text(), re.MULTILINE)
        assert found[training] > float(documented[1]) - 5
