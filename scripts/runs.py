"""What the folder of a run says about it: its numbers by epoch and by step, its configuration, and how it began."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import _root  # noqa: F401

from repopt.errors import UserError, one_line, shown
from train import config
from train.files import COLUMNS, CONFIG, Column

METRICS, LOG = "metrics.jsonl", "log_rank0.txt"
LOGGED = re.compile(
    r"\d+-\d+-\d+ \d+:\d+:\d+ "
    r"(?:(\w+\.py .*)|(torch .*)|\S+: (\S+ M) parameters(?:, (\d+) training and (\d+) test)?)"
)


class Run(NamedTuple):
    """The folder of a run, read; `settings` is its configuration, empty where it has none."""

    folder: Path
    epochs: Sequence[Mapping[str, Any]]
    settings: Mapping[str, Any]

    @classmethod
    def read(cls, folder: Path) -> Run:
        """UserError where a file of it is damaged."""
        file = folder / CONFIG
        return cls(folder, epochs_of(folder), read_json(file, dict) if file.is_file() else {})

    @property
    def arch(self) -> str:
        """Of main_repopt.py; empty where the configuration does not say."""
        return str(config.lookup(self.settings, "MODEL.ARCH") or "")

    @property
    def columns(self) -> Sequence[Column]:
        """Numbers of its evaluations."""
        return COLUMNS.get(str(config.lookup(self.settings, "TASK")), COLUMNS[config.CLASSIFY])

    @property
    def measure(self) -> Column:
        """The one that says how good its network is."""
        return self.columns[0]

    @property
    def scores(self) -> dict[int, float]:
        """That number (percent) by epoch, where it was evaluated."""
        found = {record["epoch"]: number(config.lookup(record, f"val.{self.measure.name}")) for record in self.epochs}
        return {epoch: score for epoch, score in found.items() if score is not None}

    def summary(self) -> dict[str, str]:
        """The training in a few numbers; empty where nothing was recorded."""
        if not self.epochs:
            return {}
        final, highest = (f"{which} {self.measure.title}" for which in ("final", "best"))
        facts = dict.fromkeys((final, highest), "–")
        if scores := self.scores:
            best = max(scores, key=scores.__getitem__)
            facts[final] = f"{scores[max(scores)]:.2f} %"
            facts[highest] = f"{scores[best]:.2f} % (epoch {best})"
        done, planned = self.epochs[-1]["epoch"], number(config.lookup(self.settings, "TRAIN.EPOCHS"))
        seconds = sum(number(record.get("train_seconds")) or 0 for record in self.epochs)
        return facts | {
            "epochs": str(done) if planned is None else f"{done} of {planned:.0f}",
            "training time": str(timedelta(seconds=round(min(max(seconds, 0), 1e9)))),
        }


class Log(NamedTuple):
    """What the first lines of a run's log say, of every time that it was started."""

    commands: Sequence[str]
    environments: Sequence[str]
    facts: Mapping[str, str]

    @classmethod
    def read(cls, folder: Path) -> Log:
        """Of a folder; all empty where there is no log."""
        path, facts = folder / LOG, {}
        commands, environments = {}, {}  # as ordered sets
        if path.is_file():
            with path.open(encoding="utf-8", errors="replace") as lines:
                for command, environment, *numbers in (match.groups() for match in map(LOGGED.match, lines) if match):
                    if command:
                        commands[command] = None
                    elif environment:
                        environments[environment] = None
                    else:
                        titles = "parameters", "training images", "test images"
                        facts = {title: n for title, n in zip(titles, numbers, strict=True) if n}
        return cls([*commands], [*environments], facts)


def epochs_of(folder: Path) -> list[dict[str, Any]]:
    """What was recorded after every epoch; one that was trained again after an interruption counts once.

    Raises:
        UserError: the file holds something else.
    """
    return list({record["epoch"]: record for record in _records(folder) if "epoch" in record}.values())


def steps_of(folder: Path) -> list[dict[str, Any]]:
    """What was recorded within the epochs, by step; a step that was made again after an interruption counts once.

    Raises:
        UserError: the file holds something else.
    """
    return list({record["step"]: record for record in _records(folder) if "train" in record}.values())


def _records(folder: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of the file; none where the run has not begun."""
    path = folder / METRICS
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace") as lines:
        for at, line in enumerate(lines, start=1):
            if not line.endswith("\n"):  # being written, or cut when the run was killed
                return
            try:
                record = json.loads(line)
                whole = all(isinstance(n, int) and 0 <= n < 2**53 for n in (record["step"], record.get("epoch", 0)))
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                whole = False
            if not whole:
                raise UserError(f"line {at} of {str(path)!r} is no record of a run")
            yield record


def number(value: object) -> float | None:
    """What is a number that can be drawn, and None for the rest."""
    return float(value) if type(value) in (int, float) and abs(value) < 1e100 else None


def read_json(file: Path, shape: object) -> Any:
    """The content of a JSON file.

    Args:
        file: that is there.
        shape: a type or a tuple of types; [shape of all] of a list; {name: shape} of what has these names at least;
            {str: shape of all} of what has any names.

    Raises:
        UserError: it is no JSON, or has another shape.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{str(file)!r} is no JSON: {one_line(error)}") from None
    _check_shape(content, shape, repr(str(file)))
    return content


def _check_shape(value: Any, shape: Any, place: str) -> None:
    kinds = shape if isinstance(shape, tuple) else (shape if isinstance(shape, type) else type(shape),)
    if type(value) not in kinds:  # True is no number
        names = {dict: "values by name", list: "a list", str: "text", float: "a number", type(None): "null"}
        allowed = " or ".join(names[kind] for kind in kinds if kind in names)
        raise UserError(f"{place} is {shown(value)}, not {allowed}")
    if isinstance(shape, list):
        for index, entry in enumerate(value):
            _check_shape(entry, shape[0], f"{place}[{index}]")
    elif isinstance(shape, dict):
        for name, inner in (dict.fromkeys(value, shape[str]) if str in shape else shape).items():
            if name not in value:
                raise UserError(f"{place} has no {shown(name)}")
            _check_shape(value[name], inner, f"{place}[{shown(name)}]")
