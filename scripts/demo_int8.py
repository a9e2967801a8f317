"""What INT8 costs the demo's networks: fp32, after post-training quantization, and after quantization-aware training.

    python scripts/demo_int8.py [vgg|ghost]

After `bash scripts/demo.sh`, with the extra deploy installed. Quantizes the plain networks under the
RepOptimizer and the folded baselines of all seeds, under every preset and by both methods, with scripts/quantize.py;
everything goes to output/demo/int8/. A second start goes on where the first stopped.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Iterable, Sequence

import _root
from demo import FAMILIES, SEEDS, Family, demo_run, spread
from workers import Run, run_side_by_side

from repopt.errors import UserError
from train.command import run_command
from train.file_names import ARTIFACTS, RESULTS, SIGNAL_TO_NOISE

METHODS = ("ptq", "qat")


def quantization(family: Family, mode: str, seed: int, method: str, preset: str) -> Run:
    """Return the quantization of a network that the demo has trained."""
    trained, tag = demo_run(family, mode, seed), f"{method}-{preset}-seed{seed}"
    arguments = ("--resume", str(trained.folder / "latest.pth"), "--method", method, "--preset", preset)
    options = ("--opts", "SEED", str(seed))
    folder = family.folder / "int8"
    return Run("quantize.py", "configs/digits/quantize.yaml", trained.arch, tag, folder, (*arguments, *options))


def top1(runs: Sequence[Run], network: str) -> str:
    """Return the accuracy in percent of "fp32", "INT8" or "INT8, onnxruntime" over runs, as it is shown."""
    return spread([json.loads((run.folder / ARTIFACTS / RESULTS).read_text())[network]["top1"] for run in runs])


def signal_to_noise(run: Run) -> dict[str, float]:
    """Return the ratio of every layer's output, in dB; infinite where there is no noise."""
    ratios = json.loads((run.folder / ARTIFACTS / SIGNAL_TO_NOISE).read_text())
    return {layer: float("inf") if ratio is None else ratio for layer, ratio in ratios.items()}


def networks_of(family: Family) -> dict[str, str]:
    """Return the modes of the networks by name."""
    return {"plain network, RepOptimizer": "target", f"{family.baseline_name}, folded": family.baseline}


def main(argv: Sequence[str] | None = None) -> int:
    """Quantize what is not done yet, then show it; 0, or 2 after a mistake of the user."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", nargs="?", default="vgg", choices=FAMILIES)
    family = FAMILIES[parser.parse_args(argv).family]
    os.chdir(_root.ROOT)
    return run_command("demo_int8.py", lambda: run(family))


def run(family: Family) -> None:
    """Quantize and report.

    Raises:
        UserError: the demo has not been run.
    """
    from tqdm import tqdm

    from repopt.quantization import PRESETS

    started = time.perf_counter()
    networks = [*itertools.product(networks_of(family).values(), SEEDS)]
    for checkpoint in (demo_run(family, *network).folder / "latest.pth" for network in networks):
        if not checkpoint.is_file():
            raise UserError(f"{checkpoint} is not there yet: run the demo before (bash scripts/demo.sh)")
    cases = itertools.product(networks, METHODS, PRESETS)
    every = [quantization(family, *network, method, preset) for network, method, preset in cases]
    todo = [run for run in every if not (run.folder / ARTIFACTS).exists()]
    with tqdm(total=len(todo), unit="network", desc="quantizing") as bar:
        run_side_by_side(todo, lambda: bar.update(sum((run.folder / ARTIFACTS).exists() for run in todo) - bar.n))
    report(family, PRESETS)
    print(f"{time.perf_counter() - started:.0f} seconds; pictures and files are in {family.folder}/int8/")


def report(family: Family, presets: Iterable[str]) -> None:
    """Print the table; write it and the picture."""
    from benchmarks.report import as_table
    from plots import plot_by_depth

    rows, layers = [], list[str]()
    panels: dict[str, dict[str, dict[str, list[float]]]] = {}
    for preset in presets:
        for network, mode in networks_of(family).items():
            ptq, qat = ([quantization(family, mode, seed, method, preset) for seed in SEEDS] for method in METHODS)
            layers = [*signal_to_noise(ptq[0])]
            ratios = [[*signal_to_noise(run).values()] for run in ptq]
            means = [statistics.mean(of_layer) for of_layer in zip(*ratios, strict=True)]
            panels.setdefault(f"{preset} (dB)", {})[network] = {"PTQ": means}
            rows.append(
                {
                    "preset": preset,
                    f"{family.model}, digits": network,
                    "fp32 top-1 (%)": top1(ptq, "fp32"),
                    "PTQ": top1(ptq, "INT8"),
                    "PTQ, onnxruntime": top1(ptq, "INT8, onnxruntime"),
                    "QAT": top1(qat, "INT8"),
                    "signal to noise of the logits, PTQ (dB)": spread([r[-1] for r in ratios]),
                    "of the worst layer": spread([min(r) for r in ratios]),
                }
            )
    folder = family.folder / "int8"
    (folder / "results.json").write_text(json.dumps(rows, indent=1) + "\n")
    (folder / "results.md").write_text(as_table(rows) + "\n")
    print(as_table(rows))
    plot_by_depth(panels, layers, folder / "signal_to_noise.png")


if __name__ == "__main__":
    sys.exit(main())
