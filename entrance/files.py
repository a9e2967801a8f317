"""Names of what the entrance writes to the folder of a run, beside checkpoints and metrics."""

from __future__ import annotations

CONFIG, THROUGHPUT, PREDICTIONS = "config.json", "throughput.json", "predictions.png"
ARTIFACTS = "artifacts"  # a folder in that of a quantization; in it are
RESULTS, SIGNAL_TO_NOISE = "results.json", "signal_to_noise.json"
