"""Training and evaluation against the same written out plainly."""

import copy
import functools
import json
import math
import os
import random
import shutil
import signal
from pathlib import Path
from unittest import mock

import numpy
import pytest
import torch
from torch import nn
from train_helpers import CPU, Batches, Listed, Reports, make_state, network, run_epoch, three_blocks, trainer

import repopt
from repopt import checkpoint
from repopt.errors import UserError
from train import interruption
from train.checkpoint import RunFolder
from train.compilation import compiled
from train.distributed import AsyncMax, World
from train.evaluation.classification import evaluate
from train.interruption import Interrupted
from train.logging import Metrics
from train.nonfinite import NonFiniteGuard
from train.precision import Precision
from train.schedule import build_schedule
from train.state import TrainingState
from train.throughput import measure_throughput


def assert_same(a, b):
    for (name, p), q in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14, msg=name)


def test_an_epoch_is_the_plain_loop():
    a, b, loader = network(), network(), Batches()
    reports = Reports()
    optimizer = torch.optim.SGD(a.parameters(), lr=0.1, momentum=0.9)
    mean = run_epoch(a, loader, optimizer, reports=reports, PRINT_FREQ=2)
    optimizer, losses = torch.optim.SGD(b.parameters(), lr=0.1, momentum=0.9), []
    for images, targets in loader:
        loss = nn.functional.cross_entropy(b(images), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert_same(a, b)
    assert mean == pytest.approx(sum(losses) / 5, rel=1e-6)
    assert reports.steps == [2, 4, 5]
    for report, part in zip(reports.numbers, (losses[:2], losses[2:4], losses[4:]), strict=True):
        assert report["loss"] == pytest.approx(sum(part) / len(part), rel=1e-6)


@pytest.mark.parametrize("accumulation", [2, 3, 4, 7])
def test_accumulated_gradients_are_means_over_their_window(accumulation):
    a, b, loader = network(), network(), Batches(count=5)
    schedule = mock.Mock()
    optimizer = torch.optim.SGD(a.parameters(), lr=0.1)
    run_epoch(a, loader, optimizer, schedule=schedule, TRAIN__ACCUMULATION_STEPS=accumulation)
    optimizer, batches = torch.optim.SGD(b.parameters(), lr=0.1), list(loader)
    windows = [batches[i : i + accumulation] for i in range(0, 5, accumulation)]
    for window in windows:
        optimizer.zero_grad()
        torch.stack([nn.functional.cross_entropy(b(x), y) for x, y in window]).mean().backward()
        optimizer.step()
    assert_same(a, b)
    assert schedule.step_update.mock_calls == [mock.call(step) for step in range(len(windows))]


def test_clip_and_schedule_are_called_in_order():
    model, calls, reports = network(), [], Reports()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def clip():
        calls.append("clip")
        return torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)

    schedule = mock.Mock()
    schedule.step_update.side_effect = lambda step: calls.append(f"schedule {step}")
    state = TrainingState(model, optimizer, schedule, Precision(CPU), epoch=5)
    training = trainer(state, Batches(count=2), clip=clip)
    training.metrics = reports
    training.train_epoch()
    assert calls == ["schedule 10", "clip", "schedule 11", "clip"]
    assert reports.numbers[-1]["grad_norm"] > 0.01
    assert reports.steps[-1] == 12


@pytest.mark.parametrize("classes", [4, 10])
def test_evaluation_counts_every_image(classes):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, classes)).double()
    batches = [(torch.randn(n, 3, 2, 2, dtype=torch.float64), torch.randint(classes, (n,))) for n in (7, 7, 3)]
    found = evaluate(model, batches, Precision(CPU))
    logits = torch.cat([model(x) for x, _ in batches])
    targets = torch.cat([y for _, y in batches])
    assert found.images == 17
    assert found.top1 == pytest.approx(100 * float((logits.argmax(1) == targets).double().mean()))
    rank = (logits > logits.gather(1, targets[:, None])).sum(1)
    assert found.top5 == pytest.approx(100 * float((rank < 5).double().mean()))
    assert found.loss == pytest.approx(nn.functional.cross_entropy(logits, targets).item(), rel=1e-6)


@pytest.mark.parametrize("name", ["cosine", "linear", "poly", "step", "multistep"])
def test_schedules(name):
    optimizer = torch.optim.SGD(network().parameters(), lr=0.8)
    schedule = build_schedule(
        optimizer,
        name,
        steps_per_epoch=10,
        epochs=10,
        warmup_steps=20,
        warmup_lr=0.1,
        min_lr=0.2,
        decay_epochs=3,
        decay_rate=0.5,
        milestones=(7, 4),
        power=0.9,
    )
    rates = []
    for step in range(100):
        schedule.step_update(step)
        rates.append(optimizer.param_groups[0]["lr"])
    for step in range(20):
        assert rates[step] == pytest.approx(0.1 + step / 20 * 0.7)
    for step in range(20, 100):
        expected = {
            "cosine": 0.2 + 0.6 * (1 + math.cos(math.pi * step / 100)) / 2,
            "linear": 0.8 - 0.6 * step / 100,
            "poly": 0.2 + 0.6 * (1 - step / 100) ** 0.9,
            "step": 0.8 * 0.5 ** (step // 30),
            "multistep": 0.8 * 0.5 ** ((step >= 40) + (step >= 70)),
        }[name]
        assert rates[step] == pytest.approx(expected)
    with pytest.raises(UserError, match="did you mean 'cosine'"):
        build_schedule(optimizer, "cosin", steps_per_epoch=1, epochs=1, warmup_steps=0)


def test_fp16_scaling_needs_no_gpu_to_be_off():
    assert not Precision(CPU).scaler.is_enabled()
    assert not Precision(CPU, torch.bfloat16).scaler.is_enabled()


def fit(state, folder, epochs, **arguments):
    folder.mkdir(exist_ok=True)
    trainer(state, folder=folder, TRAIN__EPOCHS=epochs, **arguments).fit()


def test_a_resumed_training_is_the_uninterrupted_one(tmp_path):
    whole = make_state(network(dropout=0.3))
    fit(whole, tmp_path / "whole", 4, TRAIN__EMA_UPDATE_PERIOD=2)
    first = make_state(network(dropout=0.3))
    fit(first, tmp_path / "part", 2, TRAIN__EMA_UPDATE_PERIOD=2)
    with (tmp_path / "part" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 11, "tra')  # it was killed while writing
    second = make_state(network(seed=9, dropout=0.3))
    second.load_state_dict(checkpoint.read(tmp_path / "part" / "latest.pth"))
    assert second.epoch == 2
    fit(second, tmp_path / "part", 4, TRAIN__EMA_UPDATE_PERIOD=2)
    for a, b in ((whole.model, second.model), (whole.ema.module, second.ema.module)):
        for (name, p), q in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
            assert torch.equal(p, q), name
    assert (whole.max_accuracy, whole.max_ema_accuracy) == (second.max_accuracy, second.max_ema_accuracy)
    steps = [json.loads(line)["step"] for line in (tmp_path / "part" / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)


def test_randomness_differs_by_batch_epoch_and_process(tmp_path, monkeypatch):
    monkeypatch.setattr("train.trainer.average_statistics", lambda model: None)
    drawn = []

    def draw():
        drawn.append((*torch.rand(4).tolist(), random.random(), *numpy.random.rand(2)))
        return torch.zeros(())

    for rank in (0, 1):
        fit(make_state(network()), tmp_path / f"{rank}", 2, world=World(rank, 2, CPU), clip=draw)
    assert len({values[part] for values in drawn for part in range(7)}) == 7 * len(drawn) == 140


def test_the_moving_average():
    a, b = network(), network()
    state = make_state(a)
    expected = [value.clone() for value in b.state_dict().values()]
    run_epoch(a, Batches(count=6), state.optimizer, ema=state.ema, TRAIN__EMA_UPDATE_PERIOD=2)
    optimizer = torch.optim.SGD(b.parameters(), lr=0.0, momentum=0.9)
    optimizer.param_groups[0]["lr"] = state.optimizer.param_groups[0]["lr"]
    for step, (images, targets) in enumerate(Batches(count=6), start=1):
        optimizer.zero_grad()
        nn.functional.cross_entropy(b(images), targets).backward()
        optimizer.step()
        if step % 2 == 0:
            for average, value in zip(expected, b.state_dict().values(), strict=True):
                average.copy_(0.8 * average + 0.2 * value if value.is_floating_point() else value)
    for found, average in zip(state.ema.module.state_dict().values(), expected, strict=True):
        torch.testing.assert_close(found, average, rtol=1e-12, atol=1e-14)


def test_files_of_a_run(tmp_path):
    state = make_state(network(), average=False)
    fit(state, tmp_path / "run", 4, SAVE_FREQ=3, TEST__PERIOD=3)
    names = {path.name for path in Path(tmp_path / "run").iterdir() if "tfevents" not in path.name}
    checkpoints = {"latest.pth", "latest_1.pth", "best_ckpt.pth", "ckpt_epoch_2.pth", "ckpt_epoch_3.pth"}
    assert names == checkpoints | {"metrics.jsonl"}
    content = checkpoint.read(tmp_path / "run" / "latest.pth")
    assert {"model", "optimizer", "lr_scheduler", "max_accuracy", "epoch", "config"} <= content.keys()
    assert (content["epoch"], content["config"]["TEST"]) == (3, {"CROP": False, "PERIOD": 3})
    assert any("tfevents" in path.name for path in (tmp_path / "run").iterdir())


def test_a_training_that_is_saved_less_often_goes_on_from_the_last_time(tmp_path):
    losses = []

    def killed_in_the_fourth_epoch(outputs, targets):
        losses.append(nn.functional.cross_entropy(outputs, targets))
        if len(losses) > 3 * len(Batches()):
            raise SystemExit
        return losses[-1]

    def train(name, state, **arguments):
        fit(state, tmp_path / name, 5, SAVE_EVERY_MINUTES=1e4, SAVE_FREQ=2, TEST__PERIOD=5, **arguments)

    def saved(name):
        return checkpoint.read(tmp_path / name / "latest.pth")

    train("whole", make_state(network(dropout=0.3)))
    with pytest.raises(SystemExit):
        train("part", make_state(network(dropout=0.3)), criterion=killed_in_the_fourth_epoch)
    assert not (tmp_path / "part" / "latest_1.pth").exists()
    state = make_state(network(seed=9, dropout=0.3))
    state.load_state_dict(saved("part"))
    assert state.epoch == 2
    train("part", state)
    whole, part = saved("whole"), saved("part")
    assert whole["epoch"] == part["epoch"] == 4
    for values in (lambda content: content["optimizer"]["state"], lambda content: content["model"]):
        torch.testing.assert_close(values(part), values(whole), rtol=0, atol=0)


def test_checkpoints_of_another_training_are_refused(tmp_path):
    state = make_state(network())
    content = state.state_dict()
    adam = torch.optim.AdamW([{"params": [p]} for p in network().parameters()])
    with pytest.raises(UserError, match="optimizer is not that of this run"):
        make_state(network()).load_state_dict(content | {"optimizer": adam.state_dict()})


@pytest.mark.parametrize(
    "damage",
    [
        lambda saved: saved["state"][0].update(momentum_buffer=torch.zeros(3)),
        lambda saved: saved["param_groups"][0]["param_names"].reverse(),
        lambda saved: saved["param_groups"].clear(),
        lambda saved: saved.pop("state"),
        lambda saved: saved["state"].update({0: torch.zeros(3)}),
        lambda saved: saved["state"][0].update(momentum_buffer=3),
        lambda saved: saved["state"][0].update(momentum_buffer="text"),
        lambda saved: saved["state"][0].update(momentum_buffer=torch.tensor(1.0)),
        lambda saved: saved["state"][0]["momentum_buffer"].fill_(math.nan),
        lambda saved: saved["state"][0].update(momentum_buffer=torch.zeros(8, 12, dtype=torch.complex64)),
        lambda saved: saved["param_groups"][0].update(params=torch.zeros(3)),
    ],
    ids=["shape", "order", "groups", "no state", "entry", "int", "text", "scalar", "nan", "complex", "params"],
)
def test_damaged_optimizer_states_are_refused(damage):
    state = make_state(network())
    run_epoch(state.model, Batches(), state.optimizer)
    content = copy.deepcopy(state.state_dict())
    make_state(network()).load_state_dict(copy.deepcopy(content))
    damage(content["optimizer"])
    with pytest.raises(UserError, match="optimizer is not that of this run"):
        make_state(network()).load_state_dict(content)


@pytest.mark.parametrize(
    "odd",
    [
        {"epoch": math.inf},
        {"epoch": 2**200},
        {"epoch": 1.5e10},
        {"epoch": True},
        {"max_accuracy": math.nan},
        {"max_accuracy": 1e9},
        {"max_ema_accuracy": "x" * 10**6},
        {"skipped": torch.ones(3)},
        {"scaler": "text"},
        {"scaler": [1]},
        {"scaler": torch.ones(3)},
        {"buffers": 3},
        {"buffers": [{}]},
        {"buffers": [{"val": {"2.running_mean": torch.zeros(5)}}]},
        {"optimizer": torch.zeros(3)},
        {"optimizer": "text"},
        {"optimizer": None},
    ],
)
def test_odd_records_of_a_training_are_refused_in_one_line(odd):
    with pytest.raises(UserError) as error:
        make_state(network()).load_state_dict(make_state(network()).state_dict() | odd)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400


def test_the_configuration_wins_over_the_checkpoint():
    content = make_state(network()).state_dict()
    state = make_state(network())
    state.optimizer.param_groups[0]["weight_decay"] = 0.3
    state.load_state_dict(content)
    assert state.optimizer.param_groups[0]["weight_decay"] == 0.3


@pytest.mark.parametrize("key", ["model", "state_dict"])
def test_weights_alone_start_a_training(key):
    weights = network(seed=3).state_dict()
    state = make_state(network())
    state.load_state_dict({key: weights, "ema": None})
    assert state.epoch == 0
    for model in state.models().values():
        assert torch.equal(model[1].weight, weights["1.weight"])


def test_a_diverged_training_stops_and_keeps_what_was_good(tmp_path):
    state = make_state(network())
    fit(state, tmp_path / "run", 1)
    state.model[1].weight.data[0, 0] = float("nan")
    with pytest.raises(UserError, match=r"weights are not finite any more; the last good checkpoint is .*latest\.pth"):
        fit(state, tmp_path / "run", 4)
    state.epoch = 1
    with pytest.raises(UserError, match=r"diverged in epoch 2: .* in 5 steps in a row, .* good checkpoint is .*latest"):
        fit(state, tmp_path / "run", 4, TRAIN__MAX_SKIPPED_STEPS=5)
    kept = checkpoint.read(tmp_path / "run" / "latest.pth")
    assert kept["epoch"] == 0
    assert torch.isfinite(kept["model"]["1.weight"]).all()
    for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


class Spoiled(Batches):
    """Some batches are infinite; or they are missing, which comes to the same."""

    def __init__(self, spoiled, missing):
        super().__init__(count=8)
        self.spoiled, self.missing = spoiled, missing

    def __len__(self):
        return super().__len__() - (len(self.spoiled) if self.missing else 0)

    def __iter__(self):
        for number, (images, targets) in enumerate(super().__iter__()):
            if number not in self.spoiled:
                yield images, targets
            elif not self.missing:
                yield images * math.inf, targets


class SpoiledFloats(Spoiled):
    def __iter__(self):
        return ((images.float(), targets) for images, targets in super().__iter__())


def build(name, model):
    settings = {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}
    if name == "torch, not fused":
        return torch.optim.SGD(model.parameters(), **settings)
    return repopt.build_optimizer(name, model, **settings)


@pytest.mark.parametrize("name", ["sgd", "adamw", "rmsprop", "torch, not fused"])
@pytest.mark.parametrize("clips", [False, True])
def test_steps_that_are_not_finite_are_as_if_they_had_not_been(name, clips):
    a, b = network(), network()
    for model, missing in ((a, True), (b, False)):
        clip = functools.partial(nn.utils.clip_grad_norm_, list(model.parameters()), 0.5) if clips else None
        loader, reports = Spoiled({0, 3, 4, 7}, missing), Reports()
        mean = run_epoch(model, loader, build(name, model), clip=clip, reports=reports, PRINT_FREQ=3)
    for (key, p), q in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        assert torch.equal(p, q), key
    assert math.isfinite(mean)
    assert [numbers["skipped_steps"] for numbers in reports.numbers] == [1, 3, 4]


@pytest.mark.parametrize("name", ["sgd", "adamw", "adam", "rmsprop", "torch, not fused"])
def test_the_device_is_asked_only_where_something_is_reported(monkeypatch, name):
    """However many steps there are: on a GPU each question would wait for it."""
    monkeypatch.setattr("repopt.optim.base._on_host", lambda answer: False)  # as there
    asked = []
    for question in ("item", "tolist", "__bool__", "__int__", "__float__", "cpu"):
        plain = getattr(torch.Tensor, question)
        monkeypatch.setattr(torch.Tensor, question, lambda *a, plain=plain, q=question: (asked.append(q), plain(*a))[1])
    counts = []
    for batches in (4, 12):
        model, loader = network(), Batches(count=batches)
        clip = functools.partial(repopt.clip_grad_norm_, list(model.named_parameters()), 0.5, {})
        optimizer = build(name, model)
        asked.clear()
        run_epoch(model, loader, optimizer, clip=clip, PRINT_FREQ=100)
        counts.append(len(asked))
    assert (counts[0] == counts[1]) is (name != "torch, not fused")


def test_a_loss_that_is_not_finite_counts_though_its_gradients_are():
    model, calls = network(), []

    def criterion(logits, targets):
        calls.append(1)
        return nn.functional.cross_entropy(logits, targets) + (math.inf if len(calls) == 2 else 0.0)

    reports = Reports()
    run_epoch(model, Batches(), torch.optim.SGD(model.parameters(), lr=0.1), criterion=criterion, reports=reports)
    assert reports.numbers[-1]["skipped_steps"] == 1


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_buffers_of_any_layout_stay_what_the_last_good_step_left(layout):
    """As they are now, not as they were when the training began."""
    model = nn.Linear(2, 2)
    model.register_buffer("seen", torch.randn(2, 3, 4, 5).contiguous(memory_format=layout))
    safeguard = NonFiniteGuard(model, torch.optim.SGD(model.parameters(), fused=True), CPU)
    for norm in (1.0, math.inf, 1.0):
        before = model.seen.clone()
        model.seen += 1
        safeguard.step(torch.tensor(norm))
        assert torch.equal(model.seen, before + 1 if norm == 1.0 else before)
        assert model.seen.is_contiguous(memory_format=layout)


def test_skipped_steps_are_counted_through_restarts(tmp_path):
    state = make_state(network())
    fit(state, tmp_path / "run", 1, loader=Spoiled({1, 2}, missing=False))
    resumed = make_state(network())
    resumed.load_state_dict(checkpoint.read(tmp_path / "run" / "latest.pth"))
    fit(resumed, tmp_path / "run", 2, loader=Spoiled({1, 2}, missing=False))
    assert (state.skipped, resumed.skipped) == (2, 4)


def stop_after(step, number=signal.SIGTERM):
    """A criterion during which this process gets a signal."""
    calls = []

    def criterion(logits, targets):
        calls.append(1)
        if len(calls) == step:
            os.kill(os.getpid(), number)
        return nn.functional.cross_entropy(logits, targets)

    return criterion


@pytest.mark.parametrize("number", interruption.STOPPING)
@pytest.mark.parametrize("batch", [1, 3, 5, 7, 15])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_training_stopped_by_a_signal_goes_on_as_if_it_had_not_been(tmp_path, request, number, batch, accumulation):
    # In the background of a shell SIGINT is ignored, and stays so.
    request.addfinalizer(functools.partial(signal.signal, number, signal.signal(number, signal.SIG_DFL)))
    settings = {"TRAIN__EMA_UPDATE_PERIOD": 2, "TRAIN__ACCUMULATION_STEPS": accumulation}
    whole = make_state(network(dropout=0.3))
    fit(whole, tmp_path / "whole", 3, **settings)
    first = make_state(network(dropout=0.3))
    with pytest.raises(Interrupted, match=f"stopped by {number.name} and saved in .*latest.pth"):
        fit(first, tmp_path / "part", 3, criterion=stop_after(batch, number), **settings)
    assert signal.getsignal(number) is not None
    epoch, within = divmod(batch - 1, 5)
    assert (first.epoch, sum(first.seen)) == (epoch, min(-(-(within + 1) // accumulation) * accumulation, 5))
    second = make_state(network(seed=9, dropout=0.3))
    second.load_state_dict(checkpoint.read(tmp_path / "part" / "latest.pth"))
    fit(second, tmp_path / "part", 3, **settings)
    for a, b in ((whole.model, second.model), (whole.ema.module, second.ema.module)):
        for (name, p), q in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
            assert torch.equal(p, q), name
    assert (whole.max_accuracy, whole.max_ema_accuracy) == (second.max_accuracy, second.max_ema_accuracy)
    for a, b in zip(whole.optimizer.param_groups, second.optimizer.param_groups, strict=True):
        assert a["lr"] == b["lr"]


def test_a_signal_during_an_evaluation(tmp_path):
    whole, first, second = (make_state(network()) for _ in range(3))
    fit(whole, tmp_path / "whole", 2)

    class Stopping(Batches):
        def __iter__(self):
            os.kill(os.getpid(), signal.SIGUSR1)
            return super().__iter__()

    with pytest.raises(Interrupted):
        fit(first, tmp_path / "part", 2, val_loader=Stopping(count=2))
    assert (first.epoch, first.seen) == (0, [5])
    second.load_state_dict(checkpoint.read(tmp_path / "part" / "latest.pth"))
    fit(second, tmp_path / "part", 2)
    assert_same(whole.model, second.model)
    assert whole.max_accuracy == second.max_accuracy


def test_a_late_answer_to_a_vote_saves_once(tmp_path, monkeypatch):
    """With several processes what the first one asks for is known one step later."""

    class Late(AsyncMax):
        known = 0

        def push(self, number):
            self.known, known = number, self.known
            return known

        def sync(self, number):
            return max(self.push(number), self.push(0))

    saved, clock = [], iter(range(10**6))
    monkeypatch.setattr("train.trainer.AsyncMax", Late)
    monkeypatch.setattr("train.trainer.time.monotonic", lambda: 60.0 * next(clock))
    save = RunFolder.save
    monkeypatch.setattr(
        RunFolder, "save", lambda folder, content, names=(): (saved.append(sum(content["seen"])), save(folder, content))
    )
    fit(make_state(network()), tmp_path / "run", 1, loader=Batches(count=12), SAVE_EVERY_MINUTES=4.0)
    assert saved == [5, 10, 0]


def test_an_average_that_begins_when_a_run_of_several_processes_is_resumed():
    state = make_state(network(), average=False)
    content = state.state_dict() | {"buffers": [state.buffers(), state.buffers()]}
    make_state(network(), average=True).load_state_dict(content, rank=1, processes=2)


def test_what_was_written_after_the_checkpoint_is_dropped(tmp_path):
    kept = [
        '{"step": 4, "a": 1}',  # as it was written before images were noted
        '{"step": 9, "images": 40}',
        '{"step": 9, "images": 40, "epoch": 1}',
    ]
    dropped = ['{"step": 5, "images": 50, "epoch": 2}', '{"step": 5, "images": 41}', '{"step": 6}', "[]", '{"st']
    (tmp_path / "metrics.jsonl").write_text("\n".join(kept + dropped))
    with Metrics(tmp_path, epochs=1, images=40, step=5):
        pass
    assert (tmp_path / "metrics.jsonl").read_text().splitlines() == kept


def test_what_was_recorded_outlives_another_number_of_images_per_step(tmp_path):
    """Steps are counted anew then: 5 an epoch of 6 images each before, 3 of 10 each after."""
    state = make_state(network())
    fit(state, tmp_path / "run", 2, PRINT_FREQ=2)
    before = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    fit(state, tmp_path / "run", 3, loader=Batches(count=3, size=10), PRINT_FREQ=2)
    after = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert after[: len(before)] == before
    assert [record["epoch"] for line in after if "epoch" in (record := json.loads(line))] == [1, 2, 3]


@pytest.mark.parametrize("settings", [{"SAVE_EVERY_STEPS": 2}, {"SAVE_EVERY_MINUTES": 1e-9}])
def test_checkpoints_within_epochs(tmp_path, monkeypatch, settings):
    positions = []
    save = RunFolder.save

    def kept(folder, content, names=()):
        positions.append((content["epoch"] + 1, sum(content["seen"])))
        save(folder, content, names)

    monkeypatch.setattr(RunFolder, "save", kept)
    fit(make_state(network()), tmp_path / "run", 2, **settings)
    steps = (2, 4, 6, 8, 10) if "SAVE_EVERY_STEPS" in settings else range(1, 11)
    within = [((step - 1) // 5, (step - 1) % 5 + 1) for step in steps]
    assert positions == sorted([*within, (1, 0), (2, 0)])


def test_fp16_gradients_are_clipped_unscaled():
    """The norm that clipping sees is that of the true gradients, not of the scaled ones."""
    norms = []
    for dtype in (None, torch.float16):
        model, reports = network().float(), Reports()
        clip = functools.partial(nn.utils.clip_grad_norm_, list(model.parameters()), 1e9)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        run_epoch(
            model,
            SpoiledFloats(set(), missing=False),
            optimizer,
            precision=Precision(CPU, dtype),
            clip=clip,
            reports=reports,
        )
        norms.append(reports.numbers[-1]["grad_norm"])
    assert norms[1] == pytest.approx(norms[0], rel=0.02)


@pytest.mark.parametrize("name", ["sgd", "adamw", "torch, not fused"])
def test_fp16_steps_are_those_of_a_grad_scaler(name):
    """Overflows too: the steps that it leaves out, and the scale that it goes on with."""
    a, b = network().float(), network().float()
    batches, reports = SpoiledFloats({2, 3}, missing=False), Reports()
    precision, criterion = Precision(CPU, torch.float16), nn.functional.cross_entropy
    run_epoch(a, batches, build(name, a), precision=precision, reports=reports)
    optimizer, scaler, skipped = build(name, b), torch.amp.GradScaler("cpu"), 0
    for images, targets in batches:
        with torch.autocast("cpu", torch.float16):
            loss = criterion(b(images), targets)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        before = scaler.get_scale()
        scaler.update()
        skipped += scaler.get_scale() < before
    assert skipped >= 2
    assert reports.numbers[-1]["skipped_steps"] == skipped
    assert precision.scaler.state_dict() == scaler.state_dict()
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.equal(p, q)


def test_throughput():
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    speed = measure_throughput(model, batch_size=4, image_size=8, precision=Precision(CPU), seconds=0.01)
    assert speed > 0


class TestCompiled:
    """A compiled model is trained as the model itself is, which stays what it was."""

    @pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="there is no C++ compiler")
    @pytest.mark.parametrize("mode", ["hs", "target"])
    def test_it_follows_the_eager_one(self, mode):
        losses = []
        for change in (lambda model: model, lambda model: compiled(model, CPU)):
            model = three_blocks(mode)
            trained = change(model)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
            images = torch.randn(4, 8, 3, 32, 32, dtype=torch.float64)
            targets = torch.randint(10, (4, 8))
            own = [
                run_epoch(model, Listed([batch]), optimizer, model=trained)
                for batch in zip(images, targets, strict=True)
            ]
            losses.append(torch.tensor([*own, model.eval()(images[0]).sum().item()]))
        torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)  # the mean of losses is summed in fp32

    def test_where_it_does_not_work_is_one_line(self, monkeypatch):
        def broken(function, **arguments):
            raise RuntimeError("no compiler\nfound")

        monkeypatch.setattr(torch, "compile", broken)
        with pytest.raises(UserError, match=r"^torch.compile does not work here: no compiler found$"):
            compiled(nn.Linear(2, 2), CPU)
