"""Makes a page of results: tables beside the paper's, curves, scales, kernels, and how they came about.

    python scripts/report.py RUN_OR_TABLE [RUN_OR_TABLE ...] [--out FILE]

RUN_OR_TABLE is the folder of a run or of a quantization (<output>/<arch>/<tag>), or the JSON of a reproduced table or
figure, whose runs are looked for from the working directory. The page is Markdown, with its pictures in a folder
beside it; with `--out FILE.html` it is one file for a browser, with the pictures in it.
"""

from __future__ import annotations

import argparse
import base64
import html
import json
import re
import shutil
import statistics
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import _root  # noqa: F401
import analyse_kernels
import plots
from inspect_scales import of_backbone, search_model
from reproduction.result import side_by_side
from runs import METRICS, NONE, RunFolderSummary, number, read_json, steps_of
from torch import Tensor

import repopt
from repopt.errors import UserError, one_line, shown
from repopt.models import parse_arch, zoo
from train import config, file_names, trained
from train.command import run_command
from train.file_names import CONFIG, PREDICTIONS, Column
from train.keys import KEYS
from train.search import SETTLED

RESULTS, SIGNAL_TO_NOISE = (
    f"{file_names.ARTIFACTS}/{name}" for name in (file_names.RESULTS, file_names.SIGNAL_TO_NOISE)
)
IMAGES = Column("images", "images", 0, "")
MAX_POINTS = 400  # of a curve by step; more are not seen
STYLE = """<meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<style>body { max-width: 70rem; margin: auto; padding: 1rem; font-family: sans-serif } img { max-width: 100% }
table { border-collapse: collapse; display: block; overflow-x: auto } th, td { padding: .3rem; border: 1px solid #ccc }
pre { overflow-x: auto; background: #f4f4f4; padding: 1rem }</style>"""

Runs = Mapping[str, RunFolderSummary]
Blocks = Iterator[str]
"""Pieces of Markdown: paragraphs, tables, pictures."""


class Pictures(NamedTuple):
    """Pictures of the page, as PNG files in a folder that is called `name` beside the page."""

    folder: Path
    name: str

    def draw(self, caption: str, plot: Callable[..., object], *data: Any, **options: Any) -> str:
        """Return the Markdown of what a function, such as those of plots.py, draws of some data into a file."""
        path = self.folder / f"{sum(1 for _ in self.folder.iterdir()) + 1}.png"
        plot(*data, path, **options)
        return f"{text(caption)}\n\n![{text(caption)}]({self.name}/{path.name})"

    def copy(self, caption: str, file: Path) -> str:
        """Return the Markdown of a PNG file.

        Raises:
            UserError: it is not there, or no PNG.
        """
        if not file.is_file():
            raise UserError(f"there is no picture {shown(str(file))}")
        if not file.read_bytes().startswith(b"\x89PNG\r\n\x1a\n"):
            raise UserError(f"{str(file)!r} is no picture: it is not a PNG")
        return self.draw(caption, shutil.copyfile, file)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; 0, or 2 after a mistake of the user, which is one line on stderr."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", metavar="RUN_OR_TABLE", nargs="+", type=Path)
    parser.add_argument(
        "--out", metavar="FILE", type=Path, default=Path("output/report.md"), help="default: %(default)s"
    )
    arguments = parser.parse_args(argv)
    return run_command("report.py", lambda: report(arguments.sources, arguments.out))


def report(sources: Iterable[Path], out: Path) -> None:
    """Write the page, and print where it is.

    Raises:
        UserError: a source that is neither a run nor a table, or damaged.
    """
    with tempfile.TemporaryDirectory() as folder:
        pictures = Pictures(Path(folder, "pictures"), f"{out.stem}_pictures".replace(" ", "_"))
        pictures.folder.mkdir()
        page = "\n\n".join(["# RepOpt: results", *(section_of(source, pictures) for source in sources)]) + "\n"
        out.parent.mkdir(parents=True, exist_ok=True)
        if out.suffix == ".html":
            out.write_text(as_html(page, pictures), encoding="utf-8")
        else:
            out.write_text(page, encoding="utf-8")
            shutil.copytree(pictures.folder, out.parent / pictures.name, dirs_exist_ok=True)
    print(out)


def as_html(page: str, pictures: Pictures) -> str:
    """Return the page as HTML with its pictures in it, which needs no other file and no network."""
    import markdown  # tensorboard requires it

    body = markdown.markdown(page.replace("\n\n", "\n\n[TOC]\n\n", 1), extensions=["tables", "md_in_html", "toc"])
    for path in pictures.folder.iterdir():
        data = base64.b64encode(path.read_bytes()).decode()
        body = body.replace(f'src="{pictures.name}/{path.name}"', f'src="data:image/png;base64,{data}"')
    return f'<!DOCTYPE html>\n<html lang="en">\n<head><title>RepOpt: results</title>{STYLE}</head>\n{body}\n</html>\n'


def section_of(source: Path, pictures: Pictures) -> str:
    """Return what a path of the command line shows.

    Raises:
        UserError: it is neither a run nor a table, or damaged.
    """
    if not source.exists():
        raise UserError(f"there is no file or folder {str(source)!r}")
    if source.is_dir() and not any((source / name).is_file() for name in (METRICS, CONFIG, RESULTS)):
        raise UserError(f"{str(source)!r} is no folder of a run: it has neither {METRICS} nor {CONFIG} nor {RESULTS}")
    try:
        title, parts = (run_section if source.is_dir() else table_section)(source, pictures)
        blocks = {heading: [*filter(None, found)] for heading, found in parts.items()}
    except UserError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:  # JSON of another shape
        raise UserError(f"{str(source)!r} is damaged: {type(error).__name__}: {one_line(error)}") from error
    page = [f"## {text(title)}", code([source])]
    for heading, found in blocks.items():
        page += [f"### {heading}", *found] if found else []
    return "\n\n".join(page)


def run_section(folder: Path, pictures: Pictures) -> tuple[str, dict[str, Iterable[str]]]:
    """Return the title of a run or a quantization, and all that its folder has."""
    run = RunFolderSummary.read(folder)
    name = run.arch or folder.resolve().parent.name
    facts = run.summary() | (run.sizes() if run.epochs else {})
    starts = run.run.get("starts", [])
    versions = [{key: value for key, value in start.items() if key not in ("command", "time")} for start in starts]
    return f"{name}, {folder.resolve().name}", {
        "Results": [table(facts, [facts.values()]), *quantization({name: run}, pictures)],
        "Training": training(run, name, pictures),
        "Predictions": predictions({name: run}, pictures),
        "Searched scales": searched_scales({name: run}, pictures),
        "Kernels": kernels({name: run}, pictures),
        "Command lines and environment": [
            code(dict.fromkeys(start["command"] for start in starts)),
            table(versions[0] if versions else (), dict.fromkeys(tuple(version.values()) for version in versions)),
        ],
        "Configuration": configuration({"this run": run.settings}),
    }


def table_section(file: Path, pictures: Pictures) -> tuple[str, dict[str, Iterable[str]]]:
    """Return the title of a reproduced table or figure, and the runs that its numbers come from."""
    content = read_json(file)
    runs = {name: [RunFolderSummary.read(Path(f)) for f in folders] for name, folders in content["runs"].items()}
    first = {name: group[0] for name, group in runs.items() if group}
    return f"{content['name']}: {content['title']} ({content['scale']})", {
        "Beside the paper": [
            paper_table(content),
            items(content["notes"]),
            items(content["orderings"], "Orderings:"),
        ],
        "Pictures": (pictures.copy(entry["title"], file.parent / entry["file"]) for entry in content["pictures"]),
        "Runs": scores(runs, pictures),
        "Predictions": predictions(first, pictures),
        "Searched scales": searched_scales(first, pictures),
        "Kernels": kernels(first, pictures),
        "Quantization": quantization(first, pictures),
        "Command lines and environment": [
            code(content["commands"]),
            table(("what", "with"), content["environment"].items()),
        ],
        "Configuration": configuration({name: run.settings for name, run in first.items()}),
    }


# --- what is shown


def paper_table(content: Mapping[str, Any]) -> str:
    """Return the numbers of a reproduced table beside the paper's, those of several seeds behind their mean."""
    shapes = [(len(row["labels"]), [cell["quantity"] for cell in row["cells"]]) for row in content["rows"]]
    if not shapes:
        return ""
    if any(shape != (len(content["labels"]), shapes[0][1]) for shape in shapes):
        raise UserError("a row of the table has other labels or quantities than the first")
    return table(*side_by_side(content, measured))


def measured(cell: Mapping[str, Any]) -> tuple[str, str]:
    """Return this run's number in a cell of a reproduced table, and its difference from the paper's."""
    decimals = cell.get("decimals", 2)
    seeds = [figure(value, decimals) for value in cell["values"]]
    this = figure(cell["mean"], decimals)
    this += "" if cell["std"] is None else f" ± {figure(cell['std'], decimals)}"
    this += f" ({' · '.join(seeds)})" if len(seeds) > 1 else ""
    return this, figure(cell["difference"], decimals, sign="+")


def configuration(settings: Mapping[str, Mapping[str, Any]]) -> Blocks:
    """Yield configurations by name: first the keys that are not as they are by default, then the rest."""
    columns = {name: dict(config.flatten(found)) for name, found in settings.items() if found}
    if not columns:
        return
    changed, rest = [], []
    for key in dict.fromkeys([*KEYS, *(key for column in columns.values() for key in column)]):
        declared = KEYS.get(key)  # a run of another time may have other keys
        default, meaning = (written(declared.default), declared.help) if declared else (NONE, "")
        values = [written(column[key]) if key in column else NONE for column in columns.values()]
        if set(values) <= {default, NONE}:
            rest.append((key, default, meaning))
        else:
            changed.append((key, default, *values, meaning))
    yield "Keys that have other values than by default:"
    yield table(("key", "default", *columns, "meaning"), changed)
    yield folded(f"{len(rest)} keys that have their defaults", table(("key", "default", "meaning"), rest))


def written(setting: object) -> str:
    """Return a setting as it is typed; tuples and lists are the same in JSON."""
    return setting if isinstance(setting, str) and setting else json.dumps(setting)


def scores(runs: Mapping[str, Sequence[RunFolderSummary]], pictures: Pictures) -> Blocks:
    """Yield the scores of some runs by epoch, and each of them in numbers."""
    by_score: dict[str, dict[str, Sequence[RunFolderSummary]]] = {}
    for name, group in runs.items():
        if group:
            by_score.setdefault(group[0].columns[0].title, {})[name] = group
    for score, groups in by_score.items():
        evaluated = {label(name): [run.scores for run in group if run.scores] for name, group in groups.items()}
        curves = {name: group for name, group in evaluated.items() if group and set.intersection(*map(set, group))}
        if curves:
            caption = f"{score} by epoch: the mean over the seeds, and the band between the worst and the best"
            yield pictures.draw(caption, plots.plot_scores, curves, measure=score)
        summaries = [(name, run.folder, run.summary()) for name, group in groups.items() for run in group]
        if recorded := [(name, folder, *summary.values()) for name, folder, summary in summaries if summary]:
            heads = next(summary for *_, summary in summaries if summary)
            yield folded(f"Every run by itself ({len(recorded)})", table(("run", "folder", *heads), recorded))
        absent = [folder for _, folder, summary in summaries if not summary and not (folder / RESULTS).is_file()]
        yield items(absent, "Nothing is recorded of:")


def predictions(runs: Runs, pictures: Pictures) -> Blocks:
    """Yield what the networks of the runs predict of some images."""
    for name, run in runs.items():
        if (file := run.folder / PREDICTIONS).is_file():
            yield pictures.copy(f"{name}: some test images", file)


def training(run: RunFolderSummary, name: str, pictures: Pictures) -> Blocks:
    """Yield the score by epoch; the loss and the learning rate by step."""
    if run.scores:
        title = run.columns[0].title
        yield pictures.draw(f"{title} by epoch", plots.plot_scores, {label(name): [run.scores]}, measure=title)
    steps = {record["step"]: record["train"] for record in steps_of(run.folder)}
    curves = {
        title: {"": thinned({step: number(config.lookup(record, key)) for step, record in steps.items()})}
        for title, key in (("training loss", "loss"), ("learning rate", "learning_rate"))
    }
    if steps:
        yield pictures.draw("Training loss and learning rate by step", plots.plot_lines, curves, x="step")


def thinned(curve: Mapping[int, float | None]) -> dict[int, float | None]:
    """Return at most MAX_POINTS of a curve, each the mean of its neighbours."""
    steps, width = [*curve], -(-len(curve) // MAX_POINTS)
    points = {}
    for start in range(0, len(steps), width or 1):
        near = steps[start : start + width]
        values = [value for step in near if (value := curve[step]) is not None]
        points[near[-1]] = statistics.fmean(values) if values else None
    return points


def searched_scales(runs: Runs, pictures: Pictures) -> Blocks:
    """Yield what every search among the runs found, by depth and by epoch."""
    for name, run in runs.items():
        file = run.folder / "scales.pth"
        if file.is_file() and run.arch:
            caption = f"{name}: searched scales by depth, mean and standard deviation over the channels"
            try:
                scales, model = of_backbone(repopt.load_scales(file)), search_model(parse_arch(run.arch).model)
                yield pictures.draw(caption, plots.plot_scales, model, scales)
            except UserError as error:
                yield f"Not shown: {text(error)}"
        curves: dict[str, dict[str, dict[int, float]]] = {}  # the recorded mean scales by branch, block and epoch
        for record in run.epochs:
            for key, value in record.get("scales", {}).items():
                if (mean := number(value)) is not None:
                    block, _, branch = label(key).removesuffix(".weight").rpartition(".")
                    curves.setdefault(branch, {}).setdefault(block, {})[record["epoch"]] = mean
        searches = {record["epoch"]: record["search"] for record in run.epochs if "search" in record}
        if searches:
            titles = {"moved from the start": "way", f"change in the epoch (settled: {SETTLED})": "change"}
            panels = {title: {"": {e: number(s.get(k)) for e, s in searches.items()}} for title, k in titles.items()}
            caption = "all scales together: how far they moved, as a part of their size, and of that in each epoch"
            yield pictures.draw(f"{name}: {caption}", plots.plot_lines, panels, x="epoch")
        if curves:
            caption = "how far the mean scale of every block moved since the first epoch (the deeper, the stronger)"
            yield pictures.draw(f"{name}: {caption}", plots.plot_scales_by_epoch, curves)


def kernels(runs: Runs, pictures: Pictures) -> Blocks:
    """Yield weights of the layer that the paper shows, of the plain networks and baselines that have checkpoints."""
    layers: dict[str, dict[str, Mapping[str, Tensor]]] = {}
    for name, run in runs.items():
        try:
            if found := kernels_of(run.folder / "latest.pth"):
                layers.setdefault(found[0], {})[name] = found[1]
        except UserError as error:
            yield f"Not shown: {text(error)}"
    for layer, networks in layers.items():
        caption = f"Weights of {layer} of {', '.join(networks)}; a panel is as wide as the range of INT8"
        parts, rows = {}, []
        for name, forms in networks.items():
            split = {form: analyse_kernels.split(kernel) for form, kernel in forms.items()}
            parts[textwrap.fill(label(name), 32)] = split
            for form, kernel in forms.items():
                numbers = {"network": name, "form": form, **analyse_kernels.statistics(kernel)}
                rows.append(analyse_kernels.written(numbers))
        yield pictures.draw(caption, plots.plot_weights, parts)
        yield table(rows[0], [row.values() for row in rows])


def kernels_of(file: Path) -> tuple[str, Mapping[str, Tensor]] | None:
    """Return the layer that the paper shows and its forms; None of a checkpoint that is not there or has none of them.

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


def quantization(runs: Runs, pictures: Pictures) -> Blocks:
    """Yield what INT8 costs: the accuracy of the networks, the noise in every layer, the sizes of the files."""
    tables: dict[tuple[Column, ...], list[Sequence[str]]] = {}
    sizes: list[Sequence[str]] = []
    noise: dict[tuple[str, ...], dict[str, list[float | None]]] = {}
    for name, run in runs.items():
        if not (run.folder / RESULTS).is_file():
            continue
        columns = (*run.columns, IMAGES)
        for network, row in read_json(run.folder / RESULTS).items():
            cells = (figure(row.get(column.name), column.decimals) for column in columns)
            tables.setdefault(columns, []).append((name, network, *cells))
        for path in sorted((run.folder / RESULTS).parent.iterdir()):
            sizes.append((name, path.name, f"{path.stat().st_size / 1e6:.2f}"))
        if (run.folder / SIGNAL_TO_NOISE).is_file():
            ratios = read_json(run.folder / SIGNAL_TO_NOISE)
            noise.setdefault(tuple(ratios), {})[name] = [*map(number, ratios.values())]
    for columns, rows in tables.items():
        yield table(("trained as", "network", *(column.head for column in columns)), rows)
    yield table(("trained as", "file", "MB"), sizes)
    for layers, networks in noise.items():
        worst = []
        for name, values in networks.items():
            known = [(value, layer) for value, layer in zip(values, layers, strict=True) if value is not None]
            worst += [f"{name}: {layer} ({value:.1f} dB)" for value, layer in sorted(known)[:1]]
        caption = f"Signal to noise by layer, in INT8; the most noise: {'; '.join(worst)}"
        ratios = {label(name): {"INT8": values} for name, values in networks.items()}
        layer_names = [*map(label, layers)]
        yield pictures.draw(caption, plots.plot_by_depth, {"signal to noise (dB)": ratios}, layer_names)


# --- pieces of Markdown


def table(heads: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """Return a table of cells, which are numbers or text; nothing where it has no columns or no rows."""
    heads, rows = [*heads], [*rows]
    if not heads or not rows:
        return ""
    lines = ["| " + " | ".join(text(NONE if cell is None else cell) for cell in row) + " |" for row in (heads, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(heads), *lines[1:]])


def items(lines: Iterable[object], title: str = "") -> str:
    """Return a list of sentences or names below a title; nothing where it is empty."""
    listed = "\n".join(f"- {text(line)}" for line in lines)
    return f"{title}\n\n{listed}" if title and listed else listed


def code(lines: Iterable[object]) -> str:
    """Return lines that are typed."""
    return "\n".join(f"    {printable(line)}" for line in lines)


def folded(title: str, content: str) -> str:
    """Return content that a reader opens by its title."""
    return f'<details markdown="1">\n<summary>{title}</summary>\n\n{content}\n\n</details>'


def text(value: object) -> str:
    """Return what a file says as one line, in which nothing is taken for Markdown or HTML."""
    return re.sub(r"([\\`*\[\]|])", r"\\\1", html.escape(printable(value), quote=False))


def label(name: str) -> str:
    """Return a name as matplotlib takes it, which reads what stands between dollars as a formula."""
    return printable(name).replace("$", r"\$")


def printable(value: object) -> str:
    """Return text as one line, without what no page and no picture can hold."""
    return "".join(char if char.isprintable() else " " for char in str(value))


def figure(value: object, decimals: int, sign: str = "") -> str:
    """Return a number with so many decimals, and with two digits in any case; text as it is."""
    if isinstance(value, str):
        return value
    if (found := number(value)) is None:
        return NONE
    digits = ".2g" if 0 < abs(found) < 10 ** (1 - decimals) else f".{decimals}f"
    return f"{found:{sign if found > 0 else ''}{digits}}".replace("-", "−")


if __name__ == "__main__":
    sys.exit(main())
