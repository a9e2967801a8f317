"""Makes one HTML page of results: tables beside the paper's, curves, scales, kernels, and how they came about.

    python scripts/report.py RUN_OR_TABLE [RUN_OR_TABLE ...] [--out FILE]

RUN_OR_TABLE is the folder of a run or of a quantization (<output>/<arch>/<tag>), or the JSON of a reproduced table or
figure, whose runs are looked for from the working directory. The page needs no other file, no network and no scripts.
"""

from __future__ import annotations

import argparse
import base64
import itertools
import json
import re
import statistics
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import _root  # noqa: F401
import analyse_kernels
import jinja2
import plots
import svg
from inspect_scales import of_backbone, search_model
from markupsafe import Markup
from runs import METRICS, Log, Run, number, read_json, steps_of
from torch import Tensor

import repopt
from repopt.errors import UserError, run_command, shown
from repopt.models import parse_arch, zoo
from train import config, files, trained
from train.files import CONFIG, PREDICTIONS, Column

RESULTS, SIGNAL_TO_NOISE = (f"{files.ARTIFACTS}/{name}" for name in (files.RESULTS, files.SIGNAL_TO_NOISE))
IMAGES = Column("images", "images", 0, "")
NONE = "–"
NARROW, WIDE = (4.5, 3.3), (8.4, 4.4)
"""Inches of pictures: the narrow ones stand side by side where there is room, and are as wide as a phone."""
MOST_POINTS = 400  # of a curve by step; more are not seen
UNPRINTABLE = re.compile("[\0-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff\ufffe\uffff]")

NUMBER = (float, int, type(None))  # or that there is none
CELL = {
    "quantity": str,
    "paper": (str, *NUMBER),
    "mean": (str, *NUMBER),
    "std": NUMBER,
    "values": [(str, *NUMBER)],
    "difference": NUMBER,
}
TABLE = {
    "name": str,
    "title": str,
    "scale": str,
    "notes": [str],
    "labels": [str],
    "rows": [{"labels": [(str, type(None))], "cells": [CELL]}],
    "orderings": [str],
    "pictures": [{"title": str, "file": str}],
    "runs": {str: [str]},
    "commands": [str],
    "environment": {str: (str, *NUMBER)},
}
"""The JSON of a reproduced table or figure."""


class Head(NamedTuple):
    """What stands above some columns of a table."""

    text: str
    columns: int = 1
    rows: int = 1


class Cell(NamedTuple):
    """What a table says in large and in small type."""

    text: str
    detail: str = ""


class Table(NamedTuple):
    """Rows of text: first the columns that name them, then numbers, or words where `prose`."""

    title: str
    heads: Sequence[Sequence[Head]]
    rows: Sequence[Sequence[str | Cell]]
    names: int = 1
    prose: bool = False
    folded: bool = False
    kind = "table"


class Chart(NamedTuple):
    """A picture in the colours of the page."""

    title: str
    svg: ElementTree.Element
    description: str
    narrow: bool = False
    kind = "chart"


class Picture(NamedTuple):
    """A picture in its own colours, as a data URI."""

    title: str
    source: str
    kind = "picture"


class Lines(NamedTuple):
    """Sentences."""

    title: str
    lines: Sequence[str]
    kind = "lines"


class Code(NamedTuple):
    """Lines that are typed."""

    lines: Sequence[str]
    kind = "code"


class Facts(NamedTuple):
    """Short values by name."""

    facts: Mapping[str, str]
    kind = "facts"


Block = Table | Chart | Picture | Lines | Code | Facts


class Part(NamedTuple):
    """Blocks under a heading."""

    title: str
    blocks: Sequence[Block]


class Section(NamedTuple):
    """What one argument of the command line shows."""

    title: str
    source: str
    parts: Sequence[Part]


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; 0, or 2 after a mistake of the user, which is one line on stderr."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", metavar="RUN_OR_TABLE", nargs="+", type=Path)
    parser.add_argument(
        "--out", metavar="FILE", type=Path, default=Path("output/report.html"), help="default: %(default)s"
    )
    arguments = parser.parse_args(argv)
    return run_command("report.py", lambda: report(arguments.sources, arguments.out))


def report(sources: Iterable[Path], out: Path) -> None:
    """Write the page, and print where it is.

    Raises:
        UserError: a source that is neither a run nor a table, or damaged.
    """
    try:
        page = rendered([section_of(source) for source in sources]).encode()
    except RecursionError:
        raise UserError("a file is nested too deeply") from None
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_bytes(page)
    print(f"{out} ({len(page) / 1e6:.2f} MB)")


def rendered(sections: Sequence[Section]) -> str:
    """The page of some sections."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    numbers = itertools.count()
    environment.filters["inline"] = lambda chart: Markup(
        svg.inline_svg(chart.svg, f"p{next(numbers)}-", chart.description)
    )
    return printable(environment.get_template("report.html.jinja").render(sections=sections).lstrip())


def section_of(source: Path) -> Section:
    """What a path of the command line shows.

    Raises:
        UserError: it is neither a run nor a table, or damaged.
    """
    if source.is_file():
        return section_of_table(source)
    if not source.is_dir():
        raise UserError(f"there is no file or folder {str(source)!r}")
    if not any((source / name).is_file() for name in (METRICS, CONFIG, RESULTS)):
        raise UserError(f"{str(source)!r} is no folder of a run: it has neither {METRICS} nor {CONFIG} nor {RESULTS}")
    return section_of_run(source)


def section_of_run(folder: Path) -> Section:
    """All that the folder of a run or a quantization has."""
    run, log = Run.read(folder), Log.read(folder)
    name = run.arch or folder.resolve().parent.name
    facts = run.summary() | log.facts
    content: dict[str, Iterable[Block]] = {
        "Results": [*([Facts(facts)] if facts else ()), *quantization({name: run})],
        "Training": training(run, name),
        "Predictions": predictions({name: run}),
        "Searched scales": searched_scales({name: run}),
        "Kernels": kernels({name: run}),
        "Command lines and environment": [
            *([Code(log.commands)] if log.commands else ()),
            *([Lines("", log.environments)] if log.environments else ()),
        ],
        "Configuration": configuration({"this run": run.settings}),
    }
    return Section(f"{name}, {folder.resolve().name}", str(folder), parts_of(content))


def section_of_table(file: Path) -> Section:
    """A reproduced table or figure, and the runs that its numbers come from."""
    table = read_json(file, TABLE)
    runs = {name: [Run.read(Path(folder)) for folder in folders] for name, folders in table["runs"].items()}
    first = {name: group[0] for name, group in runs.items() if group}
    environment = [(name, str(value)) for name, value in table["environment"].items()]
    content: dict[str, Iterable[Block]] = {
        "Beside the paper": [
            *([paper_table(table, file)] if table["rows"] else ()),
            *([Lines("", table["notes"])] if table["notes"] else ()),
            *([Lines("Orderings", table["orderings"])] if table["orderings"] else ()),
        ],
        "Pictures": [picture(entry["title"], file.parent / entry["file"]) for entry in table["pictures"]],
        "Runs": scores(runs),
        "Predictions": predictions(first),
        "Searched scales": searched_scales(first),
        "Kernels": kernels(first),
        "Quantization": quantization(first),
        "Command lines and environment": [
            *([Code(table["commands"])] if table["commands"] else ()),
            *([words("", ("what", "with"), environment)] if environment else ()),
        ],
        "Configuration": configuration({name: run.settings for name, run in first.items()}),
    }
    return Section(f"{table['name']}: {table['title']} ({table['scale']})", str(file), parts_of(content))


def parts_of(content: Mapping[str, Iterable[Block]]) -> list[Part]:
    """Those that have something to show, by their titles."""
    blocks = {title: [*found] for title, found in content.items()}
    return [Part(title, found) for title, found in blocks.items() if found]


# --- tables


def paper_table(content: Mapping[str, Any], file: Path) -> Table:
    """The numbers of a reproduced table beside the paper's.

    Raises:
        UserError: a row that has other columns than the others.
    """
    rows, labels = content["rows"], content["labels"]
    quantities = [cell["quantity"] for cell in rows[0]["cells"]]
    for index, row in enumerate(rows):
        if len(row["labels"]) != len(labels) or [cell["quantity"] for cell in row["cells"]] != quantities:
            raise UserError(f"rows[{index}] of {str(file)!r} has other labels or quantities than the table")
    columns = zip(*(row["cells"] for row in rows), strict=True)
    decimals = [max(map(decimals_of, column)) for column in columns]
    heads = [
        [*(Head(label, rows=2) for label in labels), *(Head(quantity, columns=3) for quantity in quantities)],
        [Head(text) for _ in quantities for text in ("paper", "this run", "difference")],
    ]
    lines = []
    for row in rows:
        cells = (c for cell, digits in zip(row["cells"], decimals, strict=True) for c in cells_of(cell, digits))
        lines.append((*(label or NONE for label in row["labels"]), *cells))
    return Table("", heads, lines, names=len(labels))


def cells_of(cell: Mapping[str, Any], decimals: int) -> tuple[str | Cell, ...]:
    """The paper's number, this run's with those of its seeds, and the difference."""
    seeds = [figure(value, decimals) for value in cell["values"]]
    this = figure(cell["mean"], decimals)
    if cell["std"] is not None:
        this = f"{this} ± {figure(cell['std'], decimals)}"
    difference = figure(cell["difference"], decimals)
    return (
        NONE if cell["paper"] is None else str(cell["paper"]),
        Cell(this, " · ".join(seeds) if len(seeds) > 1 else ""),
        f"+{difference}" if (number(cell["difference"]) or 0) > 0 else difference,
    )


def decimals_of(cell: Mapping[str, Any]) -> int:
    """As the table says, or as the paper's number has them, such as 78.47±0.03; else 2."""
    told = cell.get("decimals")
    match = re.match(r"\s*[-+−]?\d+(?:\.(\d{1,8}))?", str(cell["paper"]))
    return told if type(told) is int and 0 <= told <= 8 else len(match[1] or "") if match else 2


def figure(value: object, decimals: int) -> str:
    """A number with so many decimals, and with two digits in any case; text as it is."""
    if isinstance(value, str):
        return value
    if (found := number(value)) is None:
        return NONE
    small = 0 < abs(found) < 10 ** (1 - decimals)
    return (f"{found:.2g}" if small else f"{found:.{decimals}f}").replace("-", "−")


def words(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]], *, folded: bool = False) -> Table:
    """A table whose cells are text."""
    return Table(title, [[*map(Head, heads)]], rows, prose=True, folded=folded)


def configuration(settings: Mapping[str, Mapping[str, Any]]) -> Iterator[Block]:
    """Configurations by name: first the keys that are not as they are by default, then the rest."""
    settings = {name: found for name, found in settings.items() if found}
    if not settings:
        return
    columns = [flat(found) for found in settings.values()]
    changed, rest = [], []
    for key in dict.fromkeys([*config.KEYS, *(key for column in columns for key in column)]):
        declared = config.KEYS.get(key)  # a run of another time may have other keys
        default, meaning = (written(declared.default), declared.meaning) if declared else (NONE, "")
        values = [written(column[key]) if key in column else NONE for column in columns]
        if set(values) <= {default, NONE}:
            rest.append((key, default, meaning))
        else:
            changed.append((key, default, *values, meaning))
    yield words("Keys that have other values than by default", ("key", "default", *settings, "meaning"), changed)
    yield words(f"{len(rest)} keys that have their defaults", ("key", "default", "meaning"), rest, folded=True)


def flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings by dotted key."""
    found = {}
    for name, value in settings.items():
        inner = {f"{name}.{key}": v for key, v in flat(value).items()} if isinstance(value, Mapping) else {name: value}
        found.update(inner)
    return found


def written(setting: object) -> str:
    """A setting as it is typed; tuples and lists are the same in JSON."""
    return setting if isinstance(setting, str) and setting else json.dumps(setting)


# --- runs


def scores(runs: Mapping[str, Sequence[Run]]) -> Iterator[Block]:
    """Of some runs by name: their scores by epoch, and each of them in numbers."""
    by_measure: dict[str, dict[str, Sequence[Run]]] = {}
    for name, group in runs.items():
        if group:
            by_measure.setdefault(group[0].measure.title, {})[name] = group
    for measure, alike in by_measure.items():
        evaluated = {name: [run.scores for run in group if run.scores] for name, group in alike.items()}
        curves = {name: group for name, group in evaluated.items() if group and set.intersection(*map(set, group))}
        if curves:
            finals = [f"{name} {statistics.fmean(c[max(c)] for c in group):.1f} %" for name, group in curves.items()]
            yield chart(
                f"{measure} by epoch: the mean over the seeds, and the band between the worst and the best",
                f"{measure} by epoch; at the end: {', '.join(finals)}.",
                plots.plot_scores,
                {plain(name): group for name, group in curves.items()},
                measure=measure,
                size=WIDE,
            )
        rows = [(name, str(run.folder), run.summary()) for name, group in alike.items() for run in group]
        recorded = [row for row in rows if row[-1]]
        if recorded:
            heads = [*map(Head, ("run", "folder", *recorded[0][-1]))]
            lines = [(name, folder, *summary.values()) for name, folder, summary in recorded]
            yield Table(f"Every run by itself ({len(recorded)})", [heads], lines, names=2, folded=True)
        if absent := [folder for _, folder, summary in rows if not summary and not Path(folder, RESULTS).is_file()]:
            yield Lines("Nothing is recorded of", absent)


def predictions(runs: Mapping[str, Run]) -> Iterator[Block]:
    """What the networks of the runs make of some images."""
    for name, run in runs.items():
        if (file := run.folder / PREDICTIONS).is_file():
            yield picture(f"{name}: some test images", file)


def training(run: Run, name: str) -> Iterator[Block]:
    """The score by epoch; the loss and the learning rate by step."""
    if found := run.scores:
        first, last, measure = min(found), max(found), run.measure.title
        yield chart(
            f"{measure} by epoch",
            f"{measure} by epoch: {found[first]:.1f} % in epoch {first}, {found[last]:.1f} % in {last}.",
            plots.plot_scores,
            {plain(name): [found]},
            measure=measure,
            size=NARROW,
        )
    steps = {record["step"]: record["train"] for record in steps_of(run.folder)}
    quantities = {
        title: thinned({step: number(config.lookup(record, key)) for step, record in steps.items()})
        for title, key in (("training loss", "loss"), ("learning rate", "learning_rate"))
    }
    if steps:
        last = {title: [*curve.values()][-1] for title, curve in quantities.items()}
        ends = (f"{title} {NONE if value is None else f'{value:.3g}'}" for title, value in last.items())
        yield chart(
            "Training loss and learning rate by step",
            f"Curves by step; at the end: {', '.join(ends)}.",
            plots.plot_lines,
            {title: {"": curve} for title, curve in quantities.items()},
            x="step",
            size=NARROW,
        )


def thinned(curve: Mapping[int, float | None]) -> dict[int, float | None]:
    """At most MOST_POINTS of a curve, each the mean of its neighbours."""
    steps, width = [*curve], -(-len(curve) // MOST_POINTS)
    points = {}
    for start in range(0, len(steps), width or 1):
        near = steps[start : start + width]
        values = [value for step in near if (value := curve[step]) is not None]
        points[near[-1]] = statistics.fmean(values) if values else None
    return points


def searched_scales(runs: Mapping[str, Run]) -> Iterator[Block]:
    """What every search among the runs found, by depth and by epoch."""
    for name, run in runs.items():
        file = run.folder / "scales.pth"
        if file.is_file() and run.arch:
            try:
                yield scales_by_depth(file, name, run.arch)
            except UserError as error:
                yield Lines("Not shown", [str(error)])
        if curves := scales_by_epoch(run):
            yield chart(
                f"{name}: how far the mean scale of every block moved since the first epoch (the deeper, the stronger)",
                "Change of the mean scale by epoch, a panel per branch and a line per block.",
                plots.plot_scales_by_epoch,
                curves,
                size=(WIDE[0], 3),
            )


def scales_by_depth(file: Path, name: str, arch: str) -> Chart:
    """Mean and spread of the scales of every block; UserError where they are not those of the model."""
    scales, model = of_backbone(repopt.load_scales(file)), search_model(parse_arch(arch).model)
    lowest, highest = min(float(v.min()) for v in scales.values()), max(float(v.max()) for v in scales.values())
    return chart(
        f"{name}: searched scales by depth, mean and standard deviation over the channels",
        f"Searched scales by depth, a line per branch; all are between {lowest:.3g} and {highest:.3g}.",
        plots.plot_scales,
        model,
        scales,
    )


def scales_by_epoch(run: Run) -> dict[str, dict[str, dict[int, float]]]:
    """Mean scales by branch, block and epoch, as they were recorded."""
    curves: dict[str, dict[str, dict[int, float]]] = {}
    for record in run.epochs:
        means = record.get("scales")
        for key, value in means.items() if isinstance(means, Mapping) else ():
            if (mean := number(value)) is not None:
                block, _, branch = plain(key).removesuffix(".weight").rpartition(".")
                curves.setdefault(branch, {}).setdefault(block, {})[record["epoch"]] = mean
    return curves


def kernels(runs: Mapping[str, Run]) -> Iterator[Block]:
    """Weights of the layer that the paper shows, of the plain networks and baselines whose checkpoints are there."""
    layers: dict[str, dict[str, Mapping[str, Tensor]]] = {}
    unread = []
    for name, run in runs.items():
        try:
            if found := kernels_of(run.folder / "latest.pth"):
                layers.setdefault(found[0], {})[name] = found[1]
        except UserError as error:
            unread.append(str(error))
    for layer, networks in layers.items():
        yield chart(
            f"Weights of {layer}; a panel is as wide as the range of INT8",
            f"Histograms of the weights of {layer} at the centre of its kernels and around it; "
            f"networks: {', '.join(networks)}. The table below has them in numbers.",
            plots.plot_weights,
            {
                textwrap.fill(plain(name), 32): {form: analyse_kernels.split(kernel) for form, kernel in forms.items()}
                for name, forms in networks.items()
            },
        )
        rows = [
            {"network": name, "form": form, **analyse_kernels.statistics(kernel)}
            for name, forms in networks.items()
            for form, kernel in forms.items()
        ]
        lines = [[value or NONE for value in analyse_kernels.written(row).values()] for row in rows]
        yield Table(f"Weights of {layer} in numbers", [[*map(Head, rows[0])]], lines, names=2, folded=len(rows) > 12)
    if unread:
        yield Lines("Not shown", unread)


def kernels_of(file: Path) -> tuple[str, Mapping[str, Tensor]] | None:
    """The layer that the paper shows and its forms; None of a checkpoint that is not there or has none of them.

    Raises:
        UserError: the checkpoint is damaged, or its numbers are not finite.
    """
    if not file.is_file():
        return None
    source = trained.read(file)
    if source.quantized or source.arch.mode in ("hs", "csla", zoo.MODE):
        return None
    model = analyse_kernels.network_of(source)
    forms = analyse_kernels.forms_of(model)
    if not forms:
        return None
    analyse_kernels.check({str(file): forms})
    layer = analyse_kernels.papers_layer(model, list(forms))
    return layer, forms[layer]


def quantization(runs: Mapping[str, Run]) -> Iterator[Block]:
    """What INT8 costs: the accuracy of the networks, the noise in every layer, the sizes of the files."""
    tables: dict[tuple[Column, ...], list[Sequence[str]]] = {}
    sizes: list[Sequence[str]] = []
    noise: dict[tuple[str, ...], dict[str, list[float | None]]] = {}
    for name, run in [(name, run) for name, run in runs.items() if (run.folder / RESULTS).is_file()]:
        folder, columns = run.folder, (*run.columns, IMAGES)
        for network, row in read_json(folder / RESULTS, {str: {str: NUMBER}}).items():
            cells = (figure(row.get(column.name), column.decimals) for column in columns)
            tables.setdefault(columns, []).append((name, network, *cells))
        for path in sorted((folder / RESULTS).parent.iterdir()):
            sizes.append((name, path.name, f"{path.stat().st_size / 1e6:.2f}"))
        if (folder / SIGNAL_TO_NOISE).is_file():
            ratios = read_json(folder / SIGNAL_TO_NOISE, {str: NUMBER})
            noise.setdefault(tuple(ratios), {})[name] = [*map(number, ratios.values())]
    for columns, rows in tables.items():
        heads = ("trained as", "network", *(column.head for column in columns))
        yield Table("fp32 and INT8", [[*map(Head, heads)]], rows, names=2)
    if sizes:
        heads = ("trained as", "file", "MB")
        yield Table("Files", [[*map(Head, heads)]], sizes, names=2, folded=True)
    for layers, networks in noise.items():
        if layers:
            yield chart(
                "Signal to noise by layer, in INT8",
                f"Signal-to-noise ratio of the outputs of {len(layers)} layers in INT8; {worst(layers, networks)}.",
                plots.plot_by_depth,
                {"signal to noise (dB)": {plain(name): {"INT8": values} for name, values in networks.items()}},
                [*map(plain, layers)],
            )
            yield Lines("", [worst(layers, networks)])


def worst(layers: Sequence[str], networks: Mapping[str, Sequence[float | None]]) -> str:
    """The layer with the most noise of every network."""
    found = {
        name: min((value, layer) for layer, value in zip(layers, values, strict=True) if value is not None)
        for name, values in networks.items()
        if any(value is not None for value in values)
    }
    return "the most noise: " + "; ".join(f"{name}: {layer} ({v:.1f} dB)" for name, (v, layer) in found.items())


# --- pieces


def chart(title: str, description: str, plot: Callable[..., None], *data: Any, **options: Any) -> Chart:
    """What a function of plots.py draws of some data."""
    drawn = svg.svg_of(lambda path: plot(*data, path, **options))
    return Chart(title, drawn, description, narrow=options.get("size") == NARROW)


def picture(title: str, file: Path) -> Chart | Picture:
    """A picture file: an SVG made for the page becomes a part of it, others stand on white.

    Raises:
        UserError: it is not there, or no SVG and no PNG.
    """
    if not file.is_file():
        raise UserError(f"there is no picture {shown(str(file))}")
    content = file.read_bytes()
    if file.suffix == ".svg":
        drawn = svg.read_svg(file)
        if b"currentColor" in content:
            return Chart(title, drawn, title)
        kind = "svg+xml"
    elif content.startswith(b"\x89PNG\r\n\x1a\n"):
        kind = "png"
    else:
        raise UserError(f"{str(file)!r} is no picture: it is neither an SVG nor a PNG")
    return Picture(title, f"data:image/{kind};base64,{base64.b64encode(content).decode()}")


def plain(name: str) -> str:
    """A name as matplotlib takes it, which reads what stands between dollars as a formula."""
    return printable(name).replace("$", r"\$")


def printable(text: str) -> str:
    """Text without what no page and no picture can hold."""
    return UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", text)


if __name__ == "__main__":
    sys.exit(main())
