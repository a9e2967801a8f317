"""The entrance: search scales, train a plain network with them, evaluate it, measure its speed.

    torchrun --nproc_per_node 1 main_repopt.py --cfg configs/hyper_search/b1.yaml --data-path CIFAR --tag search
    torchrun --nproc_per_node 8 main_repopt.py --cfg configs/imagenet/b1_target.yaml --data-path IMAGENET --tag train \\
        --scales-path output/RepOpt-VGG-B1-hs/search/scales.pth
    python main_repopt.py --arch RepOpt-VGG-B1-target --data-path IMAGENET --eval --resume FILE

A run is one process or many (torchrun); everything it writes goes to <output>/<arch>/<tag>/.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from repopt.errors import MISTAKE, run_command

try:
    from train import config
except ModuleNotFoundError as missing:  # the command `repopt` of an installed library
    print(f'repopt: the command line needs {missing.name}: in a checkout, pip install -e ".[train]"', file=sys.stderr)
    sys.exit(MISTAKE)

DONE = 0
INTERRUPTED = 75  # sysexits' EX_TEMPFAIL: saved after SIGTERM, SIGUSR1 or SIGINT; the same command goes on from there


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code: one of those above, or `repopt.errors.MISTAKE`."""
    argv = sys.argv[1:] if argv is None else argv

    def command() -> int:
        settings = config.parse(argv)
        from train.run import start  # torch and timm take seconds: --help and most mistakes are answered before

        return DONE if start(settings, argv) is not None else INTERRUPTED

    return run_command(config.MAIN.name, command)


if __name__ == "__main__":
    sys.exit(main())
