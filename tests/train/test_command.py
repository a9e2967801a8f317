"""The command line: --help and wrong flags are answered without torch; mistakes are one line and an exit code."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from train.command import EXIT_USAGE_ERROR

ROOT = Path(__file__).resolve().parents[2]
RUN = """
import runpy, sys
script, *sys.argv[1:] = sys.argv[1:]
sys.path[0] = script.rpartition("/")[0]
try:
    runpy.run_path(script, run_name="__main__")
except SystemExit as end:
    print(end.code or 0, "torch" in sys.modules)
"""


@pytest.mark.parametrize(
    ("script", "argument", "code", "message"),
    [
        ("main_repopt.py", "--help", 0, "--cache-mode no|full|part"),
        ("main_repopt.py", "--batchsize", EXIT_USAGE_ERROR, "unknown flag '--batchsize'; did you mean '--batch-size'?"),
        ("scripts/quantize.py", "--help", 0, "--method ptq|qat"),
        ("scripts/quantize.py", "--eval", EXIT_USAGE_ERROR, "unknown flag '--eval'"),
        ("scripts/downstream/segment.py", "--help", 0, "--pretrained PRETRAINED"),
        ("scripts/downstream/detect.py", "--backbones", EXIT_USAGE_ERROR, "did you mean '--backbone'?"),
    ],
)
def test_help_and_wrong_flags_need_no_torch(script, argument, code, message):
    command = [sys.executable, "-c", RUN, str(ROOT / script), argument]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.stdout.splitlines()[-1] == f"{code} False", result.stderr
    if code:
        assert re.fullmatch(rf"{Path(script).name}: .*\n", result.stderr)
    assert message in (result.stderr if code else result.stdout)
