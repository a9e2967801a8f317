"""`benchmark.py scaling` measures what it says, counts right, and predicts what can be worked out by hand."""

import argparse
import math

import benchmark
import pytest
import torch
from benchmarks.training_step import TrainingStep
from torch import nn

import repopt
from benchmarks import scaling
from repopt.errors import UserError

CPU = torch.device("cpu")
NANO = "RepOpt-VGG-nano"


def parsed(*arguments):
    """Arguments of a command line."""
    parser = argparse.ArgumentParser()
    scaling.add_arguments(parser)
    return parser.parse_args(list(arguments))


@pytest.fixture(scope="module")
def tables():
    """A whole run, two processes among it."""
    small = ["--batch-size", "2", "--image-size", "32", "--image-sizes", "32", "64", "--rounds", "1", "--steps", "1"]
    arguments = parsed("--arch", NANO, "--models", NANO, "--step-ms", "100", "--latency", "1", *small)
    return dict(scaling.run(arguments, CPU))


def table(tables, beginning):
    """The rows of the one table whose title begins so."""
    (rows,) = (rows for title, rows in tables.items() if title.startswith(beginning))
    return rows


def test_processes_exchange_the_same_gradients_in_every_way(tables):
    alone, apart, *exchanging = table(tables, "Processes side by side")
    assert (alone["setting"], alone["processes"], alone["efficiency"]) == (scaling.ALONE, 1, 1)
    assert (apart["setting"], apart["processes"], apart["exchange ms"]) == (scaling.APART, 2, None)
    assert apart["gradients: difference to the mean"] > 0.01  # every process has images of its own
    assert len(exchanging) == 4
    for row in exchanging:
        assert row["gradients: difference to the mean"] < 1e-6
        assert row["exchange ms"] == pytest.approx(row["ms per step"] - apart["ms per step"])
        assert row["exchange / step"] == pytest.approx(row["exchange ms"] / row["ms per step"])
        assert row["images/s"] == pytest.approx(2 * 2 * 1e3 / row["ms per step"])
        assert row["efficiency"] == pytest.approx(row["images/s"] / (2 * alone["images/s"]))
    by_setting = {row["setting"]: row["peak MB per process"] for row in exchanging}
    model = repopt.create_model(NANO, mode="target")
    megabytes = scaling.gradient_bytes(model) / 1e6
    assert apart["peak MB per process"] > 3 * megabytes  # parameters, gradients, momentum
    assert by_setting[scaling.AFTERWARDS] > apart["peak MB per process"]
    assert by_setting[scaling.AFTERWARDS] > 4 * megabytes  # and the message


def test_the_all_reduce_is_of_all_gradients(tables):
    (row,) = table(tables, "All-reduce")
    parameters = sum(param.numel() for param in repopt.create_model(NANO, mode="target").parameters())
    assert row["MB"] == pytest.approx(4e-6 * parameters)
    assert row["GB/s sent per process"] == pytest.approx(row["MB"] / row["ms"])  # 2 (n - 1) / n = 1


def test_the_prediction_stands_beside_the_measurement(tables):
    settings = {row["setting"]: row["ms per step"] for row in table(tables, "Processes side by side")}
    (message,) = table(tables, "All-reduce")
    overlapped, afterwards = table(tables, "The model on paper beside")
    assert overlapped["measured ms per step"] == settings[scaling.DDP]
    assert afterwards["measured ms per step"] == settings[scaling.AFTERWARDS]
    assert afterwards["predicted ms per step"] == pytest.approx(settings[scaling.APART] + message["ms"])


def test_growth_has_a_row_per_model_and_image_size(tables):
    by_model = table(tables, "A step of one process on 1 threads, batches of 2 images, by model")
    by_size = table(tables, "A step of one process on 1 threads, batches of 2 images, by image size")
    assert [(row["model"], row["image size"]) for row in by_model] == [(NANO, 32)]
    assert [(row["model"], row["image size"]) for row in by_size] == [(NANO, 32), (NANO, 64)]
    small, large = by_size
    assert small == by_model[0]
    assert 3.5 < large["GFLOP per step"] / small["GFLOP per step"] < 4  # all but the classifier: four times
    for row in by_size:
        assert row["GFLOP/s"] == pytest.approx(row["GFLOP per step"] / row["ms per step"] * 1e3)
        assert row["images/s"] == pytest.approx(2e3 / row["ms per step"])


def test_operations_are_counted_forward_and_backward():
    step = TrainingStep(NANO, CPU, batch_size=2, image_size=32)
    forward, first = 0, None

    def count(module, inputs, output):
        nonlocal forward, first
        own = 2 * module.weight.numel() * output.numel() // output.size(1)
        first = first or own
        forward += own

    for module in step.model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(count)
    # Backward: gradients of the weights and of the inputs, but not of the images.
    assert step.flops() == 3 * forward - first
    assert all(param.grad is None for param in step.model.parameters())


def test_a_call_is_a_step_from_the_same_weights_on_the_same_images():
    first, second = (TrainingStep(NANO, CPU, batch_size=2, image_size=32, seed=3) for _ in range(2))
    other = TrainingStep(NANO, CPU, batch_size=2, image_size=32, seed=4)
    before = first.model.stage1[0].conv.weight.clone()
    for step in (first, second, other):
        step()
    assert not first.model.stage1[0].conv.weight.equal(before)
    assert first.model.stage1[0].conv.weight.equal(second.model.stage1[0].conv.weight)
    assert not first.model.stage1[0].conv.weight.equal(other.model.stage1[0].conv.weight)


FAST = {"bandwidth_bytes_per_s": 25e9, "latency_s": 1e-5}


@pytest.mark.parametrize(
    ("step", "size", "processes", "settings", "seconds"),
    [
        (0.3, 1e9, 1, {**FAST, "overlap": 0}, 0.3),  # alone: no exchange
        (0.3, 1e9, 2, {"bandwidth_bytes_per_s": 1e10, "latency_s": 0, "overlap": 0}, 0.3 + 0.1),
        (0.3, 1e9, 4, {"bandwidth_bytes_per_s": 1e10, "latency_s": 0, "overlap": 0}, 0.3 + 0.15),
        (0.3, 1e9, 4, {"bandwidth_bytes_per_s": 1e10, "latency_s": 0.01, "overlap": 0}, 0.3 + 0.15 + 0.06),
        (0.3, 1e9, 4, {"bandwidth_bytes_per_s": 1e10, "latency_s": 0, "overlap": 1}, 0.3),  # 0.15 within 0.2
        (0.3, 1e9, 4, {"bandwidth_bytes_per_s": 1e10, "latency_s": 0, "overlap": 0.5}, 0.3 + 0.05),
        (0.3, 1e9, 4, {"bandwidth_bytes_per_s": 5e9, "latency_s": 0, "overlap": 1}, 0.3 + 0.3 - 0.2),
        (0.3, 1e9, 1024, {"bandwidth_bytes_per_s": math.inf, "latency_s": 0, "overlap": 0}, 0.3),
        (0.3, 1e9, 101, {"bandwidth_bytes_per_s": math.inf, "latency_s": 0.001, "overlap": 0}, 0.3 + 0.2),
    ],
)
def test_predictions_worked_out_by_hand(step, size, processes, settings, seconds):
    found = scaling.predict(step, size, processes, **settings)
    assert found == pytest.approx(seconds)


def test_on_paper_says_what_is_assumed(tables):
    (title,) = (title for title in tables if title.startswith("On paper"))
    for part in (NANO, "Assumed: every process sends 25 GB/s", "1 µs", "100 ms is given, not measured", "4.2 MB"):
        assert part in title
    rows = tables[title]
    assert [row["processes"] for row in rows] == [8, 16, 64, 256, 1024]
    eight = rows[0]
    size = scaling.gradient_bytes(repopt.create_model(NANO, mode="target"))
    exchange = 1e3 * (2 * 7 / 8 * size / 25e9 + 14 * 1e-6)
    assert eight["exchange ms"] == pytest.approx(exchange)
    assert eight["ms per step, no overlap"] == pytest.approx(100 + exchange)
    assert eight["efficiency, no overlap"] == pytest.approx(100 / (100 + exchange))
    assert eight["ms per step, full overlap"] == 100 and eight["efficiency, full overlap"] == 1


def test_one_process_has_no_exchange():
    found = {scaling.ALONE: scaling.Measured(0.5)}
    only = dict(scaling.processes_tables(found, 1, parsed("--arch", NANO), 4))
    ((row,),) = only.values()
    assert row["images/s"] == 16 and row["efficiency"] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arch", "RepOpt-VGG-nona"], "unknown model 'RepOpt-VGG-nona'; did you mean 'RepOpt-VGG-nano'"),
        (["--models", NANO, "RepOpt-VGG-B11"], "unknown model 'RepOpt-VGG-B11'; did you mean 'RepOpt-VGG-B1'"),
        (["--batch-size", "1"], "--batch-size 1: batch norm needs at least 2 images"),
    ],
)
def test_mistakes_are_one_line(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["benchmark.py", "scaling", *arguments])
    assert benchmark.main() == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match="--processes 2, but there are 1 GPUs"):
        dict(scaling.run(parsed("--processes", "2"), torch.device("cuda")))


@pytest.mark.parametrize("argument", ["--bandwidth", "--latency", "--step-ms"])
@pytest.mark.parametrize("text", ["0", "-1", "nan", "fast"])
def test_numbers_are_above_zero(argument, text, capsys):
    with pytest.raises(SystemExit):
        parsed(f"{argument}={text}")
    assert f"{text!r} is not a number above 0" in capsys.readouterr().err
