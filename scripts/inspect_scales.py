"""Shows what a hyper-search found: the scales in a file, and the Grad Mults that follow from them.

    python scripts/inspect_scales.py FILE [--arch MODEL] [--out DIR]

FILE is a scale file or the checkpoint of a hyper-search; of a search within a detector or a segmentation network, the
scales of the backbone are shown. The model whose blocks its scales fit is found by their names and shapes. Tables go to
the terminal, a picture to DIR/<name of FILE>.png.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import _root  # noqa: F401
import torch
from plots import Range, plot_scales
from torch import Tensor, nn

import repopt
from repopt import detection, segmentation
from repopt.blocks import key_of
from repopt.errors import UserError
from repopt.models import list_archs
from train.command import run_command


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; 0, or 2 after a mistake of the user, which is one line on stderr."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", metavar="FILE", type=Path)
    parser.add_argument("--arch", metavar="MODEL", help="whose scales they are, such as RepOpt-VGG-B1")
    parser.add_argument("--out", metavar="DIR", type=Path, default=Path("output/inspect"), help="default: %(default)s")
    given = parser.parse_args(argv)
    return run_command("inspect_scales.py", lambda: inspect(given.file, given.arch, given.out))


def inspect(file: Path, arch: str | None, out: Path) -> None:
    """Print the tables of a file and draw its picture.

    Raises:
        UserError: the file holds no scales, or they do not fit `arch`, or without one any model.
    """
    scales = of_backbone(repopt.load_scales(file))
    models = [arch] if arch else fitting_models(scales)
    if not models:
        raise UserError(f"the scales of {str(file)!r} fit no model; --arch MODEL tells where they differ from it")
    with torch.device("meta"):
        model = repopt.create_model(models[0], mode="target")
    model.to_empty(device="cpu")  # the kernels' places are asked for, not their values
    scales = repopt.bind(model, scales).scales
    title = f"{file.name}: {' or '.join(models)}"
    print(title)
    header = ("block", "branch", "channels", "mean", "std", "min", "max", "negative")
    print_table(header, scale_rows(model, scales), names=2)
    ranges = {}
    for rule, degree in {"SGD": repopt.RepSGD.degree, "AdamW": repopt.RepAdamW.degree}.items():
        mults = {name: mult.dense() for name, mult in repopt.grad_mults(model, scales, degree=degree).items()}
        print(
            f"\nGrad Mults under {rule}: sums of |scale|^{1 + degree}, an identity counts 1 (at: out, in, row, column)"
        )
        print_table(("kernel", "min", "at", "median", "max", "at"), map(mult_row, mults, mults.values()), names=1)
        ranges[rule] = [Range(*(float(f(m)) for f in (torch.min, torch.median, torch.max))) for m in mults.values()]
    out.mkdir(parents=True, exist_ok=True)
    picture = out / f"{file.stem}.png"
    plot_scales(model, scales, picture, mults=ranges, title=title)
    print(f"\n{picture}")


def of_backbone(scales: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return scales by the names of a classifier: of a network with a backbone, those of the backbone alone."""
    for body in (segmentation.BODY, detection.BODY):
        if own := {name.removeprefix(f"{body}."): s for name, s in scales.items() if name.startswith(f"{body}.")}:
            return own
    return scales


def fitting_models(scales: Mapping[str, Tensor]) -> list[str]:
    """Return the names of the models that the scales fit and that leave the fewest other entries unexplained.

    A hyper-search's checkpoint has such entries: what else of its model is one-dimensional.
    """
    unexplained = {}
    for name in sorted({arch.model for arch in list_archs().values()}):
        model = search_model(name)
        try:
            repopt.bind(model, scales)
        except UserError:
            continue
        unexplained[name] = len(scales.keys() - model.state_dict().keys())
    return [name for name, count in unexplained.items() if count == min(unexplained.values())]


@functools.cache
def search_model(name: str) -> nn.Module:
    """Return a model as it is searched on, without values."""
    with torch.device("meta"):
        return repopt.create_model(name, mode="hs")


def scale_rows(model: nn.Module, scales: Mapping[str, Tensor]) -> Iterator[tuple[str, ...]]:
    """Yield the scales of every branch of every block in numbers, then those of all."""
    for block, module in repopt.declared_blocks(model):
        for branch in module.block.branches:
            values = scales[key_of(block, branch.searched_name)]
            numbers = values.mean(), values.std(correction=0), values.min(), values.max()
            negative = int((values < 0).sum())
            yield block, branch.searched_name, str(len(values)), *(f"{number:.4f}" for number in numbers), str(negative)
    every = torch.cat(list(scales.values()))
    yield "all", "", str(len(every)), "", "", f"{every.min():.4f}", f"{every.max():.4f}", str(int((every < 0).sum()))


def mult_row(name: str, mult: Tensor) -> tuple[str, ...]:
    """Return the extremes of a Grad Mult (O, I, *k) with the first place of each, and its median."""
    low, high = (
        ",".join(str(int(index)) for index in torch.unravel_index(place, mult.shape))
        for place in (mult.argmin(), mult.argmax())
    )
    return name, f"{mult.min():#.3g}", low, f"{mult.median():#.3g}", f"{mult.max():#.3g}", high


def print_table(header: Sequence[str], rows: Iterable[Sequence[str]], *, names: int) -> None:
    """Print columns as wide as their widest entry: first `names` columns to the left, then numbers to the right."""
    lines = [header, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        left = map(str.ljust, line[:names], widths[:names])
        right = map(str.rjust, line[names:], widths[names:])
        print("  ".join([*left, *right]).rstrip())


if __name__ == "__main__":
    sys.exit(main())
