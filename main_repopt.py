"""Search scales, train a plain network with them, evaluate it, measure its speed.

    torchrun --nproc_per_node 1 main_repopt.py --cfg configs/hyper_search/b1.yaml --data-path CIFAR --tag search
    torchrun --nproc_per_node 8 main_repopt.py --cfg configs/imagenet/b1_target.yaml --data-path IMAGENET --tag train \\
        --scales-path output/RepOpt-VGG-B1-hs/search/scales.pth
    python main_repopt.py --arch RepOpt-VGG-B1-target --data-path IMAGENET --eval --resume FILE

A run is one process or many (torchrun); everything it writes goes to <output>/<arch>/<tag>/.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

try:
    import yacs  # noqa: F401 (of what the command line needs)

    from train.command import MAIN, run_program
except ModuleNotFoundError as missing:  # the command `repopt` of an installed library
    print(f'repopt: the command line needs {missing.name}: in a checkout, pip install -e ".[train]"', file=sys.stderr)
    sys.exit(2)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code, one of those of train/command.py."""
    return run_program(MAIN, argv)


if __name__ == "__main__":
    sys.exit(main())
