"""Faults, injected for real: one round of each here; all rounds with ``-m soak``, or by scripts/soak.sh."""

import json
from pathlib import Path

import pytest
import soak

ROUNDS = [(name, seed) for name, fault in soak.FAULTS.items() for seed in range(fault.rounds)]


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """What the rounds share."""
    return soak.Bench(tmp_path_factory.mktemp("soak"))


@pytest.mark.parametrize(
    ("name", "seed"), [pytest.param(*r, marks=[pytest.mark.soak] if r[1] else [], id=f"{r[0]} {r[1]}") for r in ROUNDS]
)
def test_a_training_survives(bench, monkeypatch, name, seed):
    monkeypatch.setattr(soak, "RESTARTS", 2 if not seed else soak.RESTARTS)
    result = soak.play(bench, name, seed)
    if not result.ran:
        pytest.skip(result.problem)
    assert not result.problem
    assert result.bytes_lost == 0


def test_what_is_lost_is_counted(bench, tmp_path):
    """A comparison that could not fail would prove nothing."""
    a, b = ({"model": {"w": soak.torch.zeros(3)}, "epoch": 1} for _ in range(2))
    assert soak.differing_bytes(a, b) == 0
    b["model"]["w"][1] = 1.0
    assert soak.differing_bytes(a, b) == 2  # 1.0 is 00 00 80 3f
    assert soak.differing_bytes(a, a | {"epoch": 2}) == 8
    assert soak.differing_bytes(a, {"epoch": 1}) == 8
    run = soak.Run(bench, tmp_path, [])
    run.files.mkdir(parents=True)
    for name in ("kept.pth", "spoiled.pth", "lost.pth"):
        soak.torch.save(a, run.files / name)
    size = (run.files / "lost.pth").stat().st_size
    with run.fault(run.files / "spoiled.pth"):
        (run.files / "spoiled.pth").write_bytes(b"")
        (run.files / "lost.pth").unlink()
    assert (run.faults, run.bytes_lost) == (1, size)


def test_the_document_shows_what_was_measured():
    root = Path(__file__).resolve().parents[2]
    measured = json.loads((root / "benchmarks" / "soak.json").read_text())
    text = (root / "docs" / "reliability.md").read_text()
    assert soak.as_table(measured["rows"]) in text
    for run in measured["runs"]:
        assert f"`{run['command']}`, {run['minutes']} minutes, {run['machine']}, {run['versions']}" in text
