"""The method on real images: search scales on handwritten digits, train a plain network with them, compare.

    bash scripts/demo.sh

300 training and 1,497 test images, RepOpt-VGG-nano with the 28 layers of B1. One hyper-search; then the plain target
under the RepOptimizer, the RepVGG baseline, and the same target under plain SGD, from the same three seeds. Everything
goes to output/demo/; a second start goes on where the first stopped (delete the folder to begin anew).
"""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import os
import statistics
import time
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import NamedTuple

import _root

MODEL = "RepOpt-VGG-nano"
SEEDS = (0, 1, 2)
EPOCHS = 80  # of configs/digits/train.yaml
FOLDER = Path("output/demo")
SCALES = FOLDER / f"{MODEL}-hs/seed0/scales.pth"


class Run(NamedTuple):
    """One training: a mode of the model and a seed."""

    mode: str
    seed: int

    @property
    def folder(self) -> Path:
        """Where it writes."""
        return FOLDER / f"{MODEL}-{self.mode}" / f"seed{self.seed}"

    @property
    def command(self) -> list[str]:
        """Arguments of main_repopt.py."""
        name = ["--arch", f"{MODEL}-{self.mode}", "--tag", f"seed{self.seed}", "--output", str(FOLDER)]
        recipe = ["--cfg", "configs/digits/search.yaml" if self == SEARCH else "configs/digits/train.yaml"]
        scales = ["--scales-path", str(SEARCH.folder / "scales.pth")] if self.mode == "target" else []
        return [*name, *recipe, *scales, "--opts", "SEED", str(self.seed)]

    def epochs(self) -> list[dict]:
        """What was recorded after every epoch; an epoch trained again after an interruption counts once."""
        path = self.folder / "metrics.jsonl"
        records = map(json.loads, path.read_text().splitlines()) if path.is_file() else ()
        return list({record["epoch"]: record for record in records if "epoch" in record}.values())


SEARCH = Run("hs", 0)
SETUPS = {
    "plain network, RepOptimizer": [Run("target", seed) for seed in SEEDS],
    "RepVGG (branches, folded later)": [Run("repvgg", seed) for seed in SEEDS],
    "plain network, SGD": [Run("target-norepopt", seed) for seed in SEEDS],
}


def main() -> None:
    """Run what is not done yet, then show it."""
    os.chdir(_root.ROOT)
    os.environ["OMP_NUM_THREADS"] = "1"  # one thread per run, as many runs at a time as there are cores
    started = time.perf_counter()
    train_all()
    report()
    print(f"{time.perf_counter() - started:.0f} seconds; pictures and runs are in {FOLDER}/")


def train_all() -> None:
    """Train every run, several at a time; those that need the searched scales wait for them."""
    from tqdm import tqdm

    runs = [run for setup in SETUPS.values() for run in setup]
    context = multiprocessing.get_context("spawn")
    with (
        ProcessPoolExecutor(min(len(runs), os.cpu_count() or 1), mp_context=context) as pool,
        tqdm(total=EPOCHS * (len(runs) + 1), unit="epoch", desc="10 runs") as bar,
    ):
        search = pool.submit(train, SEARCH)
        waiting: set[Future[None]] = {search} | {pool.submit(train, run) for run in runs if run.mode != "target"}
        while waiting:
            done, waiting = wait(waiting, timeout=1, return_when=FIRST_COMPLETED)
            for future in done:
                future.result()  # raises what went wrong in it
            if search in done:
                waiting |= {pool.submit(train, run) for run in runs if run.mode == "target"}
            bar.update(sum(len(run.epochs()) for run in (SEARCH, *runs)) - bar.n)


def train(run: Run) -> None:
    """One run, in a process of its own; its log is in its folder."""
    import main_repopt

    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as errors:
        code = main_repopt.main(run.command)
    if code:
        raise RuntimeError(errors.getvalue().strip())


def report() -> None:
    """Print the table; write it and the pictures."""
    from plots import plot_accuracy, plot_scales

    import repopt

    lines = [
        f"| {MODEL} on digits, {EPOCHS} epochs | top-1 (%) | training (s) | parameters (M): trained | deployed |",
        "|---|---|---|---|---|",
    ]
    curves = {}
    for name, runs in {**SETUPS, "searched network (hyper-search)": [SEARCH]}.items():
        model = repopt.create_model(MODEL, mode=runs[0].mode.removesuffix("-norepopt"), num_classes=10)
        trained, deployed = (sum(p.numel() for p in m.parameters()) / 1e6 for m in (model, repopt.deploy(model)))
        epochs = [run.epochs() for run in runs]
        final = [run[-1]["val"]["top1"] for run in epochs]
        spread = f" ± {statistics.stdev(final):.1f}" if len(final) > 1 else ""
        seconds = statistics.mean(sum(epoch["train_seconds"] for epoch in run) for run in epochs)
        lines.append(
            f"| {name} | {statistics.mean(final):.1f}{spread} | {seconds:.0f} | {trained:.2f} | {deployed:.2f} |"
        )
        curves[name] = [{epoch["epoch"]: epoch["val"]["top1"] for epoch in run if "val" in epoch} for run in epochs]
    table = "\n".join(lines)
    print(table)
    (FOLDER / "results.md").write_text(table + "\n")
    plot_accuracy(curves, FOLDER / "accuracy.png")
    plot_scales(repopt.load_scales(SEARCH.folder / "scales.pth"), FOLDER / "scales.png")


if __name__ == "__main__":
    main()
