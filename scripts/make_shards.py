"""Makes shards of a data set: some hundred files instead of a million.

    python scripts/make_shards.py FOLDER TO --form parquet|wds [--dataset NAME] [--zip] [--images 2000] [--shuffle SEED]

FOLDER holds train/ and val/ of class folders, or with --zip the zips; --dataset parquet or wds makes shards of other
shards, such as the hubs' compressed ones, which may lie in an object store. The images are copied as they are, in their
order, so that a training on the shards is the training on the folder; --shuffle lays them in random order, for training
by blocks (DATA.SHUFFLE). A run that was stopped goes on where it was.
Train on them with DATA.DATASET parquet (or wds) and --data-path TO.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import _root  # noqa: F401
from benchmarks.arguments import positive

from train.command import run_command
from train.keys import KEYS


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; 0, or 2 after a mistake of the user, which is one line on stderr."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="FOLDER", help="the data set")
    parser.add_argument("to", metavar="TO", type=Path, help="the folder for the shards")
    parser.add_argument("--form", choices=("parquet", "wds"), required=True, help="Parquet files, or tars")
    parser.add_argument("--dataset", default="imagenet", help="DATA.DATASET of FOLDER (default: %(default)s)")
    parser.add_argument("--zip", action="store_true", help=KEYS["DATA.ZIP_MODE"].help)
    for column in ("IMAGE", "LABEL"):
        key = KEYS[f"DATA.{column}_COLUMN"]
        parser.add_argument(f"--{column.lower()}-column", default=key.default, help=key.help)
    parser.add_argument("--splits", nargs="+", choices=("train", "val"), default=["train", "val"])
    parser.add_argument("--images", type=positive, default=2000, help="in a shard (default: %(default)s)")
    parser.add_argument("--shuffle", metavar="SEED", type=int, help="lay the images in random order")
    given = parser.parse_args(argv)
    return run_command("make_shards.py", lambda: make(given))


def make(given: argparse.Namespace) -> None:
    """Write the shards.

    Raises:
        UserError: there is no such data set, or TO holds other shards.
    """
    import torch

    import data
    from data import registry
    from data.registry import FileSpec
    from data.shards.write import write_split

    columns = (given.image_column, given.label_column)
    source = data.Source(given.dataset, given.folder, zip_mode=given.zip, cache_mode="no", columns=columns)
    files = registry.find(source, FileSpec)
    info = data.describe(source, splits=given.splits)
    assert info.num_classes is not None  # files have classes
    for split in given.splits:
        images = files.open(source, split, info.num_classes, 0, 1)
        order = None
        if given.shuffle is not None:
            order = torch.randperm(len(images), generator=torch.Generator().manual_seed(given.shuffle)).tolist()
        write_split(images, info.classes, given.to, split, given.form, per_shard=given.images, order=order)
        print(f"{given.to}: {len(images)} images of {split}")


if __name__ == "__main__":
    sys.exit(main())
