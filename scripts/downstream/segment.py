"""Train and evaluate semantic segmentation: UPerNet on a backbone of ours.

    torchrun --nproc_per_node 4 scripts/downstream/segment.py --arch RepOpt-VGG-B1-target-norepopt --pretrained FILE \\
        --data-path CITYSCAPES
    python scripts/downstream/segment.py --cfg configs/scenes/segment.yaml --arch RepOpt-VGG-nano-target \\
        --pretrained FILE
    python scripts/downstream/segment.py --arch RepOpt-VGG-B1-target --data-path CITYSCAPES --eval --resume FILE

The backbone begins with a classifier's weights (--pretrained) or from scratch. The configuration, folder, logs and
checkpoints are those of main_repopt.py; predictions.png shows what the network makes of some images.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # scripts/
from downstream.command import program_of, train_and_draw

from train.keys import SEGMENT

PROGRAM = program_of(
    SEGMENT,
    "segment.py",
    "Train and evaluate semantic segmentation (UPerNet) on a backbone of ours.",
    "cityscapes/segment.yaml",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code, as main_repopt.py does."""
    return train_and_draw(PROGRAM, argv)


if __name__ == "__main__":
    sys.exit(main())
