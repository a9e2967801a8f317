"""Which branches help a plain network: every way trains, and what is done is not done again."""

import json

import pytest
import study_branches
import study_prior
from study_branches import BLOCKS, FUNCTIONS, PLAIN, WAYS, Run, main, train


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(study_prior, "STEPS", 2)
    monkeypatch.setattr(study_prior, "evaluate", lambda *_: 50.0)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("branches", BLOCKS)
def test_every_way_trains(branches, way):
    if branches in FUNCTIONS and way != "one run":
        pytest.skip("no constants follow it")
    assert train(Run("digits", branches, way, 0.01, 0)) == 50.0


def test_what_is_done_is_kept(tmp_path, capsys, monkeypatch):
    done = [Run("digits", PLAIN, PLAIN, 0.01, 0), *(Run("digits", "edge", way, 0.01, 0) for way in WAYS)]
    file = tmp_path / "kept.json"
    file.write_text(json.dumps([{"run": [*run], "top1": 60.0 + number} for number, run in enumerate(done)]))
    before = file.read_text()
    options = ["--data", "digits", "--branches", "edge", "--rates", "0.01", "--seeds", "0", "--output", str(file)]
    assert main(options) == 0
    assert file.read_text() == before
    printed = capsys.readouterr().out.splitlines()
    assert printed[2:] == [f"| 0.01 | {run.branches} | {run.way} | {60.0 + n} |" for n, run in enumerate(done)]
    assert study_branches.PLAIN not in BLOCKS
