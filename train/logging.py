"""What a run says: lines for people, and numbers for curves."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm import tqdm

logger = logging.getLogger("repopt")


class _AboveTheBar(logging.Handler):
    """Lines on the console that do not tear a progress bar apart."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record))


class _File(logging.FileHandler):
    """A log that ends the run where it cannot be written (a full disk), as every other file does."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        raise  # what `emit` has caught


def start_log(file: Path | None, *, console: bool) -> None:
    """Send the log to the end of a file, and to the console."""
    logger.setLevel(logging.INFO)
    logger.propagate = False
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    handlers: list[logging.Handler] = [_AboveTheBar()] if console else []
    if file is not None:
        handlers.append(_File(file))
    for handler in handlers:
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
        logger.addHandler(handler)


class Metrics:
    """Numbers of a run, by images seen: a line of ``metrics.jsonl`` and a point on TensorBoard's curves each.

    How many images a step takes may change from one start of a run to the next; so their number is the measure.

    Args:
        folder: of the run; None writes nothing (all ranks but the first).
        epochs, images, step: done when the run goes on, images in all epochs; what was written of later ones before it
            stopped is dropped.
    """

    def __init__(self, folder: Path | None, *, epochs: int = 0, images: int = 0, step: int = 0) -> None:
        self._file = self._board = None
        if folder is not None:
            from torch.utils.tensorboard import SummaryWriter  # takes seconds to import

            path = folder / "metrics.jsonl"
            if path.is_file():
                new = path.with_name(f"{path.name}.writing")
                with path.open(encoding="utf-8", errors="replace") as lines:
                    new.write_text("".join(line for line in lines if _is_done(line, epochs, images, step)))
                new.replace(path)
            self._file = path.open("a", buffering=1)
            self._board = SummaryWriter(str(folder), purge_step=images + 1)

    def write(self, step: int, images: int, **numbers: Any) -> None:
        """Write numbers (or groups of numbers) after an optimizer step and so many images in all epochs."""
        if self._file is None or self._board is None:
            return
        self._file.write(json.dumps({"step": step, "images": images, **as_json(numbers)}, allow_nan=False) + "\n")
        for name, value in numbers.items():
            points = value if isinstance(value, dict) else {"": value}
            for part, number in points.items():
                self._board.add_scalar(f"{name}/{part}" if part else name, number, images)

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._file is not None and self._board is not None:
            self._file.close()
            self._board.close()


def _is_done(line: str, epochs: int, images: int, step: int) -> bool:
    """Return whether a line of ``metrics.jsonl`` is of the first epochs and images (steps, before images were noted).

    Half a line, of a run that was killed, is not.
    """
    try:
        record = json.loads(line)
        if not line.endswith("\n") or record.get("epoch", 0) > epochs:
            return False
        return record["images"] <= images if "images" in record else record["step"] <= step
    except (ValueError, KeyError, TypeError, AttributeError):
        return False


def as_json(numbers: dict[str, Any]) -> dict[str, Any]:
    """Return numbers, and dicts of them, with null for what JSON has no number for (NaN, infinities)."""
    return {
        name: as_json(value) if isinstance(value, dict) else value if math.isfinite(value) else None
        for name, value in numbers.items()
    }


def listed(names: Sequence[str], most: int = 8) -> str:
    """Return names with commas between them, and of many how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{', '.join(names[:most])}{more}"
