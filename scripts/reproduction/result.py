"""A table of the paper with the numbers of runs beside it."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from benchmarks.report import environment

from reproduction import paper
from reproduction.experiment import Cell, Experiment
from reproduction.run import ExperimentRun, Training, with_needs

Content = dict[str, Any]
"""The JSON of a result, or a part of it."""

DEMO = (
    "At demo scale the runs are of small networks on other images: the orderings of rows compare with the paper's, the "
    "differences do not."
)


def build_result(
    name: str, scale: str, experiment: Experiment, runs: Mapping[Training, Sequence[ExperimentRun]], folder: Path
) -> Content:
    """Return the result of an experiment whose runs are done, as its JSON holds it.

    Args:
        name: "table 4".
        scale: of `SCALES`.
        experiment: a table or figure.
        runs: that it shows, by training.
        folder: into which a figure is drawn.
    """
    rows = []
    for row in experiment.rows:
        cells = [_cell(cell, column, experiment.of_paper(row, column), runs) for column, cell in row.cells.items()]
        rows.append({"labels": [*map(_words, row.labels)], "cells": cells})
    pictures, file = [], f"{name.replace(' ', '')}.png"
    if experiment.draw:
        experiment.draw({label: runs[training][0] for label, training in experiment.shown.items()}, folder / file)
    if experiment.draw_rows:
        experiment.draw_rows(rows, folder / file)
    if experiment.draw or experiment.draw_rows:
        pictures = [{"title": f"{name.capitalize()}: {experiment.title}", "file": file}]
    every = with_needs([run for of_training in runs.values() for run in of_training])
    return {
        "name": name,
        "title": experiment.title,
        "scale": scale,
        "notes": [*experiment.notes, *([DEMO] if scale == "demo" and experiment.table and runs else [])],
        "labels": experiment.labels,
        "rows": rows,
        "orderings": orderings(rows),
        "pictures": pictures,
        "runs": {training.name: [str(run.folder) for run in own] for training, own in runs.items()},
        "commands": [run.shell_line(scale) for run in every],
        "environment": environment(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
    }


def _cell(cell: Cell, column: str, there: Any, runs: Mapping[Training, Sequence[ExperimentRun]]) -> Content:
    subjects = [cell.subject] if isinstance(cell.subject, str) else runs[cell.subject]
    values = [value for value in map(cell.value, subjects) if value is not None]
    numeric = all(isinstance(value, int | float) for value in values)
    values = values if numeric else [*map(_words, values)]
    mean = statistics.mean(values) if values and numeric else None
    std = statistics.stdev(values) if mean is not None and cell.ordered and len(values) > 1 else None
    known = paper.number(there)
    return {
        "quantity": column,
        "paper": _words(there),
        "mean": mean if numeric else values[0],
        "std": std,
        "values": values,
        "difference": None if mean is None or known is None else mean - known,
        "decimals": cell.decimals,
        "ordered": cell.ordered,
    }


def _words(value: Any) -> str | None:
    """Return a cell of the paper or a setting as it is shown; None where there is none."""
    if value is None:
        return None
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(str, value)) if isinstance(value, Sequence) and not isinstance(value, str) else str(value)


def side_by_side(
    content: Mapping[str, Any], shown: Callable[[Content], tuple[str | None, str | None]]
) -> tuple[Sequence[str], Sequence[Sequence[str | None]]]:
    """Return the columns and the rows of a table: the paper's numbers, and behind each what is shown of a cell.

    Where the paper has no such table there are our numbers alone.

    Args:
        content: a result.
        shown: returns this run's number and its difference from the paper's.
    """
    rows: list[list[str | None]]
    quantities = [cell["quantity"] for cell in content["rows"][0]["cells"]]
    if all(cell["paper"] is None for row in content["rows"] for cell in row["cells"]):
        rows = [[*row["labels"], *(shown(cell)[0] for cell in row["cells"])] for row in content["rows"]]
        return [*content["labels"], *quantities], rows
    columns = [text for name in quantities for text in (f"{name}: paper", "this run", "difference")]
    rows = []
    for row in content["rows"]:
        rows.append([*row["labels"]])
        for cell in row["cells"]:
            rows[-1] += [cell["paper"], *shown(cell)]
    return [*content["labels"], *columns], rows


def table_of(content: Content) -> str:
    """Return the table as Markdown: the paper, this run, and the difference."""
    columns, rows = side_by_side(content, lambda cell: (_measured(cell), _number(cell["difference"], cell, sign="+")))
    all_rows: list[Sequence[str | None]] = [columns, *rows]
    lines = ["| " + " | ".join(text or "–" for text in row) + " |" for row in all_rows]
    return "\n".join([lines[0], "|" + "---|" * len(columns), *lines[1:]])


def _measured(cell: Content) -> str | None:
    if not isinstance(cell["mean"], int | float):
        return cell["mean"]
    spread = "" if cell["std"] is None else f" ± {_number(cell['std'], cell)}"
    return f"{_number(cell['mean'], cell)}{spread}"


def _number(value: float | None, cell: Content, sign: str = "") -> str | None:
    """Return a number with the decimals of a cell, and no minus before zero."""
    return None if value is None else f"{round(value, cell['decimals']) + 0.0:{sign}.{cell['decimals']}f}"


def orderings(rows: Sequence[Content]) -> list[str]:
    """Return for every column how many pairs of rows the runs order as the paper does, and which otherwise.

    Two rows of which several seeds were run are not ordered where their means are closer than the standard deviation of
    the difference of two single runs.
    """
    texts = []
    for column in dict.fromkeys(cell["quantity"] for row in rows for cell in row["cells"] if cell["ordered"]):
        alike, close, opposite = 0, 0, []
        for one, two in itertools.combinations(_numbers(rows, column), 2):
            (name, mean, std, there), (name_2, mean_2, std_2, there_2) = one, two
            if there == there_2:
                continue
            if abs(mean - mean_2) <= math.hypot(std, std_2):
                close += 1
            elif (mean > mean_2) == (there > there_2):
                alike += 1
            else:
                opposite.append(f"{name} above {name_2}" if mean > mean_2 else f"{name_2} above {name}")
        if pairs := alike + close + len(opposite):
            text = f"{column}: of {pairs} pairs of rows {alike} are ordered as in the paper, {close} are closer than "
            text += f"their spread, {len(opposite)} are the other way round"
            texts.append(text + (f" ({'; '.join(opposite)})" if opposite else ""))
    return texts


def _numbers(rows: Sequence[Content], column: str) -> Iterator[tuple[str, float, float, float]]:
    """Yield name, mean, deviation and the paper's number of every row that has them in this column."""
    for row in rows:
        for cell in row["cells"]:
            there = paper.number(cell["paper"])
            if cell["quantity"] == column and isinstance(cell["mean"], int | float) and there is not None:
                yield ", ".join(filter(None, row["labels"])), cell["mean"], cell["std"] or 0.0, there


def as_markdown(content: Content) -> str:
    """Return all of a result that is text."""
    parts = [f"## {content['name'].capitalize()}: {content['title']} ({content['scale']} scale)"]
    parts += ["\n".join(content["notes"])] if content["notes"] else []
    parts += [table_of(content)] if content["rows"] else []
    parts += ["\n".join(f"- {line}." for line in content["orderings"])] if content["orderings"] else []
    return "\n\n".join(parts)
