"""Speed and memory, as ratios measured side by side in one run.

    python scripts/benchmark.py SUBJECT [--device cuda] [--help]

Subjects: device, optimizer, branches, launches, data, decode, hyper-search, one-run, train, infer, scaling, start-up;
`SUBJECT --help` says what each measures.

What is compared takes turns, round after round, so that what else the machine does meets all alike; times are medians.
Every table is printed when it is there, and again where it grows; all of them are written as JSON with the machine, the
versions and the command, after each of them: a run that is cut keeps what it found.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import _root
import torch
import torch._dynamo
from benchmarks.report import Tables, as_table, environment, keep

from benchmarks import (
    branches,
    data,
    decode,
    device,
    hyper_search,
    infer,
    launches,
    one_run,
    optimizer,
    scaling,
    start_up,
    training,
)
from repopt.errors import UserError, one_line

SUBJECTS = {
    "device": device,
    "optimizer": optimizer,
    "branches": branches,
    "launches": launches,
    "data": data,
    "decode": decode,
    "hyper-search": hyper_search,
    "one-run": one_run,
    "train": training,
    "infer": infer,
    "scaling": scaling,
    "start-up": start_up,
}


def main() -> int:
    """Measure, print, and keep the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    subjects = parser.add_subparsers(dest="subject", required=True)
    for name, subject in SUBJECTS.items():
        summary = str(subject.__doc__)
        own = subjects.add_parser(name, help=" ".join(summary.partition(".")[0].split()), description=summary)
        own.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
        own.add_argument("--json", type=Path, help=f"default: benchmarks/{name}-<cpu or cuda>.json")
        subject.add_arguments(own)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    tables: Tables = {}
    try:
        where = device_of(arguments.device)
        file = arguments.json or _root.ROOT / "benchmarks" / f"{arguments.subject}-{where.type}.json"
        header = environment(where)
        torch.backends.cudnn.benchmark = True  # as in a training
        # Instead of going on eagerly, without a word.
        with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
            for title, rows in SUBJECTS[arguments.subject].run(arguments, where):
                if not tables:
                    print("\n".join(f"{key}: {value}" for key, value in header.items()))
                tables = {**tables, title: rows}
                keep(file, header, tables)
                print(f"\n{title}\n\n{as_table(rows)}", flush=True)
    except UserError as error:
        print(f"benchmark.py: {error}", file=sys.stderr)
        return 2
    return 0


def device_of(name: str) -> torch.device:
    """Return the device of that name; raise a UserError where there is none."""
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: {one_line(error)}") from None


if __name__ == "__main__":
    sys.exit(main())
