"""What INT8 costs the demo's networks: fp32, after post-training quantization, and after quantization-aware training.

    python scripts/demo_int8.py [vgg|ghost]

After `bash scripts/demo.sh`, with requirements-deploy.txt installed. Quantizes the plain networks under the
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
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import _root
from demo import FAMILIES, SEEDS, DemoRun, Family, spread
from workers import run_side_by_side

from repopt.errors import UserError
from train.command import run_command
from train.files import ARTIFACTS, RESULTS, SIGNAL_TO_NOISE

METHODS = ("ptq", "qat")


@dataclass(frozen=True)
class Quantization:
    """One quantization of a trained network."""

    run: DemoRun
    method: str
    preset: str
    script: ClassVar = "quantize.py"
    needs: ClassVar = ()  # the demo has been run

    @property
    def folder(self) -> Path:
        """The folder of its results."""
        return self.run.family.folder / "int8" / self.run.arch / self._tag / ARTIFACTS

    @property
    def command(self) -> list[str]:
        """The arguments of scripts/quantize.py."""
        arguments = ["--cfg", "configs/digits/quantize.yaml", "--arch", self.run.arch, "--tag", self._tag]
        arguments += ["--resume", str(self.run.folder / "latest.pth"), "--output", str(self.run.family.folder / "int8")]
        return [*arguments, "--method", self.method, "--preset", self.preset, "--opts", "SEED", str(self.run.seed)]

    @property
    def _tag(self) -> str:
        return f"{self.method}-{self.preset}-seed{self.run.seed}"

    def top1(self, network: str) -> float:
        """Return the accuracy in percent of "fp32", "INT8" or "INT8, onnxruntime"."""
        return json.loads((self.folder / RESULTS).read_text())[network]["top1"]

    def signal_to_noise(self) -> dict[str, float]:
        """Return the ratio of every layer's output, in dB; infinite where there is no noise."""
        ratios = json.loads((self.folder / SIGNAL_TO_NOISE).read_text())
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
    cases = itertools.product(networks_of(family).values(), SEEDS, METHODS, PRESETS)
    every = [Quantization(DemoRun(family, mode, seed), method, preset) for mode, seed, method, preset in cases]
    for checkpoint in (quantization.run.folder / "latest.pth" for quantization in every):
        if not checkpoint.is_file():
            raise UserError(f"{checkpoint} is not there yet: run the demo before (bash scripts/demo.sh)")
    todo = [quantization for quantization in every if not quantization.folder.exists()]
    with tqdm(total=len(todo), unit="network", desc="quantizing") as bar:
        run_side_by_side(todo, lambda: bar.update(sum(q.folder.exists() for q in todo) - bar.n))
    report(family, every)
    print(f"{time.perf_counter() - started:.0f} seconds; pictures and files are in {family.folder}/int8/")


def report(family: Family, every: Sequence[Quantization]) -> None:
    """Print the table; write it and the picture."""
    from benchmarks.report import as_table
    from plots import plot_by_depth

    rows, layers = [], list[str]()
    panels: dict[str, dict[str, dict[str, list[float]]]] = {}
    for preset in dict.fromkeys(quantization.preset for quantization in every):
        for network, mode in networks_of(family).items():
            of_network = [q for q in every if (q.run.mode, q.preset) == (mode, preset)]
            ptq, qat = ([q for q in of_network if q.method == method] for method in METHODS)
            layers = [*ptq[0].signal_to_noise()]
            ratios = [[*q.signal_to_noise().values()] for q in ptq]
            means = [statistics.mean(of_layer) for of_layer in zip(*ratios, strict=True)]
            panels.setdefault(f"{preset} (dB)", {})[network] = {"PTQ": means}
            rows.append(
                {
                    "preset": preset,
                    f"{family.model}, digits": network,
                    "fp32 top-1 (%)": spread([q.top1("fp32") for q in ptq]),
                    "PTQ": spread([q.top1("INT8") for q in ptq]),
                    "PTQ, onnxruntime": spread([q.top1("INT8, onnxruntime") for q in ptq]),
                    "QAT": spread([q.top1("INT8") for q in qat]),
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
