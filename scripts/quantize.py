"""Quantize a trained network to INT8: after training (ptq), or by training on as the INT8 network (qat).

    python scripts/quantize.py --arch RepOpt-VGG-B1-target --resume FILE --data-path IMAGENET --method ptq
    torchrun --nproc_per_node 8 scripts/quantize.py --arch RepOpt-VGG-B1-target --resume FILE --data-path IMAGENET \\
        --method qat [--scales-path FILE] [--preset default|fbgemm|per_tensor|tensorrt]

Evaluates the network before and after, and writes to <output>/<arch>/<tag>/artifacts/ both as ONNX (checked), the
weights as safetensors, and quantized.pth, from which scripts/export.py makes more. The configuration is that of
main_repopt.py; qat is a training like any other: it resumes, runs on many GPUs, and with the scales that the checkpoint
holds (or --scales-path) its optimizer is the RepOptimizer.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import _root

from main_repopt import DONE, INTERRUPTED
from repopt.errors import run_command
from train import config
from train.files import ARTIFACTS, SIGNAL_TO_NOISE

PROGRAM = config.Program(
    "quantize.py",
    "Quantize a trained network to INT8, and write it for others to run.",
    {flag: name for flag, name in config.MAIN.flags.items() if name not in ("EVAL_MODE", "THROUGHPUT_MODE")}
    | {"--method": "QUANT.METHOD", "--preset": "QUANT.PRESET"},
    recipe=str(_root.ROOT / "configs" / "imagenet" / "quantize.yaml"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code, as main_repopt.py does."""
    argv = sys.argv[1:] if argv is None else argv

    def command() -> int:
        settings = config.parse(argv, PROGRAM)
        from train.quantize import start  # torch and its exporters take seconds

        cfg = start(settings, argv, PROGRAM)
        if cfg is None:
            return INTERRUPTED
        if os.environ.get("RANK", "0") == "0":
            draw(Path(cfg.OUTPUT, ARTIFACTS))
        return DONE

    return run_command(PROGRAM.name, command)


def draw(artifacts: Path) -> None:
    """A picture of the noise in every layer."""
    from plots import plot_by_depth

    layers = json.loads((artifacts / SIGNAL_TO_NOISE).read_text())
    panels = {"signal to noise (dB)": {"INT8": {"output of the layer": list(layers.values())}}}
    plot_by_depth(panels, list(layers), artifacts / "signal_to_noise.png")


if __name__ == "__main__":
    sys.exit(main())
