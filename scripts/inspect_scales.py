"""Shows what a hyper-search found: the scales in a file, how far they moved, and the Grad Mults that follow from them.

    python scripts/inspect_scales.py FILE [--arch MODEL] [--out DIR]

FILE is a scale file or the checkpoint of a hyper-search; of a search within a detector or a segmentation network, the
scales of the backbone are shown. The model whose blocks its scales fit is named by --arch or the checkpoint, or else
found among ours by names and shapes. How far the scales went from their start is said as a part of it: of all in a
branch together ("moved", in 2-norms), and of the one that went furthest. Tables go to the terminal, a picture to
DIR/<name of FILE>.png.
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
from repopt import checkpoint, detection, segmentation
from repopt.blocks import key_of
from repopt.errors import UserError
from repopt.models import list_archs, parse_arch, zoo
from repopt.scales import scales_of
from train import config
from train.command import run_command
from train.keys import KEYS
from train.search import MIN_WAY, movement, start_of_search

INITIAL_SCALES, PRIOR = "MODEL.INITIAL_SCALES", "MODEL.PRIOR"
NONE = "-"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; 0, or 2 after a mistake of the user, which is one line on stderr."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", metavar="FILE", type=Path)
    parser.add_argument(
        "--arch", metavar="MODEL", help="whose scales they are, such as RepOpt-VGG-B1 or timm/repvgg_a0"
    )
    parser.add_argument("--out", metavar="DIR", type=Path, default=Path("output/inspect"), help="default: %(default)s")
    given = parser.parse_args(argv)
    return run_command("inspect_scales.py", lambda: inspect(given.file, given.arch, given.out))


def inspect(file: Path, arch: str | None, out: Path) -> None:
    """Print the tables of a file and draw its picture.

    Raises:
        UserError: the file holds no scales, or they do not fit `arch`, or without one any model.
    """
    content = checkpoint.read(file)
    run = content.get("config")
    scales = of_backbone(scales_of(content, file))
    if arch is None and (own := config.lookup(run, "MODEL.ARCH")) is not None:
        arch = parse_arch(str(own)).model
    models = [arch] if arch else fitting_models(scales)
    if not models:
        raise UserError(
            f"the scales of {str(file)!r} fit no model of ours; --arch MODEL tells where they differ from it"
        )
    model = plain_model(models[0], run)
    scales = repopt.bind(model, scales).scales
    title = f"{file.name}: {' or '.join(models)}"
    print(title)
    header = ("block", "branch", "channels", "mean", "std", "min", "max", "negative", "start", "moved", "furthest")
    start = start_of_search(model)
    print_table(header, scale_rows(model, scales, start), names=2)
    moved = movement(start, {}, scales)
    says = zoo.is_name(models[0]) or config.lookup(run, INITIAL_SCALES) is not None
    assumed = "" if says else f" (if {INITIAL_SCALES} was {KEYS[INITIAL_SCALES].default}, which the file does not say)"
    print(
        f"\nThe search moved the scales by {moved.way:.2%} of their start{assumed}; one that moves them by less than "
        f"{MIN_WAY:.0%} has found nothing: TRAIN.CONSTANTS initial gives the same without a search"
    )
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
    plot_scales(model, scales, picture, start=start, mults=ranges, title=title)
    print(f"\n{picture}")


def plain_model(name: str, run: object) -> nn.Module:
    """Return the plain network of a model, declared as the configuration of a run says where it does.

    Raises:
        UserError: no such model, or a configuration with other values than its keys have.
    """
    values = {key: value for key in (INITIAL_SCALES, PRIOR) if (value := config.lookup(run, key)) is not None}
    cfg = config.build(values).cfg.MODEL
    if not zoo.is_name(name):
        initial, default = cfg.INITIAL_SCALES, KEYS[INITIAL_SCALES].default
        with torch.device("meta"):
            arguments = {} if initial == default else {"initial_scales": initial}
            model = repopt.create_model(name, mode="target", **arguments)
        return model.to_empty(device="cpu")  # the kernels' places are asked for, not their values
    arch = parse_arch(f"{name}-target")
    model = repopt.create_model(name, mode=arch.mode)
    if arch.takes_prior:
        repopt.declare(model, cfg.PRIOR)
    return model


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


def scale_rows(
    model: nn.Module, scales: Mapping[str, Tensor], start: Mapping[str, Tensor]
) -> Iterator[tuple[str, ...]]:
    """Yield the scales of every branch of every block in numbers, then those of all."""
    for block, module in repopt.declared_blocks(model):
        for branch in module.block.branches:
            name = branch.searched_name
            key = key_of(block, name)
            values, own = scales[key], {key: start[key]} if key in start else {}
            yield block, name, *columns(values), f"{branch.initial:.4f}" if own else NONE, *way_columns(own, scales)
    every = torch.cat(list(scales.values()))
    count, _, _, *rest = columns(every)
    yield "all", "", count, "", "", *rest, "", *way_columns(start, scales)


def columns(values: Tensor) -> Iterator[str]:
    """Yield the number of scales, their mean, standard deviation, minimum and maximum, and how many are negative."""
    yield str(len(values))
    yield from (f"{number:.4f}" for number in (values.mean(), values.std(correction=0), values.min(), values.max()))
    yield str(int((values < 0).sum()))


def way_columns(start: Mapping[str, Tensor], now: Mapping[str, Tensor]) -> tuple[str, str]:
    """Return how far the scales that `start` names moved from there, together and at most, as a part of it."""
    if not start:  # an identity is a kernel, which was drawn
        return NONE, NONE
    furthest = max(float(((now[name] - start[name]) / start[name]).abs().max()) for name in start)
    return f"{movement(start, {}, now).way:.2%}", f"{furthest:.2%}"


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
