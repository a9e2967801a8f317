"""The entrance: search scales, train a plain network with them, evaluate it, measure its speed.

    torchrun --nproc_per_node 1 main_repopt.py --cfg configs/hyper_search/b1.yaml --data-path CIFAR --tag search
    torchrun --nproc_per_node 8 main_repopt.py --cfg configs/imagenet/b1_target.yaml --data-path IMAGENET --tag train \\
        --scales-path output/RepOpt-VGG-B1-hs/search/scales.pth
    python main_repopt.py --arch RepOpt-VGG-B1-target --data-path IMAGENET --eval --resume FILE

A run is one process or many (torchrun); everything it writes goes to <output>/<arch>/<tag>/.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence

from repopt import config
from repopt.errors import UserError

DONE = 0
MISTAKE = 2  # of the user, or of the machine: a full disk
INTERRUPTED = 75  # sysexits' EX_TEMPFAIL: saved after SIGTERM, SIGUSR1 or SIGINT; the same command goes on from there


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code, one of those above; what stopped it is one line on stderr."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        settings = config.parse(argv)
        from entrance.run import start  # torch and timm take seconds: --help and most mistakes are answered before

        return DONE if start(settings, argv) else INTERRUPTED
    except UserError as error:
        message = str(error)
    except OSError as error:  # of the machine: no permission, no space, a path that is none
        message = f"{error.strerror or error}: {error.filename}" if error.filename else error.strerror or str(error)
    if os.environ.get("RANK", "0") != "0":
        time.sleep(2)  # mostly the first process has the same to say; torchrun then ends this one before it does
    print(f"main_repopt.py: {message}", file=sys.stderr)
    return MISTAKE


if __name__ == "__main__":
    sys.exit(main())
