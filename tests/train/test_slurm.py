"""scripts/slurm_train.sh between stand-ins of Slurm's commands."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SRUN = """#!/usr/bin/env bash
shift  # --kill-on-bad-exit=1
codes=0
for task in 0 1; do
  SLURM_PROCID=$task SLURM_LOCALID=0 SLURM_NTASKS=2 SLURM_JOB_NUM_NODES=2 "$@" & tasks[$task]=$!
done
for task in "${tasks[@]}"; do wait $task; code=$?; [ $code -gt $codes ] && codes=$code; done
exit $codes
"""
SCONTROL = """#!/usr/bin/env bash
if [ "$1" = show ]; then echo localhost; echo other; else echo "$@" >> "$CALLS"; fi
"""
SQUEUE = """#!/usr/bin/env bash
echo "$STATE"
"""


def submit(tmp_path, *arguments, python=sys.executable, state="RUNNING", restarts=0):
    """The exit code, what was printed, and what Slurm was asked to do."""
    for name, text in {"srun": SRUN, "scontrol": SCONTROL, "squeue": SQUEUE}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    calls = tmp_path / "calls"
    calls.write_text("")
    environment = os.environ | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}", "CALLS": str(calls), "STATE": state, "PYTHON": str(python),
        "SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NODELIST": "localhost,other", "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_RESTART_COUNT": str(restarts), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    script = [str(ROOT / "scripts" / "slurm_train.sh"), *map(str, arguments)]
    result = subprocess.run(script, env=environment, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    return result.returncode, result.stdout + result.stderr, calls.read_text().split()


def test_two_tasks_train_as_one(tmp_path):
    options = ("--opts", "DATA.DATASET", "digits", "TRAIN.EPOCHS", 1)
    code, text, calls = submit(tmp_path, "--arch", "RepOpt-VGG-nano-hs", "--output", tmp_path / "out", *options)
    assert code == 0, text
    assert "2 process(es)" in text
    assert "on 1497 images" in text
    assert calls == []


@pytest.mark.parametrize(
    ("code", "state", "restarts", "again"),
    [
        (75, "RUNNING", 9, True),
        (75, "CANCELLED", 0, False),
        (137, "RUNNING", 0, True),
        (1, "RUNNING", 2, True),
        (1, "RUNNING", 3, False),
        (2, "RUNNING", 0, False),
        (0, "RUNNING", 0, False),
    ],
)
def test_what_is_started_again(tmp_path, code, state, restarts, again):
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\n[ "$RANK" = 1 ] && exit {code}\nexit 0\n')
    python.chmod(0o755)
    found, _, calls = submit(tmp_path, python=python, state=state, restarts=restarts)
    assert found == code
    assert calls == (["requeue", str(os.getpid())] if again else [])
