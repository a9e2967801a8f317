"""`benchmark.py decode` measures both ways of decoding."""

import argparse
from pathlib import Path

import pytest
import torch

from benchmarks import decode as subject

PAGE = Path(__file__).resolve().parents[2] / "docs" / "performance.md"


def test_every_step_is_a_row():
    parser = argparse.ArgumentParser()
    subject.add_arguments(parser)
    threads = torch.get_num_threads()
    tables = dict(subject.run(parser.parse_args(["--batch-size", "8", "--rounds", "1"]), torch.device("cpu")))
    assert torch.get_num_threads() == threads
    core, device = tables.values()
    assert [row["DATA.DECODE"] for row in core] == ["cpu: decoded and augmented", "gpu: read and drawn"]
    assert [row["step"] for row in device] == ["all", "decoded", "cropped and augmented"]
    for rows, units in ((core, "cores"), (device, "devices")):
        for row in rows:
            assert row["images/s"] * row["ms per image"] == pytest.approx(1000)
            assert row[f"{units} for 8,370 images/s"] * row["images/s"] == pytest.approx(subject.needed())


def test_the_need_is_that_of_the_document():
    assert f"= {subject.needed():,.0f} images/s" in PAGE.read_text()
