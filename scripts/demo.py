"""The method on real images: search scales on handwritten digits, train a plain network with them, compare.

    bash scripts/demo.sh [vgg|ghost]

300 training and 1,497 test images, RepOpt-VGG-nano with the 28 layers of B1. One hyper-search; then the plain target
under the RepOptimizer, the RepVGG baseline, and the same target under plain SGD, from the same three seeds. Everything
goes to output/demo/; a second start goes on where the first stopped (delete the folder to begin anew). With `ghost` the
same is done with RepOpt-GhostNet-0.5x, in output/demo_ghost/.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import _root
from runs import epochs_of
from workers import Run, run_side_by_side

SEEDS = (0, 1, 2)
EPOCHS = 80  # of configs/digits/train.yaml


class Family(NamedTuple):
    """What is compared: a model, the mode and name of its baseline, and where the runs go."""

    model: str
    baseline: str
    baseline_name: str
    folder: Path


FAMILIES = {
    "vgg": Family("RepOpt-VGG-nano", "repvgg", "RepVGG", Path("output/demo")),
    "ghost": Family("RepOpt-GhostNet-0.5x", "rep", "RepGhostNet", Path("output/demo_ghost")),
}


def demo_run(family: Family, mode: str, seed: int = 0) -> Run:
    """Return the training of the family's model in a mode, as an architecture's name ends, from a seed."""
    recipe = f"configs/digits/{'search' if mode == 'hs' else 'train'}.yaml"
    searches = (demo_run(family, "hs"),) if mode == "target" else ()
    scales = [word for search in searches for word in ("--scales-path", str(search.folder / "scales.pth"))]
    arguments = (*scales, "--opts", "SEED", str(seed))
    return Run("main_repopt.py", recipe, f"{family.model}-{mode}", f"seed{seed}", family.folder, arguments, searches)


def runs_of(family: Family) -> dict[str, list[Run]]:
    """Return what is compared, by name: a run per seed, and one search whose scales all targets use."""
    modes = {
        "plain network, RepOptimizer": "target",
        f"{family.baseline_name}, folded afterwards": family.baseline,
        "plain network, SGD": "target-norepopt",
    }
    compared = {name: [demo_run(family, mode, seed) for seed in SEEDS] for name, mode in modes.items()}
    return compared | {"searched network (hyper-search)": [demo_run(family, "hs")]}


def main() -> None:
    """Run what is not done yet, several at a time, then show it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", nargs="?", default="vgg", choices=FAMILIES)
    family = FAMILIES[parser.parse_args().family]
    from tqdm import tqdm

    os.chdir(_root.ROOT)
    started = time.perf_counter()
    runs = [run for group in runs_of(family).values() for run in group]
    runs.sort(key=lambda run: not run.arch.endswith("-hs"))  # the search first: others wait for it
    with tqdm(total=EPOCHS * len(runs), unit="epoch", desc=f"{len(runs)} runs") as bar:
        run_side_by_side(runs, lambda: bar.update(sum(len(epochs_of(run.folder)) for run in runs) - bar.n))
    report(family)
    print(f"{time.perf_counter() - started:.0f} seconds; pictures and runs are in {family.folder}/")


def report(family: Family) -> None:
    """Print the table; write it and the pictures."""
    from plots import plot_scales, plot_scores

    import repopt
    from repopt.models import parse_arch

    lines = [
        f"| {family.model}, digits, {EPOCHS} epochs | top-1 (%) | training (s) | parameters (M): trained | deployed |",
        "|---|---|---|---|---|",
    ]
    curves = {}
    for name, runs in runs_of(family).items():
        model = repopt.create_model(family.model, mode=parse_arch(runs[0].arch).mode, num_classes=10)
        trained, deployed = (sum(p.numel() for p in m.parameters()) / 1e6 for m in (model, repopt.deploy(model)))
        epochs = [epochs_of(run.folder) for run in runs]
        final = [run[-1]["val"]["top1"] for run in epochs]
        seconds = statistics.mean(sum(epoch["train_seconds"] for epoch in run) for run in epochs)
        lines.append(f"| {name} | {spread(final)} | {seconds:.0f} | {trained:.2f} | {deployed:.2f} |")
        curves[name] = [{epoch["epoch"]: epoch["val"]["top1"] for epoch in run if "val" in epoch} for run in epochs]
    table = "\n".join(lines)
    print(table)
    (family.folder / "results.md").write_text(table + "\n")
    plot_scores(curves, family.folder / "accuracy.png", measure="top-1")
    scales = repopt.load_scales(demo_run(family, "hs").folder / "scales.pth")
    plot_scales(repopt.create_model(family.model, mode="hs"), scales, family.folder / "scales.png")


def spread(values: Sequence[float]) -> str:
    """Return the mean of several seeds' numbers and their standard deviation; of a single one, itself."""
    mean = f"{statistics.mean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.1f}"


if __name__ == "__main__":
    main()
