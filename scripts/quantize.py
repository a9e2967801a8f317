"""Quantize a trained network to INT8: after training (ptq), or by training on as the INT8 network (qat).

With --method compare it is quantized after training in every way that there is, and a table says what each costs.

    python scripts/quantize.py --arch RepOpt-VGG-B1-target --resume FILE --data-path IMAGENET --method ptq
    torchrun --nproc_per_node 8 scripts/quantize.py --arch RepOpt-VGG-B1-target --resume FILE --data-path IMAGENET \\
        --method qat [--scales-path FILE] [--preset default|fbgemm|per_tensor|tensorrt]

Evaluates the network before and after, and writes to <output>/<arch>/<tag>/artifacts/ both as ONNX (checked), the
weights as safetensors, and quantized.pth, from which scripts/export.py makes more. The configuration is that of
main_repopt.py; qat is a training like any other: it resumes, runs on many GPUs, and with the scales that the checkpoint
holds (or --scales-path) its optimizer is the RepOptimizer. By --opts: QUANT.CALIBRATOR, QUANT.FLOAT_LAYERS,
QUANT.EQUALIZE and QUANT.BIAS_CORRECTION of ptq, QUANT.DISTILL of qat (docs/quantization.md).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import _root

from train.command import MAIN, Program, run_program
from train.file_names import ARTIFACTS, SIGNAL_TO_NOISE

if TYPE_CHECKING:
    from yacs.config import CfgNode

    from train.config import Settings

PROGRAM = Program(
    "quantize.py",
    "Quantize a trained network to INT8, and write it for others to run.",
    {flag: name for flag, name in MAIN.flags.items() if name not in ("EVAL_MODE", "THROUGHPUT_MODE")}
    | {"--method": "QUANT.METHOD", "--preset": "QUANT.PRESET"},
    recipe=str(_root.ROOT / "configs" / "imagenet" / "quantize.yaml"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code, as main_repopt.py does."""
    return run_program(PROGRAM, argv, start=start, draw=draw)


def start(settings: Settings, argv: Sequence[str], program: Program) -> CfgNode | None:
    """Quantize, as `train.quantize.start` does."""
    from train import quantize  # imports torch and its exporters, which takes seconds

    return quantize.start(settings, argv, program)


def draw(cfg: CfgNode) -> None:
    """Draw the noise in every layer."""
    from plots import plot_by_depth

    artifacts = Path(cfg.OUTPUT, ARTIFACTS)
    if cfg.QUANT.METHOD == "compare":
        return
    layers = json.loads((artifacts / SIGNAL_TO_NOISE).read_text())
    panels = {"signal to noise (dB)": {"INT8": {"output of the layer": list(layers.values())}}}
    plot_by_depth(panels, list(layers), artifacts / "signal_to_noise.png")


if __name__ == "__main__":
    sys.exit(main())
