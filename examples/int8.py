"""Quantize a plain network to INT8 after training, and write it as ONNX.

pip install ".[deploy]"
python examples/int8.py [FILE.onnx]
"""

import statistics
import sys
import tempfile
from pathlib import Path

import torch

import repopt
from repopt import export, quantization


def main(file: str | None = None) -> tuple[float, int]:
    """Return the median over the layers of their signal to noise, in dB, and the convolutions on integers."""
    torch.manual_seed(0)
    model = repopt.create_model("RepOpt-VGG-nano", mode="target", num_classes=10).eval()  # ... trained
    images = torch.randn(16, 3, 32, 32)
    prepared = quantization.prepare(model, images[:1], "ptq", "default")
    quantization.calibrate(prepared, images.split(8))  # ... images of the training set, as in evaluation
    int8 = quantization.convert(prepared)
    noise = quantization.signal_to_noise(prepared, int8, images)
    path = Path(file) if file else Path(tempfile.mkdtemp(), "int8.onnx")
    export.write_onnx(int8, images, path)  # compares onnxruntime's outputs with torch's
    return statistics.median(noise.values()), export.operations(path)["QLinearConv"]


if __name__ == "__main__":
    print("median signal to noise of the layers: {:.1f} dB; convolutions on integers: {}".format(*main(*sys.argv[1:])))
