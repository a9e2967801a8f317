"""The ways to INT8 that need no training, which scripts/quantize.py --method compare puts side by side."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from train.keys import AUTO

WAYS: Mapping[str, Mapping[str, Any]] = {
    "per tensor, minmax": {"QUANT.PRESET": "per_tensor", "QUANT.CALIBRATOR": "minmax"},
    **{name: {"QUANT.CALIBRATOR": name} for name in ("minmax", "histogram", "percentile", "mse", "entropy")},
    "equalized, biases corrected": {"QUANT.EQUALIZE": True, "QUANT.BIAS_CORRECTION": True},
    "float layers auto": {"QUANT.FLOAT_LAYERS": AUTO},
}
"""What each has over the configuration, by name."""
