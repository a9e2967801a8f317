"""Names of what a run writes to the folder of a run, beside checkpoints, and of an evaluation's numbers."""

from __future__ import annotations

from typing import NamedTuple

CONFIG, RUN, THROUGHPUT, PREDICTIONS = "config.json", "run.json", "throughput.json", "predictions.png"
ARTIFACTS = "artifacts"  # a folder in that of a quantization; in it are
RESULTS, SIGNAL_TO_NOISE = "results.json", "signal_to_noise.json"


class Column(NamedTuple):
    """A number of an evaluation (`train.evaluation.Result.numbers`) in a table."""

    name: str
    title: str
    decimals: int = 2
    unit: str = "%"

    @property
    def head(self) -> str:
        """Return the heading of the table's column."""
        return f"{self.title} ({self.unit})" if self.unit else self.title


# By TASK; the first is the score (`train.evaluation.Result.score`), by which the best checkpoint is found.
COLUMNS = {
    "classify": (Column("top1", "top-1"), Column("top5", "top-5"), Column("loss", "loss", 4, "")),
    "segment": (Column("miou", "mIoU"), Column("pixel_accuracy", "pixel accuracy")),
    "detect": (Column("box_map", "box mAP"), Column("mask_map", "mask mAP")),
}
