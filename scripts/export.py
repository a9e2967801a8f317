"""Write a trained or quantized network as files that other software runs.

    python scripts/export.py --resume FILE [--arch ARCH] [--out DIR] [--formats onnx safetensors pt2 compiled] \\
        [--image-size HEIGHT WIDTH] [--dynamic-size]

FILE is a checkpoint of main_repopt.py or of the published release (with --arch), or one of scripts/quantize.py
(quantized.pth, or a checkpoint of its training), which gives an INT8 network. Branches and batch norms are folded. The
files are fp32.onnx or int8.onnx and so on; none is written over. Of a detector they give the raw predictions, of which
its method `detections` makes objects.

    onnx         for batches of any size, INT8 as QuantizeLinear and DequantizeLinear pairs (QDQ); onnxruntime's outputs
                 are compared with torch's before it is done
    detections   of a detector of DETECT.HEAD fcos: ONNX that gives boxes, scores and labels, non-maximum suppression
                 included
    safetensors  the weights by name
    pt2          torch.export's program
    compiled     a package of AOTInductor for this kind of machine; not of an INT8 network, which it computes in float
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import _root  # noqa: F401
from benchmarks.arguments import positive

from train.command import run_command
from train.keys import KEYS

MULTIPLE = 32  # by which our networks divide the size of an image
# What follows "fp32" or "int8" in the names of files.
ENDINGS = {
    "onnx": ".onnx",
    "detections": "_detections.onnx",
    "safetensors": ".safetensors",
    "pt2": ".pt2",
    "compiled": "-compiled.pt2",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; 0, or 2 after a mistake of the user, which is one line on stderr."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resume", metavar="FILE", required=True, help="the checkpoint")
    parser.add_argument("--arch", help="whose weights they are, such as RepOpt-VGG-B1-target; if FILE does not say")
    parser.add_argument("--out", metavar="DIR", type=Path, help="default: a folder 'export' beside FILE")
    parser.add_argument("--formats", nargs="+", choices=ENDINGS, default=["onnx", "safetensors"])
    weights = KEYS["MODEL.WEIGHTS"]
    parser.add_argument("--weights", choices=weights.choices, default=weights.default, help=weights.help)
    parser.add_argument(
        "--image-size",
        metavar="PIXELS",
        nargs="+",
        type=positive,
        help="height and width, or one number for both (default: as FILE says, else 224)",
    )
    parser.add_argument(
        "--dynamic-size",
        action="store_true",
        help=f"onnx, pt2 and compiled take images whose sides are any multiples of {MULTIPLE} from {2 * MULTIPLE} on",
    )
    arguments = parser.parse_args(argv)
    return run_command("export.py", lambda: export_all(arguments))


def export_all(arguments: argparse.Namespace) -> None:
    """Write the files.

    Raises:
        UserError: no such checkpoint, a file that exists, a network or operation that cannot be exported.
    """
    import torch

    from repopt import checkpoint, export
    from repopt.errors import UserError
    from train import trained

    source = trained.read(arguments.resume, arguments.arch, weights=arguments.weights)
    kind = "int8" if source.quantized else "fp32"
    if source.quantized and "compiled" in arguments.formats:
        raise UserError("a compiled package computes an INT8 network in float: export it as onnx")
    out = arguments.out or Path(arguments.resume).parent / "export"
    paths = {name: out / f"{kind}{ENDINGS[name]}" for name in arguments.formats}
    for path in paths.values():
        export.refuse_existing(path)
    size = source.image_size if arguments.image_size is None else image_size(arguments.image_size, source.multiple)
    if source.quantized and size != source.image_size:
        took, takes = (" x ".join(map(str, sides)) for sides in (source.image_size, size))
        raise UserError(f"--image-size: the network was quantized for {took}, not for {takes}")
    if source.quantized and arguments.dynamic_size:
        raise UserError("--dynamic-size: a quantized network takes the size that it was quantized for")
    print(f"{checkpoint.WEIGHTS[source.weights]} of {source.path}")
    whole, predictor, end_to_end, trained_for = source.exported(size)
    if "detections" in arguments.formats and (end_to_end is None or arguments.dynamic_size):
        raise UserError("--formats detections is of a detector of DETECT.HEAD fcos, for images of one size")
    sides = [max(2, -(-side // MULTIPLE)) * MULTIPLE for side in size] if arguments.dynamic_size else size
    images = torch.randn(8, source.input_shape[0], *sides)
    writers: dict[str, Callable[..., object]] = {
        "onnx": export.write_onnx,
        "pt2": export.write_program,
        "compiled": export.write_compiled,
    }
    metadata = trained_for._replace(images=trained_for.images.resized(size)).as_metadata()
    for name, path in paths.items():
        if name == "safetensors":
            export.write_safetensors(whole, path, metadata)
        elif name == "detections" and end_to_end is not None:
            export.write_end_to_end(end_to_end, images, path, metadata)
        else:
            writers[name](predictor, images, path, metadata, MULTIPLE if arguments.dynamic_size else None)
        print(f"{path} ({path.stat().st_size / 1e6:.2f} MB)")


def image_size(given: Sequence[int], multiple: int) -> tuple[int, int]:
    """Return height and width as --image-size gives them.

    Raises:
        UserError: more than two numbers, or one that is no multiple of what the network takes.
    """
    from repopt.errors import UserError

    option = f"--image-size {' '.join(map(str, given))}"
    if len(given) > 2:
        raise UserError(f"{option}: a height and a width, or one number for both, are expected")
    if any(side % multiple for side in given):
        raise UserError(f"{option}: the network takes multiples of {multiple}")
    return given[0], given[-1]


if __name__ == "__main__":
    sys.exit(main())
