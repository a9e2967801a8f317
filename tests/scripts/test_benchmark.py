"""The benchmark measures what it says; what it measures is no test's business."""

import json
import re

import benchmark
import pytest
import torch
from benchmarks.report import as_table
from benchmarks.timing import Rounds, interleave_times, peak_extra

from benchmarks import optimizer, start_up


def test_it_prints_and_keeps_a_table(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benchmark._root, "ROOT", tmp_path)
    monkeypatch.setattr(optimizer, "IMPLEMENTATIONS", ("eager",))
    monkeypatch.setattr("sys.argv", ["benchmark.py", "optimizer", "--arch", "RepOpt-VGG-nano", "--rounds", "2"])
    assert benchmark.main() == 0
    kept = json.loads((tmp_path / "benchmarks" / "optimizer-cpu.json").read_text())
    assert as_table(kept["tables"]["A step on the parameters of RepOpt-VGG-nano"]) in capsys.readouterr().out
    rows = {row["optimizer"]: row for row in kept["tables"]["A step on the parameters of RepOpt-VGG-nano"]}
    assert rows["torch SGD, fused"]["time / fused"] == rows["torch AdamW, fused"]["time / fused"] == 1
    assert rows["RepSGD, eager"]["state / parameters"] == 1
    assert rows["RepSGD, eager"]["multipliers / parameters"] < 0.02
    assert rows["naive RepSGD, dense multiplier"]["multipliers / parameters"] > 0.5
    assert re.search("RepAdamW, eager", " ".join(rows))


def test_a_run_that_is_cut_keeps_what_it_found(tmp_path, monkeypatch):
    def run(arguments, device):
        yield "first", [{"a": 1}]
        yield "second", [{"b": 1}]
        yield "second", [{"b": 1}, {"b": 2}]
        raise KeyboardInterrupt

    monkeypatch.setattr(optimizer, "run", run)
    file = tmp_path / "kept.json"
    monkeypatch.setattr("sys.argv", ["benchmark.py", "optimizer", "--json", str(file), "--rounds", "2"])
    with pytest.raises(KeyboardInterrupt):
        benchmark.main()
    kept = json.loads(file.read_text())
    assert kept["tables"] == {"first": [{"a": 1}], "second": [{"b": 1}, {"b": 2}]}
    assert kept["command"] == "python scripts/benchmark.py optimizer --rounds 2"


def test_no_round_begins_after_the_time_but_the_first():
    assert list(Rounds(3).in_time()) == list(Rounds(3, 60).in_time()) == [0, 1, 2]
    assert list(Rounds(3, 1e-9).in_time()) == [0]
    said = []
    assert list(Rounds(3, 1e-9).in_time(lambda own: said.append(own) or len(said) < 2)) == [0, 1]  # as others want it
    assert said == [False, False]
    times = interleave_times({"a": int, "b": int}, torch.device("cpu"), rounds=Rounds(5, 1e-9))
    assert [len(own) for own in times.values()] == [1, 1]


def test_peak_memory_counts_temporaries():
    x = torch.zeros(1000)
    assert peak_extra(lambda: (x + 1).sum(), torch.device("cpu")) == pytest.approx(4000, abs=64)
    assert peak_extra(lambda: x.add_(1), torch.device("cpu")) < 64


def test_the_naive_loop_leaves_gradients_alone():
    model = torch.nn.Linear(3, 2)
    model.weight.grad = torch.ones(2, 3)
    gradient, before = model.weight.grad, model.weight.detach().clone()
    step = optimizer.naive_step(model, torch.optim.SGD([model.weight], lr=0.5), {"weight": torch.full((2, 3), 4.0)})
    step()
    assert model.weight.grad is gradient
    torch.testing.assert_close(model.weight.detach(), before - 2)


def test_mistakes_are_one_line(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["benchmark.py", "optimizer", "--arch", "RepOpt-VGG-nona"])
    assert benchmark.main() == 2
    assert "did you mean 'RepOpt-VGG-nano'" in capsys.readouterr().err


def test_start_up_counts_the_cpu_seconds_of_other_processes():
    idle, busy = (
        start_up.cpu_seconds(["-c", f"import time\nwhile time.process_time() < {seconds}: pass"]) for seconds in (0, 1)
    )
    assert busy > 1
    assert idle < busy
