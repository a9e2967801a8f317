"""The paper's tables and figures, from one command each: its numbers and yours side by side.

    python scripts/reproduce.py --table 4 [6 9 ...] [--scale demo|full] [--seeds 0 1 2] [--dry-run]
    python scripts/reproduce.py --figure 6
    python scripts/reproduce.py --study one-run-nano-digits

`demo` is the same experiment with small networks on images that come with scikit-learn, minutes on a CPU; `full` is the
paper's own setting, on GPUs, with the data sets in the folders that the environment variables IMAGENET, CIFAR, CALTECH,
COCO and CITYSCAPES name. Runs go to <output>/<scale>/<arch>/<name>-seed<seed>/; tables share them. What is done is
skipped, what was stopped goes on. `--dry-run` prints what would be run, as a script for a shell, with GPUs and hours.

The result is printed and written beside the runs: table4.md, table4.json (`scripts/report.py` makes a page of it), and
the pictures of figures.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import _root

from train.command import EXIT_DONE, EXIT_INTERRUPTED, run_command


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; 0, 2 after a mistake of the user, 75 where it was interrupted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for kind, of, name in (("table", "the paper", "N"), ("figure", "the paper", "N"), ("study", "ours", "NAME")):
        parser.add_argument(f"--{kind}", nargs="+", default=[], metavar=name, help=f"of {of}")
    parser.add_argument("--scale", choices=("full", "demo"), default="demo", help="default: %(default)s")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="SEED", help="default: 0 1 2")
    parser.add_argument("--output", type=Path, default=Path("output/reproduce"), help="default: %(default)s")
    parser.add_argument("--dry-run", action="store_true", help="print the commands, and run nothing")
    arguments = parser.parse_args(argv)
    names = [f"{kind} {number}" for kind in ("table", "figure", "study") for number in getattr(arguments, kind)]
    if not names:
        parser.error("what? --table N, --figure N or --study NAME")
    os.chdir(_root.ROOT)

    def command() -> int:
        try:
            reproduce(names, arguments.scale, arguments.seeds, arguments.output, dry_run=arguments.dry_run)
        except KeyboardInterrupt:
            print("reproduce.py: stopped; the same command goes on from there", file=sys.stderr)
            return EXIT_INTERRUPTED
        return EXIT_DONE

    return run_command("reproduce.py", command)


def reproduce(names: Sequence[str], scale: str, seeds: Sequence[int], output: Path, *, dry_run: bool) -> None:
    """Run and show tables and figures, or show what would be run.

    Raises:
        UserError: an unknown one, one that there is not at this scale, or a run that cannot be run or failed.
        KeyboardInterrupt: the user, or a signal, stopped it.
    """
    from reproduction import execute, result  # torch and all else that takes seconds
    from reproduction.run import ExperimentRun, with_needs
    from reproduction.tables import load

    folder = output / scale
    for name, experiment in {name: load(name, scale) for name in names}.items():
        runs = {training: ExperimentRun.plan(training, seeds, folder) for training in experiment.trainings}
        every = with_needs([run for of_training in runs.values() for run in of_training])
        if dry_run:
            print(execute.as_script(every, scale))
            continue
        execute.run_all(every, scale)
        folder.mkdir(parents=True, exist_ok=True)
        content = result.build_result(name, scale, experiment, runs, folder)
        stem = folder / name.replace(" ", "")
        text = result.as_markdown(content)
        stem.with_suffix(".md").write_text(f"{text}\n")
        stem.with_suffix(".json").write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
        print(f"{text}\n\n{stem}.md, {stem}.json")


if __name__ == "__main__":
    sys.exit(main())
