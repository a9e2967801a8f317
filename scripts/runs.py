"""What the folder of a run says about it: its numbers by epoch and by step, its configuration, and its starts."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import _root  # noqa: F401

from repopt.errors import UserError, one_line
from train import config
from train.file_names import COLUMNS, CONFIG, RUN, Column
from train.keys import CLASSIFY

METRICS = "metrics.jsonl"
NONE = "–"


class RunFolderSummary(NamedTuple):
    """The files of a run's folder, read.

    Attributes:
        folder: of the run.
        epochs: what was recorded after every epoch.
        settings: the configuration, nested; empty where there is none.
        run: the content of run.json: starts, parameters and images; empty for runs that have none.
    """

    folder: Path
    epochs: Sequence[Mapping[str, Any]]
    settings: Mapping[str, Any]
    run: Mapping[str, Any]

    @classmethod
    def read(cls, folder: Path) -> RunFolderSummary:
        """Read a folder.

        Raises:
            UserError: a file of it is damaged.
        """
        settings, run = (read_json(folder / name) if (folder / name).is_file() else {} for name in (CONFIG, RUN))
        return cls(folder, epochs_of(folder), settings, run)

    @property
    def arch(self) -> str:
        """The architecture; empty where the configuration does not say."""
        return str(config.lookup(self.settings, "MODEL.ARCH") or "")

    @property
    def columns(self) -> Sequence[Column]:
        """The numbers of the run's evaluations; the first is the score."""
        return COLUMNS.get(str(config.lookup(self.settings, "TASK")), COLUMNS[CLASSIFY])

    @property
    def scores(self) -> dict[int, float]:
        """The score (percent) by epoch, where it was evaluated."""
        name = f"val.{self.columns[0].name}"
        found = ((record["epoch"], number(config.lookup(record, name))) for record in self.epochs)
        return {epoch: score for epoch, score in found if score is not None}

    def summary(self) -> dict[str, str]:
        """Return the training in a few numbers; an empty dict where nothing was recorded."""
        if not self.epochs:
            return {}
        title, scores = self.columns[0].title, self.scores
        best = max(scores, key=scores.__getitem__, default=0)
        done, planned = self.epochs[-1]["epoch"], number(config.lookup(self.settings, "TRAIN.EPOCHS"))
        seconds = sum(number(record.get("train_seconds")) or 0 for record in self.epochs)
        return {
            f"final {title}": f"{scores[max(scores)]:.2f} %" if scores else NONE,
            f"best {title}": f"{scores[best]:.2f} % (epoch {best})" if scores else NONE,
            "epochs": str(done) if planned is None else f"{done} of {planned:.0f}",
            "training time": str(timedelta(seconds=round(seconds))),
        }

    def sizes(self) -> dict[str, str]:
        """Return the numbers of parameters and images."""
        parameters = number(self.run.get("parameters"))
        return {
            "parameters": NONE if parameters is None else f"{parameters / 1e6:.2f} M",
            "training images": str(self.run.get("training_images", NONE)),
            "test images": str(self.run.get("test_images", NONE)),
        }


def epochs_of(folder: Path) -> list[dict[str, Any]]:
    """Return what was recorded after every epoch; one that was trained again after an interruption counts once.

    Raises:
        UserError: the file holds something else.
    """
    return list({r["epoch"]: r for r in _records(folder) if "epoch" in r and "train" not in r}.values())


def steps_of(folder: Path) -> list[dict[str, Any]]:
    """Return what was recorded within the epochs; a step that was made again after an interruption counts once.

    Raises:
        UserError: the file holds something else.
    """
    return list({record["step"]: record for record in _records(folder) if "train" in record}.values())


def _records(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the whole lines of metrics.jsonl; none where the run has not begun."""
    path = folder / METRICS
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace") as lines:
        for at, line in enumerate(lines, start=1):
            if not line.endswith("\n"):  # being written, or cut when the run was killed
                return
            try:
                record = json.loads(line)
                valid = type(record["step"]) is type(record.get("epoch", 0)) is int
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                valid = False
            if not valid:
                raise UserError(f"line {at} of {str(path)!r} is no record of a run")
            yield record


def number(value: object) -> float | None:
    """Return a number that can be drawn; None for anything else."""
    if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e100:
        return float(value)
    return None


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Raises:
        UserError: it holds something else.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{str(file)!r} is no JSON: {one_line(error)}") from None
    if not isinstance(content, dict):
        raise UserError(f"{str(file)!r} holds {type(content).__name__}, not values by name")
    return content
