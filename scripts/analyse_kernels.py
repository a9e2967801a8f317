"""Shows what INT8 has to hold: how the weights of a network's kernels spread, before and after they are folded.

    python scripts/analyse_kernels.py FILE [FILE ...] [--arch ARCH [ARCH ...]] [--layer NAME] [--out DIR]

FILE is a trained checkpoint, or bare weights (with --arch), of a plain network (-target, -target-norepopt) or of the
baseline (-repvgg, -qarepvgg, -rep); several are compared. Every kernel is measured in the forms that it takes on its
way to inference:

    plain       raw; batch norm folded
    baseline    before BN fusion (the branch of the kernel's own size); after BN fusion; after branch addition;
                of -qarepvgg also: batch norm of the sum folded

    std, central, surrounding   standard deviation of all weights, of those at the kernel's centre, and of the others
                                (table 11 of the paper)
    kurtosis                    excess: 0 of a normal distribution, more where a few weights are far from the others
    max/std                     of the largest absolute weight
    centre/surround             central std by surrounding std
    SNR, SNR by channel         signal-to-noise ratio (dB) of the kernel in symmetric INT8, with one scale for all of it
                                or one for each output channel; inf where nothing is lost

"–" is what a constant kernel has no number for. Tables go to the terminal and to DIR/kernels.md, every number to
DIR/kernels.json, pictures to DIR/histograms.png (one layer) and DIR/depth.png (all layers).
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import _root  # noqa: F401
import torch
from benchmarks.report import as_table
from plots import plot_by_depth, plot_weights
from torch import Tensor, nn

import repopt
from repopt.errors import UserError, unknown
from repopt.layers import Baseline, RepConv2d, fuse_branches
from repopt.models import zoo
from repopt.models.network import Network
from train import trained
from train.command import run_command

Kernels = Mapping[str, Mapping[str, Tensor]]
"""The kernels of a network, (O, I, kh, kw) each, by the path of their block and their form."""

BY_DEPTH = {
    "SNR (dB)": "SNR (dB)",
    "SNR by channel (dB)": "SNR by channel (dB)",
    "central": "std, central",
    "surrounding": "std, surrounding",
}
"""What is drawn of all layers: columns of the table, and what their panels are called."""
PAPERS_STAGE, PAPERS_LAYER = 16, 7  # tables and figures show the 8th layer of the stage of 16


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; 0, or 2 after a mistake of the user, which is one line on stderr."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", metavar="FILE", nargs="+")
    parser.add_argument("--arch", nargs="+", help="of each FILE, such as RepOpt-VGG-B1-target; if they do not say")
    parser.add_argument("--layer", metavar="NAME", help="shown by itself (default: the paper's, or the middle one)")
    parser.add_argument("--out", metavar="DIR", type=Path, help="default: output/kernels/<arch>")
    given = parser.parse_args(argv)
    return run_command("analyse_kernels.py", lambda: analyse(given.files, given.arch, given.layer, given.out))


def analyse(files: Sequence[str], archs: Sequence[str] | None, layer: str | None, out: Path | None) -> None:
    """Print the tables of some networks, and write them with their numbers and pictures.

    Raises:
        UserError: a file that is no checkpoint of a plain network or a baseline, or holds numbers that are not finite;
            networks of different layers; an unknown layer.
    """
    if archs is not None and len(archs) != len(files):
        raise UserError(f"--arch names the network of each FILE: {len(files)} of them, not {len(archs)}")
    sources = [trained.read(file, arch) for file, arch in itertools.zip_longest(files, archs or [])]
    names = [source.name for source in sources]
    out = out or Path("output", "kernels", "+".join(dict.fromkeys(names)))
    if len(set(names)) < len(names):
        names = [source.path for source in sources]
    if len(set(names)) < len(names):
        raise UserError("a FILE is given twice")
    models = {name: network_of(source) for name, source in zip(names, sources, strict=True)}
    networks = {name: forms_of(model) for name, model in models.items()}
    check(networks)
    layers = list(networks[names[0]])
    if layer is None:
        layer = papers_layer(models[names[0]], layers)
    elif layer not in layers:
        raise unknown("layer", layer, layers)
    rows: list[dict[str, Any]] = [
        {"network": name, "layer": path, "form": form, **statistics(kernel)}
        for path in layers
        for name, blocks in networks.items()
        for form, kernel in blocks[path].items()
    ]
    chosen = [{key: value for key, value in row.items() if key != "layer"} for row in rows if row["layer"] == layer]
    tables = {f"Layer {layer}": chosen, "All layers": rows}
    text = "\n\n".join(f"## {title}\n\n{as_table([*map(written, rows)])}" for title, rows in tables.items())
    content = {"files": dict(zip(names, files, strict=True)), "layer": layer, "rows": [*map(as_json, rows)]}
    out.mkdir(parents=True, exist_ok=True)
    (out / "kernels.md").write_text(f"{text}\n")
    (out / "kernels.json").write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    weights = {name: {form: split(k) for form, k in blocks[layer].items()} for name, blocks in networks.items()}
    plot_weights(weights, out / "histograms.png", title=f"Weights of {layer}; a panel is as wide as the range of INT8")
    panels: dict[str, dict[str, dict[str, list[float | None]]]] = {}
    for row, (column, title) in itertools.product(rows, BY_DEPTH.items()):
        forms = panels.setdefault(title, {}).setdefault(row["network"], {})
        forms.setdefault(row["form"], []).append(row[column])
    plot_by_depth(panels, layers, out / "depth.png", log={BY_DEPTH["central"], BY_DEPTH["surrounding"]})
    print(text, "", *(out / name for name in ("kernels.md", "kernels.json", "histograms.png", "depth.png")), sep="\n")


def network_of(source: trained.LoadedCheckpoint) -> nn.Module:
    """Return the trained network, in eval mode; UserError where it has not the kernels that this is about."""
    if source.arch.mode == zoo.MODE:
        raise UserError(f"{source.path!r} is of {source.name}, which has no declared blocks: give one of our networks")
    if source.arch.mode in ("hs", "csla"):
        raise UserError(
            f"{source.path!r} is in {source.arch.mode} mode, whose network is never quantized: "
            "give a plain network (-target) or the baseline"
        )
    return source.network()


def forms_of(model: nn.Module) -> Kernels:
    """Return the kernels of every block of a plain network or a baseline, in the order of their way to inference."""
    deployed = repopt.deploy(model)
    found = {}
    for path, module in model.named_modules():
        if isinstance(module, Baseline):
            kernels, scales, _ = fuse_branches(module.block, module.branches())
            shape = module.block.target.shape
            branch = next(branch for branch in module.block.branches if kernels[branch.kernel].shape == shape)
            assert branch.scale is not None  # it has a batch norm
            kernel, scale = kernels[branch.kernel], scales[branch.scale]
            forms = {"before BN fusion": kernel, "after BN fusion": kernel * scale.view(-1, 1, 1, 1)}
            last = "after branch addition"
            if module.sum_norm() is not None:
                forms[last] = module.block.merge(kernels, scales)
                last = "batch norm of the sum folded"
        elif isinstance(module, RepConv2d):
            forms, last = {"raw": module.kernel()}, "batch norm folded"
        else:
            continue
        convs = [m for m in deployed.get_submodule(path).modules() if isinstance(m, nn.Conv2d)]
        (forms[last],) = (conv.weight for conv in convs if conv.weight.shape == module.block.target.shape)
        found[path] = {form: kernel.detach() for form, kernel in forms.items()}
    return found


def check(networks: Mapping[str, Kernels]) -> None:
    """Raise UserError where networks have different layers, or a kernel holds an infinity or what is no number."""
    first, *_ = networks
    for name, blocks in networks.items():
        if blocks.keys() != networks[first].keys():
            raise UserError(f"{first} and {name} cannot be compared: they have different layers")
        for path, forms in blocks.items():
            for form, kernel in forms.items():
                if not kernel.isfinite().all():
                    raise UserError(f"{name}: the kernel of {path} ({form}) holds numbers that are not finite")


def papers_layer(model: nn.Module, layers: Sequence[str]) -> str:
    """Return the layer that the paper shows, the 8th of the stage of 16; in a model without one, the middle layer.

    The model is one of ours, or has one as its backbone.
    """
    networks = [(name, module) for name, module in model.named_modules() if isinstance(module, Network)]
    for stage in (f"{name}.{stage}".lstrip(".") for name, network in networks for stage in network.stage_names):
        within = [path for path in layers if path.startswith(f"{stage}.")]
        if len(within) == PAPERS_STAGE:
            return within[PAPERS_LAYER]
    return layers[len(layers) // 2]


def split(kernel: Tensor) -> dict[str, Tensor]:
    """Return the weights at the centre of a kernel (O, I, kh, kw), and those around it, flat."""
    height, width = kernel.shape[2:]
    centre = torch.zeros(height, width, dtype=torch.bool)
    centre[height // 2, width // 2] = True
    return {"central": kernel[..., centre].flatten(), "surrounding": kernel[..., ~centre].flatten()}


def statistics(kernel: Tensor) -> dict[str, float | None]:
    """Return the numbers of a kernel (O, I, kh, kw), in float64; None where equal weights have none."""
    kernel = kernel.double()
    std = deviation(kernel)
    parts = {name: deviation(part) for name, part in split(kernel).items()}
    highest = kernel.abs().amax((1, 2, 3), keepdim=True)
    return {
        "std": std,
        **parts,
        "kurtosis": float((kernel - kernel.mean()).pow(4).mean()) / std**4 - 3 if std else None,
        "max/std": float(highest.max()) / std if std else None,
        "centre/surround": parts["central"] / parts["surrounding"] if parts["surrounding"] else None,
        "SNR (dB)": signal_to_noise(kernel, int8(kernel, highest.max())),
        "SNR by channel (dB)": signal_to_noise(kernel, int8(kernel, highest)),
    }


def deviation(values: Tensor) -> float:
    """Return the standard deviation; 0 where all values are equal, whatever their mean is rounded to."""
    return float(values.std(correction=0)) if values.min() < values.max() else 0.0


def int8(values: Tensor, highest: Tensor) -> Tensor:
    """Return the nearest values of symmetric INT8, -127 to 127 times a scale; `highest` (broadcast) is at 127."""
    scale = highest / 127
    return torch.where(scale > 0, (values / scale).round() * scale, 0)


def signal_to_noise(values: Tensor, rounded: Tensor) -> float:
    """Return the power of values by that of their rounding's error, in dB; infinite where there is none."""
    noise = float((values - rounded).square().sum())
    return 10 * math.log10(float(values.square().sum()) / noise) if noise else math.inf


def written(row: Mapping[str, Any]) -> dict[str, str | None]:
    """Return a row with its numbers to three digits."""

    def digits(value: float) -> str:
        return f"{value:.0f}" if 999.5 <= abs(value) < math.inf else f"{value:#.3g}".rstrip(".")

    return {name: digits(value) if isinstance(value, float) else value for name, value in row.items()}


def as_json(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row without infinities, which JSON does not have: they are the string "inf"."""
    return {name: str(value) if value == math.inf else value for name, value in row.items()}


if __name__ == "__main__":
    sys.exit(main())
