"""Speed and memory, as ratios measured side by side in one run.

    python scripts/benchmark.py optimizer [--arch RepOpt-VGG-B1] [--device cuda] [--rounds 30]

`optimizer`: a step of RepSGD and RepAdamW, of torch's SGD and AdamW, and of the naive loop that multiplies every
gradient by a dense tensor, on the parameters of one network. All take turns, in random order, round after round, so
that what else the machine does meets them alike. The table is printed; it is also written to benchmarks/ as JSON.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import random
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import _root
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

import repopt
from repopt.errors import UserError
from repopt.optim import RULES

SETTINGS = {
    "sgd": {"lr": 1e-7, "momentum": 0.9, "nesterov": True, "weight_decay": 4e-5},
    "adamw": {"lr": 1e-7, "weight_decay": 0.05},
}
IMPLEMENTATIONS = ("eager", "compiled")
NAMES = {"sgd": "SGD", "adamw": "AdamW"}


class Contender(NamedTuple):
    """An optimizer in the comparison: what does its step, and the bytes of the multipliers that it keeps."""

    rule: str
    label: str
    optimizer: torch.optim.Optimizer
    step: Callable[[], Any]
    mult_bytes: Callable[[], int]


def optimizer_benchmark(arch: str, device: torch.device, rounds: int) -> list[dict[str, Any]]:
    """Rows of the comparison on a network's parameters, with random gradients and scales."""
    torch.manual_seed(0)
    search = repopt.create_model(arch, mode="hs")
    scales = {name: 0.5 + torch.rand_like(scale) for name, scale in repopt.extract_scales(search).items()}
    del search
    model = repopt.create_model(arch, mode="target")
    model.to(device, memory_format=torch.channels_last if device.type == "cuda" else torch.contiguous_format)
    for param in model.parameters():
        param.grad = torch.randn_like(param)
    size = sum(param.nbytes for param in model.parameters())
    rows, contenders = [], []
    for rule in SETTINGS:
        contenders += _contenders(rule, model, scales)
    for contender in tqdm(contenders, desc="warm-up", unit="optimizer", disable=None):
        for _ in range(3):
            contender.step()
    times: list[list[float]] = [[] for _ in contenders]
    order = random.Random(0)
    for _ in tqdm(range(rounds), desc="measuring", unit="round", disable=None):
        for place in order.sample(range(len(contenders)), len(contenders)):  # what ran before has its effect, too
            times[place].append(_timed(contenders[place].step, device))
    fused = {
        c.rule: statistics.median(own)
        for c, own in zip(contenders, times, strict=True)
        if c.label == f"torch {NAMES[c.rule]}, fused"
    }
    for contender, own in zip(contenders, times, strict=True):
        state = sum(v.nbytes for s in contender.optimizer.state.values() for v in s.values() if isinstance(v, Tensor))
        rows.append(
            {
                "optimizer": contender.label,
                "ms": 1e3 * statistics.median(own),
                "time / fused": statistics.median(own) / fused[contender.rule],
                "state / parameters": state / size,
                "multipliers / parameters": contender.mult_bytes() / size,
                "peak extra / parameters": _peak_extra(contender.step, device) / size,
            }
        )
    return rows


def _contenders(rule: str, model: torch.nn.Module, scales: dict[str, Tensor]) -> list[Contender]:
    settings, name, pair = SETTINGS[rule], NAMES[rule], RULES[rule]
    torchs = getattr(torch.optim, name)
    mults = repopt.grad_mults(model, scales, degree=pair.rep.degree)
    dense = {key: mult.dense() for key, mult in mults.items()}
    found = []
    for how, flags in {"loop": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}.items():
        plain = torchs(model.parameters(), **settings, **flags)
        found.append(Contender(rule, f"torch {name}, {how}", plain, plain.step, int))
    naive = torchs(model.parameters(), **settings, foreach=False)
    kept = sum(tensor.nbytes for tensor in dense.values())
    found.append(
        Contender(rule, f"naive Rep{name}, dense multiplier", naive, _naive(model, naive, dense), lambda: kept)
    )
    for how in IMPLEMENTATIONS:
        rep = repopt.build_optimizer(rule, model, scales, implementation=how, **settings)
        found.append(Contender(rule, f"Rep{name}, {how}", rep, rep.step, rep.multiplier_bytes))
    return found


def _naive(model: torch.nn.Module, optimizer: torch.optim.Optimizer, dense: dict[str, Tensor]) -> Callable[[], None]:
    """A step of the plain optimizer on gradients that are multiplied, one parameter after the other."""
    named = dict(model.named_parameters())

    def step() -> None:
        kept = {name: named[name].grad for name in dense}
        for name, mult in dense.items():
            named[name].grad = kept[name] * mult
        optimizer.step()
        for name, gradient in kept.items():
            named[name].grad = gradient

    return step


def _timed(step: Callable[[], Any], device: torch.device) -> float:
    _synchronize(device)
    start = time.perf_counter()
    step()
    _synchronize(device)
    return time.perf_counter() - start


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _peak_extra(step: Callable[[], Any], device: torch.device) -> int:
    """Bytes that a step holds at its worst, beyond what was there before."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        _synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        step()
    held = peak = 0
    for event in sorted(seen.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def as_table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows of one kind as a Markdown table."""
    header = list(rows[0])
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(_shown(row[name]) for name in header) + " |" for row in rows]
    return "\n".join(lines)


def _shown(value: Any) -> str:
    if isinstance(value, str):
        return value
    return f"{value:.2f}" if value >= 0.1 else f"{value:.2g}" if value else "0"


def environment(device: torch.device) -> dict[str, str]:
    """What a measurement depends on, for its header."""
    if device.type == "cuda":
        machine = torch.cuda.get_device_name(device)
    else:
        info = Path("/proc/cpuinfo")
        models = (
            [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
        )
        name = models[0].split(":", 1)[1].strip() if models else platform.processor() or platform.machine()
        machine = f"{name}, {torch.get_num_threads()} threads"
    return {
        "machine": machine,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "command": f"python scripts/benchmark.py {shlex.join(sys.argv[1:])}",
    }


def main() -> int:
    """Measure, print, and keep the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["optimizer"])
    parser.add_argument("--arch", default="RepOpt-VGG-B1", help="whose parameters are stepped")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=30, help="in which all take turns; medians are reported")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    try:
        rows = optimizer_benchmark(arguments.arch, device, arguments.rounds)
    except UserError as error:
        print(f"benchmark.py: {error}", file=sys.stderr)
        return 2
    header = environment(device)
    folder = _root.ROOT / "benchmarks"
    folder.mkdir(exist_ok=True)
    (folder / f"{arguments.what}-{device.type}.json").write_text(json.dumps({**header, "rows": rows}, indent=1) + "\n")
    print("\n".join(f"{key}: {value}" for key, value in header.items()), end="\n\n")
    print(as_table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
