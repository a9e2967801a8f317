"""Training, evaluation and measurement of speed: plain functions with explicit arguments."""

from repopt.engine.evaluate import Evaluation, evaluate
from repopt.engine.fit import fit
from repopt.engine.precision import Precision
from repopt.engine.schedule import build_schedule
from repopt.engine.state import TrainingState
from repopt.engine.throughput import measure_throughput
from repopt.engine.train import Progress, count_steps, train_one_epoch

__all__ = [
    "Evaluation",
    "Precision",
    "Progress",
    "TrainingState",
    "build_schedule",
    "count_steps",
    "evaluate",
    "fit",
    "measure_throughput",
    "train_one_epoch",
]
