"""Keeps what gpu_check.sh and gpu_pipeline.sh found on a machine with a GPU.

    python scripts/gpu_rows.py RESULTS...          # folders that have their results.jsonl
    python scripts/gpu_rows.py --show RESULTS...   # prints what would stand in docs/performance.md, and keeps nothing

Rows go to benchmarks/gpu.jsonl, those that stand there already not again; tables of benchmark.py go to
benchmarks/PART-gpu.json, where a part that came to its end takes the place of one that was cut, and a later one
that of an earlier one. All is shown in docs/performance.md, between the two marks there, and the aims beside it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import _root
from benchmarks.report import Row, as_table

from repopt.errors import UserError, shown
from train.command import run_command

FOLDER, DOCUMENT = _root.ROOT / "benchmarks", _root.ROOT / "docs" / "performance.md"
ROWS, SUFFIX = "gpu.jsonl", "-gpu.json"
MARKS = "<!-- from here: scripts/gpu_rows.py -->\n", "<!-- to here: scripts/gpu_rows.py -->\n"
HEADER = {
    "part",
    "exit",
    "setting",
    "seconds",
    "machine",
    "torch",
    "run",
}  # keys of every row that gpu_common.sh writes
NOT_MEASURED = "not yet measured"
SETTING = "cuda, RepOpt-VGG-B1"  # whose results are kept


class Found(NamedTuple):
    """What is known of GPUs.

    Attributes:
        rows: of parts, in the order in which they were added.
        results: of benchmark.py, by part.
    """

    rows: list[dict[str, Any]]
    results: dict[str, dict[str, Any]]

    @classmethod
    def kept(cls) -> Found:
        """Return what stands in benchmarks/."""
        rows = [*read_rows(FOLDER / ROWS)] if (FOLDER / ROWS).exists() else []
        files = FOLDER.glob(f"*{SUFFIX}")
        return cls(rows, {file.name.removesuffix(SUFFIX): json.loads(file.read_text()) for file in files})

    def add(self, row: dict[str, Any]) -> None:
        """Add a part's row; its result is shown where it is better than the part's other ones (`quality`)."""
        best = max((quality(other) for other in self.rows if other["part"] == row["part"]), default=(False, ""))
        if "result" in row and quality(row) >= best:
            self.results[row["part"]] = row["result"]
        row = {key: value for key, value in row.items() if key != "result"}
        if row not in self.rows:
            self.rows.append(row)

    def keep(self) -> None:
        """Write all of it."""
        (FOLDER / ROWS).write_text("".join(f"{json.dumps(row)}\n" for row in self.rows))
        for part, result in self.results.items():
            (FOLDER / f"{part}{SUFFIX}").write_text(f"{json.dumps(result, indent=1)}\n")
        text = DOCUMENT.read_text()
        before, after = text.partition(MARKS[0])[0], text.partition(MARKS[1])[2]
        DOCUMENT.write_text(f"{before}{MARKS[0]}{self.text()}{MARKS[1]}{after}")

    def text(self) -> str:
        """Return aims and tables, as the document has them."""
        parts = ["", as_table([*aims(self.results)])]
        for part, result in sorted(self.results.items()):
            file = f"benchmarks/{part}{SUFFIX}"
            parts.append(f"`{result['command']}`, {result['machine']}, torch {result['torch']} (`{file}`):")
            for title, rows in result["tables"].items():
                parts += [f"{title}:", as_table(rows)]
        return "\n\n".join([*parts, ""])


def quality(row: Mapping[str, Any]) -> tuple[bool, str]:
    """Return whether its part came to its end, and when it began: what is larger is shown."""
    return row["exit"] == 0, row["run"]


def aims(results: Mapping[str, Mapping[str, Any]]) -> Iterator[Row]:
    """Yield what is aimed at on an H100 or H200, and what was measured."""

    def rows(part: str, title: str = "", **cells: str) -> list[Row]:
        """Return the rows with these cells of a part's first table whose title begins so."""
        tables = results.get(part, {"tables": {}})["tables"]
        found: list[Row] = next((tables[name] for name in tables if name.startswith(title)), [])
        return [row for row in found if all(row[key] == cell for key, cell in cells.items())]

    def first(column: str, found: Sequence[Row]) -> float | None:
        return next((row[column] for row in found if row[column] is not None), None)

    def aim(text: str, measured: float | None, *parts: str) -> Row:
        if measured is None:
            return {"aim on an H100 or H200": text, "measured": NOT_MEASURED, "machine": None}
        machines = " and ".join(dict.fromkeys(results[part]["machine"] for part in parts))
        return {"aim on an H100 or H200": text, "measured": measured, "machine": machines}

    searches = [row for row in rows("hyper-search", "The hyper-search") if row["search"] != "textbook"]
    steps = [value for row in searches for column, value in row.items() if column.startswith("extrapolated minutes")]
    evaluations = first("minutes of a search", rows("between-epochs"))
    minutes = min(steps) + evaluations if steps and evaluations is not None else None
    speedup = max((row["speed / textbook"] for row in searches), default=None)
    large, textbook = (rows("train-256", training=name) for name in ("RepOpt", "textbook"))
    mfu, speed, textbook_speed = first("MFU %", large), first("images/s", large), first("images/s", textbook)
    times_textbook = speed / textbook_speed if speed and textbook_speed else None
    step_time = first("time / fused", rows("optimizer", optimizer="RepSGD, compiled"))
    small_speedup = first("speed / RepVGG", rows("train-32", training="RepOpt"))
    largest = first("largest batch / RepVGG: here", rows("largest", "Table 2 of the paper"))
    decoding = first("images/s", rows("decode", "The same on the device", step="all"))
    yield aim(
        "the hyper-search of B1, steps and evaluations of 240 epochs: at most 6 minutes",
        minutes,
        "hyper-search",
        "between-epochs",
    )
    yield aim("its steps: at least 5 times as fast as the textbook's", speedup, "hyper-search")
    yield aim("B1, 224 px, batches of 256: at least 60 % of the measured rate of matrix products", mfu, "train-256")
    yield aim("the same: at least 4 times as fast as the textbook's fp32", times_textbook, "train-256")
    yield aim("raug15's input, decoded on the GPU: at least the 8,370 images/s of these 60 %", decoding, "decode")
    yield aim("RepSGD's step: at most 1.05 times as long as torch's fused SGD", step_time, "optimizer")
    yield aim("RepOpt over RepVGG in speed, batches of 32: at least 1.5", small_speedup, "train-32")
    yield aim("the same, batches of 256: at least 1.5", first("speed / RepVGG", large), "train-256")
    yield aim("RepOpt over RepVGG in largest batch: at least 1.3", largest, "largest")


def read_rows(file: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a file.

    Raises:
        UserError: a line is no row.
    """
    for number, line in enumerate(file.read_text().splitlines(), 1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict) or not row.keys() >= HEADER:
            raise UserError(f"{str(file)!r}, line {number} is no row of gpu_check.sh or gpu_pipeline.sh: {shown(line)}")
        yield row


def main() -> None:
    """Keep or show what folders of results hold.

    Raises:
        UserError: one is none, holds a line that is no row, or is of a trial and to be kept.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path, help="folders")
    parser.add_argument("--show", action="store_true", help="print, and keep nothing")
    arguments = parser.parse_args()
    found = Found.kept()
    for folder in arguments.results:
        if not (folder / "results.jsonl").is_file():
            raise UserError(f"{str(folder)!r} is no folder of results: it has no results.jsonl")
        for row in read_rows(folder / "results.jsonl"):
            if not arguments.show and row["setting"] != SETTING:
                raise UserError(f"results of a trial ({row['setting']}) are not kept, but those of '{SETTING}'")
            found.add(row)
    if arguments.show:
        print(found.text())
    else:
        found.keep()


if __name__ == "__main__":
    sys.exit(run_command("gpu_rows.py", main))
