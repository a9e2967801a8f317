"""Train and evaluate detection: Faster, Mask or Cascade Mask R-CNN, or FCOS, on a backbone of ours.

    torchrun --nproc_per_node 8 scripts/downstream/detect.py --arch RepOpt-VGG-B1-target-norepopt --pretrained FILE \\
        --data-path COCO
    python scripts/downstream/detect.py --cfg configs/scenes/detect.yaml --arch RepOpt-VGG-nano-target --pretrained FILE
    python scripts/downstream/detect.py --arch RepOpt-VGG-B1-target --data-path COCO --eval --resume FILE

The backbone begins with a classifier's weights (--pretrained) or from scratch; DETECT.NECK declared makes the pyramid's
3x3 convolutions blocks of RepOpt-VGG, whose scales an -hs run searches; DETECT.HEAD fcos is made of such blocks. The
configuration, folder, logs and checkpoints are those of main_repopt.py; predictions.png shows what the network finds in
some images.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # scripts/
from downstream.command import program_of, train_and_draw

from train.keys import DETECT

PROGRAM = program_of(
    DETECT,
    "detect.py",
    "Train and evaluate detection (Faster, Mask or Cascade Mask R-CNN, or FCOS) on a backbone of ours.",
    "coco/detect.yaml",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code, as main_repopt.py does."""
    return train_and_draw(PROGRAM, argv)


if __name__ == "__main__":
    sys.exit(main())
