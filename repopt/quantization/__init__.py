"""INT8 by torchao's PT2E flow: post-training quantization (PTQ) and quantization-aware training (QAT).

    prepared = prepare(model, images, "ptq", "default")
    calibrate(prepared, batches)  # and after "qat", train it
    int8 = convert(prepared)

All that is known of torchao stands in this package. It is the extra deploy.
"""

import logging

from repopt.errors import UserError, one_line

try:
    # torchao 0.18 registers an enum at its import in a way that torch.utils._pytree warns about.
    pytree_logger = logging.getLogger("torch.utils._pytree")
    level = pytree_logger.level
    pytree_logger.setLevel(logging.ERROR)
    import torchao.quantization.pt2e.quantize_pt2e  # noqa: F401

    pytree_logger.setLevel(level)
except ImportError as error:
    raise UserError(f"quantization needs torchao (pip install 'repopt[deploy]'): {one_line(error)}") from None

from repopt.quantization.calibrators import CALIBRATORS, check_calibrator
from repopt.quantization.equalize import correct_biases, equalize
from repopt.quantization.flow import (
    MAX_BATCH,
    Int8,
    PreparedModel,
    calibrate,
    convert,
    export_program,
    load,
    prepare,
)
from repopt.quantization.noise import (
    choose_float_layers,
    most_sensitive,
    outputs_signal_to_noise,
    sensitivity,
    signal_to_noise,
)
from repopt.quantization.presets import PRESETS, Preset, find_preset

__all__ = [
    "CALIBRATORS",
    "MAX_BATCH",
    "PRESETS",
    "Int8",
    "PreparedModel",
    "Preset",
    "calibrate",
    "check_calibrator",
    "choose_float_layers",
    "convert",
    "correct_biases",
    "equalize",
    "export_program",
    "find_preset",
    "load",
    "most_sensitive",
    "outputs_signal_to_noise",
    "prepare",
    "sensitivity",
    "signal_to_noise",
]
