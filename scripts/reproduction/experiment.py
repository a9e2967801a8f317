"""A table or figure of the paper as its YAML file declares it: what is trained, and what is shown of it.

A file holds

    title, notes        for its readers
    paper               name of its table in scripts/paper_tables.json
    ours                labels and columns of rows that the paper has not
    trainings           by name; those of trainings.yaml are known to all. Their fields are those of `Training`; `like`
                        names another whose fields, except those given, are taken over (`set` is merged)
    rows                of a table: `labels`, by which the paper's row is found, and by the paper's column a cell: the
                        name of a quantity, the training (or architecture) that it is of, and what else the quantity
                        takes; `{top1: target}`
    draw, of            of a figure: the name of a drawing, and the trainings that it shows, by what they are called

Anywhere `{full: A, demo: B}` stands for A at full scale and for B at demo scale, and for null where the scale is not
named. A training without an architecture, and a row none of whose trainings there is, are not of that scale.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import yaml

from repopt.errors import unknown
from reproduction import paper

FOLDER = Path(__file__).resolve().parent
Scale = Literal["full", "demo"]
SCALES: tuple[Scale, ...] = get_args(Scale)


@dataclass(frozen=True)
class Training:
    """What is run once per seed.

    Attributes:
        name: in the file.
        do: "train", "segment", "detect", "throughput" (of the deployed network), "training speed", or the quantization
            "ptq" or "qat".
        arch: of main_repopt.py.
        cfg: recipe.
        set: keys and values over it. A value may be `{paper: [LABEL ..., COLUMN]}`, a number of the experiment's table.
        scales: training whose scales it takes.
        of: training whose network is quantized, or is the backbone.
        gpus: at full scale.
        once: whether all seeds share one run, of the first seed.
        arguments: further ones of the command line.
    """

    name: str
    do: str = "train"
    arch: str | None = None
    cfg: str | None = None
    set: Mapping[str, Any] = field(default_factory=dict, hash=False)
    scales: str | None = None
    of: str | None = None
    gpus: int = 1
    once: bool = False
    arguments: tuple[str, ...] = ()


class Cell(NamedTuple):
    """A number of a table: which quantity, of which training or architecture, and what else it takes."""

    column: str
    quantity: str
    of: str
    arguments: Mapping[str, Any]


class Row(NamedTuple):
    """A row of a table, which is the paper's of the same labels."""

    labels: tuple[Any, ...]
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Experiment:
    """A table or figure at one scale; see the module."""

    name: str
    scale: Scale
    title: str
    notes: tuple[str, ...]
    paper: paper.PaperTable | None
    ours: tuple[str, ...]
    trainings: Mapping[str, Training]
    rows: tuple[Row, ...]
    draw: str | None
    of: Mapping[str, str]

    @property
    def labels(self) -> list[str]:
        """Columns that say what a row is."""
        assert self.paper is not None
        return list(self.paper.columns[: len(self.rows[0].labels)])

    def of_paper(self, row: Row, cell: Cell) -> Any:
        """What the paper has in a cell; None where it has none."""
        if self.paper is None or cell.column in self.ours or any(label in self.ours for label in row.labels):
            return None
        return self.paper.row(row.labels)[cell.column]


@functools.cache
def names() -> list[str]:
    """All tables and figures: "table 1" ..., "figure 7"."""
    found = (re.fullmatch(r"(table|figure)(\d+)", path.stem) for path in FOLDER.glob("*.yaml"))
    numbered = [(match[1], int(match[2])) for match in found if match]
    return [f"{kind} {number}" for kind, number in sorted(numbered, key=lambda name: (name[0] != "table", name[1]))]


def load(name: str, scale: Scale) -> Experiment:
    """The experiment of a table or figure ("table 4").

    Raises:
        UserError: there is none of that name.
    """
    if name not in names():
        raise unknown("table or figure", name, names())
    content = _at(_read(name.replace(" ", "")), scale)
    table = paper.read(content["paper"]) if "paper" in content else None
    trainings = _trainings(_at(_read("trainings"), scale) | content.get("trainings", {}), table)
    rows = [_row(row) for row in content.get("rows", ())]
    known = [row for row in rows if any(cell.of in trainings or _is_arch(cell.of) for cell in row.cells)]
    shown = {label: training for label, training in content.get("of", {}).items() if training in trainings}
    return Experiment(
        name,
        scale,
        content["title"],
        tuple(note for note in content.get("notes", ()) if note),
        table,
        tuple(content.get("ours", ())),
        trainings,
        tuple(known),
        content.get("draw"),
        shown,
    )


@functools.cache
def _read(stem: str) -> dict[str, Any]:
    return yaml.safe_load((FOLDER / f"{stem}.yaml").read_text())


def _at(node: Any, scale: Scale) -> Any:
    """What stands in a file at one scale."""
    if isinstance(node, Mapping):
        if node and set(node) <= set(SCALES):
            return _at(node.get(scale), scale)
        return {key: _at(value, scale) for key, value in node.items()}
    if isinstance(node, Sequence) and not isinstance(node, str):
        return [_at(value, scale) for value in node]
    return node


def _trainings(declared: Mapping[str, Mapping[str, Any]], table: paper.PaperTable | None) -> dict[str, Training]:
    def fields(name: str) -> dict[str, Any]:
        own = dict(declared[name])
        like = fields(own.pop("like")) if "like" in own else {}
        return {**like, **own, "set": {**like.get("set", {}), **(own.get("set") or {})}}

    found = {}
    for name in declared:
        given = fields(name)
        training = Training(name, **given)
        if training.arch or (training.of and "arch" not in given):
            settings = {key: _of_paper(value, table) for key, value in training.set.items() if value is not None}
            found[name] = dataclasses.replace(training, set=settings, arguments=tuple(training.arguments))
    # What needs a training that is not of this scale is not either.
    return {name: t for name, t in found.items() if all(other in found for other in (t.scales, t.of) if other)}


def _of_paper(value: Any, table: paper.PaperTable | None) -> Any:
    if isinstance(value, Mapping):
        assert table is not None
        *labels, column = value["paper"]
        return table.row(labels)[column]
    return value


def _row(content: Mapping[str, Any]) -> Row:
    cells = []
    for column, cell in content.items():
        if column != "labels" and cell:
            (quantity, of), *arguments = cell.items()
            cells.append(Cell(column, quantity, of or "", dict(arguments)))
    return Row(tuple(content["labels"]), tuple(cells))


def _is_arch(name: str) -> bool:
    from repopt.models import list_archs

    return name in list_archs()
