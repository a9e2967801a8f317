"""Makes the scenes of handwritten digits that segmentation and detection are tried on without a download.

    python scripts/downstream/make_scenes.py [FOLDER]

The folder is then the --data-path of DATA.DATASET scenes (which makes the scenes itself where they are absent).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # scripts/
import _root  # noqa: F401

from data import scenes
from train.command import run_command


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; 0, or 2 after a mistake of the user, which is one line on stderr."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="FOLDER", nargs="?", default=scenes.DEFAULT, help="default: %(default)s")
    given = parser.parse_args(argv).folder
    counts = f"{scenes.NUM_TRAIN} scenes to train on, {scenes.NUM_VAL} to test"
    return run_command("make_scenes.py", lambda: print(f"{scenes.find(given)}: {counts}"))


if __name__ == "__main__":
    sys.exit(main())
