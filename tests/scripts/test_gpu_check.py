"""gpu_check.sh: its parts, what they leave behind, and what gpu_rows.py makes of it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import benchmark
import gpu_rows
import pytest
import torch
from benchmarks.report import as_table

from benchmarks import device, hyper_search, infer, optimizer, training
from train.command import EXIT_USAGE_ERROR, run_command

ROOT = Path(__file__).resolve().parents[2]
NANO = "RepOpt-VGG-nano"
PARTS = """
source scripts/gpu_common.sh
prepare yacs=yacs
part well 60 bash -c 'echo "{\\"tables\\": {}}" > "$OUT/well.json"'
part wrong 60 bash -c 'echo no good; exit 3'
part cut 1 bash -c 'echo "{\\"tables\\": {\\"found\\": []}}" > "$OUT/cut.json"; sleep 60'
part last 60 true
"""
NO_PYTHON = """#!/bin/sh
# Says what machine it is, and writes other command lines down instead of running them.
case "$1" in
  scripts/gpu_machine.py) echo '"machine": "CPU", "torch": "2", "run": "2026-01-01"' ;;
  *) echo "$@" >> "$OUT/commands" ;;
esac
"""


@pytest.fixture
def run(tmp_path):
    """Runs a script: what it prints, line by line, and its exit code."""
    python = tmp_path / "python"
    python.write_text(NO_PYTHON)
    python.chmod(0o755)

    def start(script, **environment):
        environment = {"OUT": str(tmp_path), "DEVICE": "cpu", "PYTHON": str(python), **environment}
        done = subprocess.run(
            ["bash", "-c", script], cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=False
        )
        return done.stdout.splitlines() + done.stderr.splitlines(), done.returncode

    return start


def rows_of(out):
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def test_a_part_that_is_cut_leaves_its_row_and_the_next_run_does_what_is_missing(run, tmp_path):
    run(PARTS)
    rows = rows_of(tmp_path)
    assert [(row["part"], row["exit"]) for row in rows] == [("well", 0), ("wrong", 3), ("cut", 124), ("last", 0)]
    assert [row.get("result") for row in rows] == [{"tables": {}}, None, {"tables": {"found": []}}, None]
    assert all(row.keys() >= set(gpu_rows.HEADER) and row["setting"] == "cpu, RepOpt-VGG-B1" for row in rows)
    assert "no good" in (tmp_path / "log.txt").read_text()
    assert not list(tmp_path.glob("*.json"))
    run(PARTS)
    assert [row["part"] for row in rows_of(tmp_path)[4:]] == ["wrong", "cut"]
    run(PARTS, PARTS="last well")
    assert [row["part"] for row in rows_of(tmp_path)[6:]] == ["well", "last"]
    run(PARTS, ARCH=NANO, PARTS="last")
    run(PARTS.replace("part cut", "part other"), ARCH=NANO, LIMIT="1")
    assert [(row["part"], row["setting"]) for row in rows_of(tmp_path)[8:]] == [("last", "cpu, RepOpt-VGG-nano")]


def test_what_is_missing_is_said_in_one_line(run):
    script = "source scripts/gpu_common.sh; prepare yacs=yacs nowhere=a-package; say never"
    lines, code = run(script, PYTHON=sys.executable)
    assert code == EXIT_USAGE_ERROR
    assert lines == [
        "gpu_machine.py: a-package missing here: put the wheels into .whl (scripts/gpu_common.sh says how)"
    ]


def test_without_torch_and_timm_it_is_one_line_too():
    program = (
        "import runpy, sys; sys.modules.update(torch=None, timm=None); "
        "runpy.run_path('scripts/gpu_machine.py', run_name='__main__')"
    )
    command = [sys.executable, "-c", program, "cuda", "torch=torch", "timm=timm", "yacs=yacs"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == EXIT_USAGE_ERROR
    assert done.stderr == (
        "gpu_machine.py: torch timm missing here: put the wheels into .whl (scripts/gpu_common.sh says how)\n"
    )


@pytest.fixture
def tiny(run, tmp_path):
    """Command lines of a tiny run of gpu_check.sh, and a folder with the row of every part."""
    lines, code = run("bash scripts/gpu_check.sh", TINY="1", ARCH=NANO)
    assert code == 0, lines
    return [line.split() for line in (tmp_path / "commands").read_text().splitlines()], tmp_path


def test_every_part_of_a_tiny_run_finds_what_it_is_for(tiny, monkeypatch):
    """The command lines are run in this process, without torch.compile."""
    monkeypatch.setattr(torch, "compile", lambda model, **_: model)
    monkeypatch.setattr(optimizer, "IMPLEMENTATIONS", ("eager",))
    # On a GPU there are no such rows, and test_benchmark_infer has them.
    monkeypatch.setattr(infer, "in_runtimes", lambda name, model, images: [])
    for module in (device, training):
        monkeypatch.setattr(module, "matrix_rate", lambda device: 1e12)
    for module in (device, hyper_search):
        monkeypatch.setattr(module, "BATCH", 4)
    commands, out = tiny
    measuring = [command for command in commands if command[0] == "scripts/benchmark.py"]
    assert len(measuring) == len(commands) - 2  # pytest, and gpu_rows.py
    for command in measuring:
        monkeypatch.setattr("sys.argv", command)
        assert benchmark.main() == 0
    found = gpu_rows.Found([], {})
    for row in rows_of(out):
        file = out / f"{row['part']}.json"
        found.add(row | ({"result": json.loads(file.read_text())} if file.exists() else {}))
    assert len(found.results) == len(measuring) == len(found.rows) - 1
    assert {row["machine"] for row in gpu_rows.aims(found.results) if row["measured"] != gpu_rows.NOT_MEASURED} == {
        found.results["optimizer"]["machine"]
    }
    aims = {row["aim on an H100 or H200"]: row["measured"] for row in gpu_rows.aims(found.results)}
    missing = [aim for aim, measured in aims.items() if not isinstance(measured, float)]
    assert len(missing) == 1 and missing[0].startswith("RepSGD's step")  # compiled, which is not done here
    assert all(
        as_table(rows) in found.text() for result in found.results.values() for rows in result["tables"].values()
    )


def test_without_results_every_aim_is_not_yet_measured():
    assert {row["measured"] for row in gpu_rows.aims({})} == {"not yet measured"}


def test_the_document_shows_what_is_kept():
    assert gpu_rows.Found.kept().text() in gpu_rows.DOCUMENT.read_text()


ROW = {"setting": "cuda, RepOpt-VGG-B1", "seconds": 3, "machine": "H", "torch": "2", "run": "2026-01-01"}
TABLES = {"command": "python x", "machine": "H", "torch": "2", "tables": {"A table": [{"a": 1}]}}


class TestKeeping:
    @pytest.fixture(autouse=True)
    def elsewhere(self, tmp_path, monkeypatch):
        monkeypatch.setattr(gpu_rows, "FOLDER", tmp_path)
        monkeypatch.setattr(gpu_rows, "DOCUMENT", tmp_path / "page.md")
        (tmp_path / "page.md").write_text(f"before\n{gpu_rows.MARKS[0]}old\n{gpu_rows.MARKS[1]}after\n")

    @pytest.fixture
    def keep(self, tmp_path, monkeypatch):
        """Makes a folder of rows, keeps them, and gives what stands in benchmarks/ and the document then."""

        def keep(name, *rows):
            folder = tmp_path / name
            folder.mkdir(exist_ok=True)
            (folder / "results.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
            monkeypatch.setattr("sys.argv", ["gpu_rows.py", str(folder)])
            assert run_command("gpu_rows.py", gpu_rows.main) == 0
            return {path.name: path.read_text() for path in tmp_path.iterdir() if path.is_file()}

        return keep

    def test_twice_is_once(self, keep):
        rows = [
            {"part": "speed", "exit": 0, **ROW, "result": TABLES},
            {"part": "search", "exit": 0, **ROW},
            {"part": "tests", "exit": 1, **ROW},
        ]
        kept = keep("a", *rows)
        assert keep("a", *rows) == kept
        assert json.loads(kept["speed-gpu.json"]) == TABLES
        assert [json.loads(line) for line in kept["gpu.jsonl"].splitlines()] == [
            {name: value for name, value in rows[0].items() if name != "result"},
            *rows[1:],
        ]
        page = kept["page.md"]
        assert page.startswith("before\n") and page.endswith("after\n") and "old" not in page
        for shown in ("`python x`, H, torch 2 ", "| a |\n|---|\n| 1 |"):
            assert shown in page

    def test_a_whole_part_before_a_cut_one_and_a_later_before_an_earlier_one(self, keep):
        for value, (code, run, best) in enumerate([(124, "2", 0), (0, "1", 1), (124, "3", 1), (0, "4", 3)]):
            result = TABLES | {"tables": {"A table": [{"a": value}]}}
            kept = keep(str(value), {"part": "speed", "exit": code, **ROW, "run": run, "result": result})
            assert json.loads(kept["speed-gpu.json"])["tables"]["A table"] == [{"a": best}]
        assert len(kept["gpu.jsonl"].splitlines()) == 4

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            (None, r"'{folder}' is no folder of results: it has no results.jsonl"),
            ("[1]\n", r"'{folder}/results.jsonl', line 1 is no row of gpu_check.sh or gpu_pipeline.sh: '\[1\]'"),
            ('{"part": "speed", "exit', "line 1 is no row"),
            (
                json.dumps({"part": "a", "exit": 0, **ROW, "setting": "cpu, x, tiny"}),
                r"results of a trial \(cpu, x, tiny\)",
            ),
        ],
    )
    def test_mistakes_are_one_line(self, text, message, tmp_path, monkeypatch, in_one_line):
        folder = tmp_path / "folder"
        folder.mkdir()
        if text is not None:
            (folder / "results.jsonl").write_text(text)
        monkeypatch.setattr("sys.argv", ["gpu_rows.py", str(folder)])
        assert run_command("gpu_rows.py", gpu_rows.main) == EXIT_USAGE_ERROR
        in_one_line("gpu_rows.py", message, {"folder": folder})
        assert not (tmp_path / "gpu.jsonl").exists()
