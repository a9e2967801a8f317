"""The numbers of the paper, from one file (scripts/paper_tables.json)."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

FILE = Path(__file__).resolve().parents[1] / "paper_tables.json"


class PaperTable(NamedTuple):
    """A table of the paper.

    Attributes:
        columns: names, those of the labels first.
        rows: cells in the order of the columns; None where the paper has no number.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]

    def row(self, labels: Sequence[Any]) -> dict[str, Any]:
        """Return the cells, by column, of the row that begins with these labels."""
        (row,) = (row for row in self.rows if list(row[: len(labels)]) == list(labels))
        return dict(zip(self.columns, row, strict=True))


@functools.cache
def read(name: str) -> PaperTable:
    """Return a table by its name in the file, where its rows are a list, or have the names of models."""
    content = json.loads(FILE.read_text())[name]
    columns = content.pop("columns")
    if "rows" in content:
        return PaperTable(columns, content["rows"])
    return PaperTable(["model", *columns], [[model, *cells] for model, cells in content.items()])


def in_training(model: str, mode: str) -> dict[str, Any]:
    """Return the cells of table 2 by column, of a model or, in mode "repvgg", its baseline; empty where it has none."""
    table = read("table2_imagenet_2080ti")
    name = model.replace("RepOpt-VGG", "RepVGG") if mode == "repvgg" else model
    return table.row([name]) if name in (row[0] for row in table.rows) else {}


def number(cell: Any) -> float | None:
    """Return the number that a cell begins with ("a±b" is a), or None."""
    if isinstance(cell, int | float) and not isinstance(cell, bool):
        return float(cell)
    found = re.match(r"\d+(\.\d+)?", cell) if isinstance(cell, str) else None
    return float(found[0]) if found else None
