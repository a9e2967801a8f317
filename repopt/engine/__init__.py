"""Training, evaluation and measurement of speed: plain functions with explicit arguments."""

from repopt.engine.compilation import COMPILE_MODES, compiled
from repopt.engine.evaluate import Evaluate, Evaluation, Result, evaluate
from repopt.engine.interruption import Interrupted
from repopt.engine.parallel import average_statistics, data_parallel
from repopt.engine.precision import Precision
from repopt.engine.safeguard import Safeguard
from repopt.engine.schedule import build_schedule
from repopt.engine.state import TrainingState
from repopt.engine.throughput import measure_throughput
from repopt.engine.train import Progress, count_steps, train_one_epoch
from repopt.engine.training import Training

__all__ = [
    "COMPILE_MODES",
    "Evaluate",
    "Evaluation",
    "Interrupted",
    "Precision",
    "Progress",
    "Result",
    "Safeguard",
    "Training",
    "TrainingState",
    "average_statistics",
    "build_schedule",
    "compiled",
    "count_steps",
    "data_parallel",
    "evaluate",
    "measure_throughput",
    "train_one_epoch",
]
