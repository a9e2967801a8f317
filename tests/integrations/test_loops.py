"""Every framework's loop gives what the network with branches gives; docs/frameworks.md has the table."""

import logging
import re
import socket
from pathlib import Path

import loops
import pytest
import torch

import repopt

DOCS = Path(__file__).resolve().parents[2] / "docs" / "frameworks.md"
BOUND = 1e-12
MODULES = {
    "Lightning": "pytorch_lightning",
    "Accelerate": "accelerate",
    "transformers": "transformers",
    "MMEngine": "mmengine",
    "DeepSpeed, stage 0": "deepspeed",
}
NUMBER = re.compile(r"\b(\d+e[+-]\d+|0)\b")  # which differs between machines
CELLS: dict[tuple[str, str], list[str]] = {}


@pytest.fixture(scope="module", autouse=True)
def _one_process():
    """What frameworks read of a launcher, and what they say."""
    for name in ("pytorch_lightning", "DeepSpeed", "deepspeed", "transformers", "accelerate"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with socket.socket() as free, pytest.MonkeyPatch.context() as patch:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
        free.close()
        launcher = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for name, value in (launcher | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}).items():
            patch.setenv(name, value)
        yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "error::repopt.EquivalenceWarning")
@pytest.mark.parametrize("name", loops.LOOPS)
@pytest.mark.parametrize("column", loops.COLUMNS)
@pytest.mark.parametrize(("form", "rule"), loops.FORMS)
def test_a_loop(name, column, form, rule, tmp_path, monkeypatch):
    if name in MODULES:
        pytest.importorskip(MODULES[name])
    if name == "MMEngine":
        monkeypatch.chdir(tmp_path)
    task = loops.Task(form, rule, **loops.COLUMNS[column])
    in_float32 = name.startswith("DeepSpeed")
    found = CELLS.setdefault((name, column), [])
    try:
        model = loops.LOOPS[name](task, tmp_path)
    except repopt.UserError as error:
        found.append(f"refused: {error}")
        return
    if in_float32:
        other = loops.own_loop(task._replace(stops=False), tmp_path, torch.float32)
    else:
        other = loops.expected(rule, task.parts, task.max_norm)
    distance = loops.difference(model, other)
    assert distance < BOUND
    number = f"{distance:.0e}" if distance else "0"
    found.append(f"{number} (float32)" if in_float32 else number)


def cell(found):
    """What the table says of a loop's forms and rules: the reason why they are refused, or the largest difference."""
    refused = {text for text in found if text.startswith("refused")}
    assert not refused or refused == set(found)
    return refused.pop() if refused else max(found, key=lambda text: float(text.split()[0]))


def test_the_table():
    """The document's cells are numbers where those here are, and refused where those here are, with that reason."""
    if len(CELLS) < len(loops.LOOPS) * len(loops.COLUMNS) or any(len(found) < 4 for found in CELLS.values()):
        pytest.skip("needs the results of all loops")
    rows = [[name, *(cell(CELLS[name, column]) for column in loops.COLUMNS)] for name in loops.LOOPS]
    lines = ["| " + " | ".join(row) + " |" for row in [["framework", *loops.COLUMNS], ["---"] * 6, *rows]]
    documented = re.findall(r"^\|.*\|$", DOCS.read_text().partition("<!-- made by test_loops.py -->")[2], re.MULTILINE)
    assert [NUMBER.sub("n", line) for line in documented[: len(lines)]] == [NUMBER.sub("n", line) for line in lines], (
        "\n".join(lines)
    )
