"""Faults, injected for real: a round of the most telling ones here, all rounds of all by `bash scripts/soak.sh`.

Every round ends with a comparison: the weights, their moving average and the optimizer's state against those of a
training that nothing has happened to, byte by byte. "Bytes lost" are those of tensors that differ, and of checkpoints
that were whole before a fault and are not after it.
"""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from soak.faults import FAULTS, Result, play
from soak.record import as_row, as_table, keep
from soak.training import ROOT, Bench, Training, differing_bytes


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """What the rounds share."""
    return Bench(tmp_path_factory.mktemp("soak"))


def check(result):
    if not result.ran:
        pytest.skip(result.problem)
    assert not result.problem
    assert result.bytes_lost == 0


IN_SUITE = (
    "kill -9 while a checkpoint is written",
    "SIGTERM",
    "disk full",
    "second run in the folder",
    "rank killed, no launcher",
)


@pytest.mark.parametrize("name", IN_SUITE)
def test_a_training_survives_a_round(bench, name):
    check(play(bench, name, 0, restarts=2))


def pytest_generate_tests(metafunc):
    if metafunc.function is test_a_training_survives_every_round:
        option = metafunc.config.getoption
        names = option("faults", None) or FAULTS
        rounds = [
            (name, seed) for name in names for seed in range(1 if option("quick", False) else FAULTS[name].rounds)
        ]
        metafunc.parametrize(("name", "seed"), rounds, ids=[f"{name} {seed}" for name, seed in rounds])


@pytest.mark.soak
def test_a_training_survives_every_round(bench, record_property, name, seed):
    kept(result := play(bench, name, seed), name, record_property)
    check(result)


@pytest.mark.soak
def test_hostile_files(request, record_property):
    """Generated files with something wrong, for the readers of checkpoints, scales, zips and recipes."""
    if request.config.getoption("faults", None):
        pytest.skip("other faults are named")
    profile = "ci" if request.config.getoption("quick", False) else "soak"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "--hypothesis-show-statistics"]
    environment = os.environ | {"HYPOTHESIS_PROFILE": profile, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "tests/repopt/test_hostile.py"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    counts = re.findall(r"(\d+) passing, (\d+) failing", done.stdout)
    passing, failing = (sum(int(count[i]) for count in counts) for i in range(2))
    problem = done.stdout[-2000:] if done.returncode else ""
    kept(result := Result(passing + failing, passing, 0, problem), "hostile files", record_property)
    check(result)


def kept(result, name, record_property):
    """Let the table of scripts/soak.sh have what came of a round."""
    for key, value in {"fault": name, **vars(result)}.items():
        record_property(key, value)


# --- what counts


def test_what_is_lost_is_counted(tmp_path):
    """A comparison that could not fail would prove nothing."""
    a, b = ({"model": {"w": torch.zeros(3)}, "epoch": 1} for _ in range(2))
    assert differing_bytes(a, b) == 0
    b["model"]["w"][1] = 1.0
    assert differing_bytes(a, b) == 2  # 1.0 is 00 00 80 3f
    assert differing_bytes(a, a | {"epoch": 2}) == 8
    assert differing_bytes(a, {"epoch": 1}) == 8
    training = Training(None, tmp_path, [])
    training.files.mkdir(parents=True)
    for name in ("kept.pth", "spoiled.pth", "lost.pth"):
        torch.save(a, training.files / name)
    size = (training.files / "lost.pth").stat().st_size
    with training.fault(training.files / "spoiled.pth"):
        (training.files / "spoiled.pth").write_bytes(b"")
        (training.files / "lost.pth").unlink()
    assert (training.faults, training.bytes_lost) == (1, size)


def test_rounds_become_rows():
    assert [*as_row("x", [Result(3, 3, 0), Result(2, 2, 0)]).values()] == ["x", 2, 5, 5, 0, "equal"]
    assert [*as_row("x", [Result(3, 3, 8)]).values()] == ["x", 1, 3, 3, 8, "NOT EQUAL"]
    assert as_row("x", [Result(1, 0, 0, "round 0: exit code 1")])["final weights"] == "NOT EQUAL"
    assert as_row("x", [Result(0, 0, 0, "no right", ran=False)])["final weights"] == "not run: no right"


def test_rows_of_some_faults_take_the_places_of_theirs(tmp_path):
    path = tmp_path / "soak.json"
    every = [as_row(name, [Result(1, 1, 0)]) for name in (*FAULTS, "hostile files")]
    keep({"command": "a"}, every[:3] + every[4:], path)
    keep({"command": "b"}, [as_row("SIGTERM", [Result(7, 7, 0)]), every[3]], path)
    content = json.loads(path.read_text())
    assert [run["command"] for run in content["runs"]] == ["a", "b"]
    assert [row["fault"] for row in content["rows"]] == [row["fault"] for row in every]
    assert {row["fault"] for row in content["rows"] if row["injected"] == 7} == {"SIGTERM"}
    keep({"command": "c"}, every, path)
    assert json.loads(path.read_text()) == {"runs": [{"command": "c"}], "rows": every}


def test_the_document_shows_what_was_measured():
    measured = json.loads((ROOT / "benchmarks" / "soak.json").read_text())
    text = (ROOT / "docs" / "reliability.md").read_text()
    assert as_table(measured["rows"]) in text
    for run in measured["runs"]:
        assert f"`{run['command']}`, {run['minutes']} minutes, {run['machine']}, {run['versions']}" in text
