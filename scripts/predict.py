"""What a trained network sees in pictures.

    python scripts/predict.py FILE PICTURES... [--top-k 5] [--out FILE.json|FILE.csv] [--draw DIR]

FILE is a checkpoint of a training (or of the published release, with --arch), or an ONNX file of export.py or
quantize.py, INT8 as well. PICTURES are files, folders, or patterns such as 'day*/*.jpg'. They are prepared as in the
evaluation of the training, by what FILE says. A table goes to the terminal; of a segmentation network or a detector,
the pictures with what was found drawn over go to DIR (default: output/predict/<name of FILE>). Pictures that cannot be
read are named and passed over.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import _root  # noqa: F401
from benchmarks.arguments import positive

from train.command import run_command
from train.keys import CLASSIFY, KEYS

if TYPE_CHECKING:
    from findings import Answer


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; 0, or 2 after a mistake of the user, which is one line on stderr."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", metavar="FILE", help="checkpoint or ONNX file")
    parser.add_argument("pictures", metavar="PICTURES", nargs="+", help="files, folders, patterns")
    parser.add_argument("--arch", help="of the network, such as RepOpt-VGG-B1-target; if FILE does not say")
    weights = KEYS["MODEL.WEIGHTS"]
    parser.add_argument("--weights", choices=weights.choices, default=weights.default, help=weights.help)
    parser.add_argument("--top-k", type=positive, default=5, help="classes of a picture (default: %(default)s)")
    parser.add_argument("--batch-size", type=positive, default=32, help="of a classifier (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=0, help="processes that read pictures (default: this one)")
    parser.add_argument("--min-score", type=float, default=0.5, help="of an object (default: %(default)s)")
    parser.add_argument("--out", metavar="FILE", type=Path, help="what was found, as JSON or CSV")
    parser.add_argument("--draw", metavar="DIR", type=Path, help="of drawn pictures")
    given = parser.parse_args(argv)
    return run_command("predict.py", lambda: predict(given))


def predict(given: argparse.Namespace) -> None:
    """Print, and write, what a network finds in pictures.

    Raises:
        UserError: there is no such network or picture, or none that can be read.
    """
    from findings import Finder, find_pictures
    from torchvision.io import write_png

    import repopt
    from repopt.errors import UserError

    if given.workers < 0:
        raise UserError(f"--workers is a number of processes from 0 on, not {given.workers}")
    if given.out is not None and given.out.suffix not in WRITERS:
        raise UserError(f"--out is a file {' or '.join(WRITERS)}, not {str(given.out)!r}")
    paths = find_pictures(given.pictures)
    loaded = repopt.load(given.file, given.arch, weights=given.weights)
    drawn = given.draw or Path("output", "predict", Path(given.file).stem)
    if loaded.task != CLASSIFY:
        drawn.mkdir(parents=True, exist_ok=True)
    finder = Finder(
        loaded,
        top_k=given.top_k,
        min_score=given.min_score,
        draw=lambda number, picture: write_png(picture, str(drawn / f"{number}_{Path(paths[number]).stem}.png")),
    )
    answers = list(finder(paths, batch_size=given.batch_size, workers=given.workers))
    for answer in answers:
        if answer.error:
            print(f"cannot read {answer.picture!r} ({answer.error})", file=sys.stderr)
    if all(answer.error for answer in answers):
        raise UserError(f"none of {len(answers)} pictures can be read")
    print_answers(answers)
    if loaded.task != CLASSIFY:
        print(f"drawn in {drawn}")
    if given.out is not None:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        WRITERS[given.out.suffix](answers, given.out)
        print(given.out)


def print_answers(answers: Sequence[Answer]) -> None:
    """Print a line per picture."""
    width = max(len(answer.picture) for answer in answers)
    for answer in answers:
        if answer.error is None:
            parts = (
                f"{found['class']} {100 * found.get('score', found.get('share', 0)):.1f} %" for found in answer.found
            )
            print(f"{answer.picture:{width}}  {', '.join(parts) or 'nothing'}")


def write_json(answers: Sequence[Answer], path: Path) -> None:
    """Write a list of pictures, each with what was found, or why it cannot be read."""
    content = [{"picture": a.picture} | ({"error": a.error} if a.error else {"found": a.found}) for a in answers]
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def write_csv(answers: Sequence[Answer], path: Path) -> None:
    """Write a row for all that was found, with its picture; unreadable pictures have none."""
    rows = [{"picture": answer.picture} | found for answer in answers for found in answer.found]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0] if rows else ["picture"])
        writer.writeheader()
        writer.writerows(rows)


WRITERS = {".json": write_json, ".csv": write_csv}


if __name__ == "__main__":
    sys.exit(main())
