"""A table or figure of the paper at one scale: what is trained for it, and what is shown of that."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from reproduction import paper
from reproduction.run import ExperimentRun, Training


class Cell(NamedTuple):
    """A number of a table.

    Attributes:
        subject: the training whose runs have it, or an architecture of which it is counted.
        value: returns it for a run of the training, or for the architecture; None where it is not known.
        decimals: that are shown.
        ordered: whether it says which row is better or worse.
    """

    subject: Training | str
    value: Callable[[Any], Any]
    decimals: int = 2
    ordered: bool = True


class Row(NamedTuple):
    """A row of a table: the labels by which the paper's row is found, and cells by the paper's column."""

    labels: tuple[Any, ...]
    cells: Mapping[str, Cell]


@dataclass(frozen=True)
class Experiment:
    """A table or figure at one scale.

    Attributes:
        title, notes: for its readers.
        table: the paper's table.
        rows: of a table.
        ours: labels and columns of rows that the paper has not.
        draw: draws a figure into a file, from the first seed's runs of what it shows.
        shown: trainings that a figure shows, by what they are called there.
    """

    title: str
    notes: tuple[str, ...] = ()
    table: paper.PaperTable | None = None
    rows: tuple[Row, ...] = ()
    ours: tuple[str, ...] = ()
    draw: Callable[[Mapping[str, ExperimentRun], Path], None] | None = None
    shown: Mapping[str, Training] = field(default_factory=dict)

    @property
    def trainings(self) -> list[Training]:
        """The trainings whose runs are shown, each once."""
        subjects = [cell.subject for row in self.rows for cell in row.cells.values()]
        return list(dict.fromkeys([*self.shown.values(), *(s for s in subjects if isinstance(s, Training))]))

    @property
    def labels(self) -> list[str]:
        """Columns that say what a row is."""
        return list(self.table.columns[: len(self.rows[0].labels)]) if self.table else []

    def of_paper(self, row: Row, column: str) -> Any:
        """Return what the paper has in a cell; None where it has none."""
        if self.table is None or column in self.ours or any(label in self.ours for label in row.labels):
            return None
        return self.table.row(row.labels)[column]
