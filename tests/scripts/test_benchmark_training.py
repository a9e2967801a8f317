"""`benchmark.py hyper-search` and `train` measure networks that are the same function, and count what they say."""

import argparse
import json

import benchmark
import pytest
import torch
from benchmarks.timing import Rounds
from benchmarks.training_step import TrainingStep
from reproduction import paper

import repopt
from benchmarks import hyper_search, one_run, training

CPU = torch.device("cpu")
NANO = "RepOpt-VGG-nano"


def run(subject, *arguments):
    parser = argparse.ArgumentParser()
    subject.add_arguments(parser)
    return dict(subject.run(parser.parse_args(arguments), CPU))


def test_hyper_search(monkeypatch):
    monkeypatch.setattr(hyper_search, "SIZES", {32: 2})
    monkeypatch.setattr(hyper_search, "BATCH", 4)
    steps, search = run(hyper_search, "--arch", NANO, "--rounds", "1", "--steps", "2").values()
    ways = ("branches held", "branches merged", "branch by branch")
    assert [row["step"] for row in steps] == ["plain network, RepSGD", *(f"hyper-search, {way}" for way in ways)]
    assert steps[0]["time / plain network"] == 1
    textbook, ours = search
    assert textbook["speed / textbook"] == 1
    minutes = f"extrapolated minutes of {hyper_search.STEPS:,} steps"
    assert ours[minutes] == pytest.approx(ours["ms per step"] / 6e4 * 390 * 240)


def test_parts_of_the_hyper_search(monkeypatch):
    monkeypatch.setattr(hyper_search, "SIZES", {32: 2, 64: 2})
    monkeypatch.setattr(hyper_search, "BATCH", 4)
    few = ["--arch", NANO, "--rounds", "1", "--steps", "1"]
    assert list(run(hyper_search, *few, "--only", "steps", "--image-size", "64")) == [
        f"A step of {NANO}, batches of 2 images of 64 x 64"
    ]
    (title,) = run(hyper_search, *few, "--only", "search", "--seconds", "0.001")
    assert title == f"The hyper-search of {NANO} on CIFAR-100: 1 steps of 4 images in a turn, 1 turns or 0.001 s"


def test_one_run_and_two():
    ((title, rows),) = run(one_run, "--epochs", "2", "--rounds", "1").items()
    assert title == "Trainings of RepOpt-VGG-nano on digits, 2 epochs"
    assert len(rows) == 4 and rows[0]["time / the target alone"] == 1
    assert all(row["s"] > 0 for row in rows)


def test_both_ways_of_searching_are_one_function():
    models = [repopt.create_model(NANO, mode="hs", num_classes=10).double() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    hyper_search.one_by_one(models[1])
    images = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(models[0](images), models[1](images), rtol=1e-10, atol=1e-10)


def test_train():
    tables = run(training, "--arch", NANO, "--batch-size", "4", "--image-size", "160", "--rounds", "1")
    rows, beside = tables.values()
    assert [(row["training"], row["batch"]) for row in rows] == [("RepOpt", 4), ("RepVGG", 4), ("textbook", 4)]
    repopt_row, repvgg_row, _ = rows
    assert repopt_row["speed / RepVGG"] == pytest.approx(repopt_row["images/s"] / repvgg_row["images/s"])
    assert 0 < repopt_row["MB per image"] < repvgg_row["MB per image"]
    (row,) = beside
    assert row["largest batch / RepVGG: here"] > 1
    assert row["speed / RepVGG: paper"] is None  # nano is none of the paper's


def test_train_without_largest_batches():
    (rows,) = run(
        training, "--arch", NANO, "--batch-size", "4", "--image-size", "32", "--rounds", "1", "--no-largest"
    ).values()
    assert [row["training"] for row in rows] == ["RepOpt", "RepVGG", "textbook"]
    assert list(rows[0]) == ["model", "training", "batch", "images/s", "speed / RepVGG", "MFU %"]


def test_a_batch_that_does_not_fit_is_made_smaller(monkeypatch):
    tried = []

    def speeds(makes, batch_size, rounds, peak):
        tried.append(batch_size)
        if batch_size > 95:
            raise torch.cuda.OutOfMemoryError
        return {"": {"batch": batch_size}}

    monkeypatch.setattr(training, "speeds", speeds)
    assert training.at_most(lambda size: None, 100, Rounds(1), 1.0) == {"batch": 94}
    assert tried == [100, 97, 94]


def test_of_a_gpu_97_percent_of_what_is_free_are_filled(monkeypatch):
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 5000))
    assert training.memory_of(torch.device("cuda")) == 970


def test_the_papers_ratios():
    own = {"RepOpt": {"speed / RepVGG": 2.0, "images/s": 7.0}}
    row = training.beside_the_paper("RepOpt-VGG-B1", own, {"RepOpt": 30, "RepVGG": 20})
    assert row["speed / RepVGG: paper"] == 380 / 213
    assert row["largest batch / RepVGG: paper"] == 260 / 198
    assert (row["largest batch: paper"], row["images/s: paper"], row["images/s: here"]) == (260, 380, 7)
    assert row["largest batch / RepVGG: here"] == 1.5


def test_the_papers_numbers_are_the_published_ones(shared):
    published = json.loads((shared / "contract" / "paper_tables.json").read_text())
    assert json.loads(paper.FILE.read_text()) == published


def test_memory_grows_with_the_batch():
    memory = training.memory(lambda size: TrainingStep(NANO, CPU, batch_size=size, image_size=160), 8)
    model = repopt.create_model(NANO, mode="target")
    weights = 4 * sum(param.numel() for param in model.parameters())
    assert 1.9 * weights < memory.fixed < 4.5 * weights  # weights, momentum, some gradients, what convolutions need
    assert memory.largest_batch(memory.fixed + 10.5 * memory.per_image) == 10
    assert memory.largest_batch(0) == 0


def test_the_textbooks_step_and_ours_do_the_same():
    shape = {"mode": "repvgg", "batch_size": 4, "image_size": 32}
    steps = [TrainingStep(NANO, CPU, **shape, textbook=textbook) for textbook in (False, True)]
    for step in steps:
        step()
    plain, textbook = (step.model.state_dict() for step in steps)
    for name, value in plain.items():
        torch.testing.assert_close(value, textbook[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("subject", ["train", "hyper-search"])
def test_mistakes_are_one_line(monkeypatch, capsys, subject):
    monkeypatch.setattr("sys.argv", ["benchmark.py", subject, "--arch", "RepOpt-VGG-nona"])
    assert benchmark.main() == 2
    assert "did you mean 'RepOpt-VGG-nano'" in capsys.readouterr().err.splitlines()[-1]
