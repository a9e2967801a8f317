"""scripts/gpu_pipeline.sh as it is tried without a GPU, and how many epochs fit into a time."""

import json
import os
import subprocess
import sys
from pathlib import Path

import gpu_pipeline
import pytest
import quantize

import main_repopt
from repopt.errors import UserError
from train import config

ROOT = Path(__file__).resolve().parents[2]
NANO = "RepOpt-VGG-nano"


STAND_IN = """#!/bin/sh
# Says what machine it is; what a part would leave behind, and its command line.
case "$1" in
  scripts/gpu_machine.py) echo '"machine": "CPU", "torch": "2", "run": "2026-01-01"' ;;
  *) echo "$@" >> "$OUT/commands"; echo '{"tables": {}}' > "$OUT/glyphs-$2.json" ;;
esac
"""


def start(folder, *part, **environment):
    """The exit code of a part, what was printed, and the last row."""
    given = {"DEVICE": "cpu", "TINY": "1", "ARCH": NANO, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    given |= {"OUT": str(folder / "out"), "RUNS": str(folder / "runs")}
    command = ["bash", str(ROOT / "scripts" / "gpu_pipeline.sh"), *part]
    result = subprocess.run(command, env=os.environ | given | environment, capture_output=True, text=True, timeout=600)
    rows = folder / "out" / "results.jsonl"
    lines = (rows.read_text().splitlines() if rows.exists() else []) or [None]
    return result.returncode, result.stdout + result.stderr, lines[-1] and json.loads(lines[-1])


def test_part_by_part(tmp_path):
    python = tmp_path / "python"
    python.write_text(STAND_IN)
    python.chmod(0o755)
    for part in (*gpu_pipeline.MODES, "int8"):
        code, text, row = start(tmp_path, PYTHON=str(python))  # the next one
        assert (code, row["part"], row["exit"]) == (0, f"glyphs-{part}", 0), text
        assert row["result"] == {"tables": {}}
    code, text, row = start(tmp_path, PYTHON=str(python))
    assert (code, row["part"]) == (0, "glyphs-int8")
    assert text.endswith("all parts are done\n")
    commands = [line.split() for line in (tmp_path / "out" / "commands").read_text().splitlines()]
    assert [command[:2] for command in commands] == [
        ["scripts/gpu_pipeline.py", part] for part in (*gpu_pipeline.MODES, "int8")
    ]
    assert [command[command.index("--tried") :][:2] for command in commands] == [["--tried", "0"]] * 5
    assert commands[0][-6:-2] == ["--epochs", "3", "--tried", "2"]  # the last counts


@pytest.fixture
def do(tmp_path, monkeypatch):
    """Does a part in this process, with the options of a tiny run; its tables."""
    mains = {"main_repopt.py": main_repopt.main, "scripts/quantize.py": quantize.main}
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(gpu_pipeline, "start", lambda script, arguments: mains[script](arguments))
    monkeypatch.setattr(gpu_pipeline.signal, "signal", lambda *_: None)
    monkeypatch.setattr(gpu_pipeline.os, "cpu_count", lambda: 1)  # one after the other

    def do(part, *options):
        file = tmp_path / "out" / f"glyphs-{part}.json"
        given = ["--arch", NANO, "--device", "cpu", "--seconds", "600", "--runs", str(tmp_path / "runs")]
        given += ["--dataset", "digits", "--presets", "fbgemm", "--json", str(file)]
        monkeypatch.setattr("sys.argv", ["gpu_pipeline.py", part, *given, *options])
        gpu_pipeline.main()
        return json.loads(file.read_text())["tables"]

    return do


def test_parts_that_are_really_run(do, tmp_path, monkeypatch):
    ((found,),) = do("search", "--epochs", "3", "--tried", "2").values()
    assert (found["network"], found["epochs"]) == (f"{NANO}-hs", 3)
    assert not (tmp_path / "runs" / found["network"] / "speed").exists()
    monkeypatch.setattr(gpu_pipeline, "QUANTIZED", ("target",))
    trained, rows = do("int8", "--epochs", "20", "--tried", "0").values()
    assert [(row["network"], row["epochs"]) for row in trained] == [(f"{NANO}-target", 20)]
    assert [(row["preset"], row["network"]) for row in rows] == [("fbgemm", f"{NANO}-target")]
    files = list((tmp_path / "out").iterdir())
    assert {"scales.pth", "search-metrics.jsonl"} <= {path.name for path in files}
    assert max(path.stat().st_size for path in files) < 16 * 2**20


@pytest.mark.parametrize("part", gpu_pipeline.MODES)
def test_the_command_line_of_a_part(part, tmp_path, monkeypatch):
    given = []
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(gpu_pipeline, "start", lambda script, arguments: given.append((script, arguments)))
    scales = tmp_path / "scales.pth"
    gpu_pipeline.Training(part, NANO, "digits", tmp_path / "runs", scales, 240, tried=0)._run("x", 48)
    ((script, arguments),) = given
    cfg = config.parse(arguments).cfg
    assert script == "main_repopt.py"
    assert f"{NANO}-{gpu_pipeline.MODES[part]}" == cfg.MODEL.ARCH
    assert (cfg.DATA.DATASET, cfg.TRAIN.EPOCHS, cfg.TRAIN.WARMUP_EPOCHS, cfg.TEST.PERIOD) == ("digits", 48, 2, 8)
    assert (str(scales) if part == "target" else None) == cfg.TRAIN.SCALES_PATH


def test_mistakes(do, tmp_path):
    code, text, row = start(tmp_path, "train")
    assert (code, row) == (2, None)
    assert text == "gpu_pipeline.sh: there is no part 'train' (allowed: search target repvgg sgd int8, next)\n"
    with pytest.raises(UserError, match="there are no searched scales: run the part search before"):
        do("target")


def training(tmp_path, part, epochs=240):
    return gpu_pipeline.Training(part, NANO, "digits", tmp_path / "runs", None, epochs, tried=2)


@pytest.fixture
def clock(monkeypatch):
    """A training takes 20 seconds to start and to end, and 2 seconds for an epoch; no time passes beside it."""
    now, ran = [1000.0], []

    def run(self, tag, epochs):
        now[0] += 20 + 2 * epochs
        ran.append((tag, epochs))
        self.folder(tag).mkdir(parents=True, exist_ok=True)
        record = {"step": 1, "train_seconds": 2.0, "val": {"top1": 50.0}}
        lines = (json.dumps(record | {"epoch": epoch}) + "\n" for epoch in range(1, epochs + 1))
        (self.folder(tag) / "metrics.jsonl").write_text("".join(lines))
        self.checkpoint.parent.mkdir(parents=True, exist_ok=True)
        self.checkpoint.touch()

    monkeypatch.setattr(gpu_pipeline.Training, "_run", run)
    monkeypatch.setattr(gpu_pipeline.time, "monotonic", lambda: now[0])
    return now, ran


@pytest.mark.parametrize(
    ("seconds", "epochs"), [(1000, 240), (464, 189), (46, 0)], ids=["all fit", "some fit", "none fits"]
)
def test_as_many_epochs_as_fit(tmp_path, clock, seconds, epochs):
    now, ran = clock
    if not epochs:
        with pytest.raises(UserError, match=r"not one epoch of .*nano-hs fits: it takes 2.0 s, and 2 s are left"):
            training(tmp_path, "search").train(now[0] + seconds)
        return
    row = training(tmp_path, "search").train(now[0] + seconds)
    assert ran == [("speed", 2), ("search", epochs)]
    assert now[0] <= 1000 + seconds
    assert row == {
        "network": f"{NANO}-hs",
        "epochs": epochs,
        "top-1 (%)": 50.0,
        "s per epoch": 2.0,
        "minutes in all": (44 + 2 * epochs) / 60,
    }


def test_quantization_trains_what_is_not_there(tmp_path, clock, monkeypatch):
    now, ran = clock

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(gpu_pipeline.Quantization, "run", lambda self: self.artifacts.mkdir(parents=True))
    monkeypatch.setattr(gpu_pipeline.Quantization, "row", lambda self: {"preset": self.preset})
    both = [training(tmp_path, part) for part in gpu_pipeline.QUANTIZED]
    found = []
    gpu_pipeline.int8(both, ["default", "fbgemm"], now[0] + 460, found.append)
    assert len(found) == 4
    assert [len(rows) for rows in found[-1].values()] == [2, 4]
    assert [tag for tag, _ in ran] == ["speed", "target", "speed", "repvgg"]
    assert now[0] <= 1000 + 460 - gpu_pipeline.QUANTIZATION
    ran.clear()
    gpu_pipeline.int8(both, ["tensorrt"], now[0] + 460, found.append)
    assert [len(rows) for rows in found[-1].values()] == [2]
    assert ran == []
    monkeypatch.setattr(gpu_pipeline.Quantization, "run", lambda self: None)  # as onnxruntime's outputs may differ
    with pytest.raises(UserError, match=r"^not quantized: RepOpt-VGG-nano-target per_tensor, RepOpt-VGG-nano-repvgg"):
        gpu_pipeline.int8(both, ["per_tensor"], now[0] + 460, found.append)
