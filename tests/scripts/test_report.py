"""What report.py makes of runs and tables: a page with its pictures, and one line about what it cannot read."""

import base64
import json
import re

import pytest
import report
import torch
from PIL import Image
from runs import epochs_of, steps_of

import repopt
from repopt import checkpoint
from train import config
from train.keys import KEYS

NANO = "RepOpt-VGG-nano"
SCRIPT = "<script>alert('$x$')</script>"


class Page:
    """A Markdown page: its text, tables as lists of cells, and pictures by caption."""

    def __init__(self, path):
        self.path, self.text = path, path.read_text()
        self.lines = self.text.splitlines()
        self.pictures = dict(re.findall(r"^!\[(.*)\]\((.*)\)$", self.text, re.MULTILINE))

    def rows(self, *names):
        """The rest of every row of a table that begins with these cells."""
        rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in self.lines if line[:1] == "|"]
        return [row[len(names) :] for row in rows if row[: len(names)] == list(names)]

    def row(self, *names):
        (row,) = self.rows(*names)
        return row


# --- what the page is made of


def metrics(accuracies, **extra):
    """Lines of metrics.jsonl: two steps per epoch, and an evaluation after every one."""
    for epoch, top1 in enumerate(accuracies, start=1):
        for step in (2 * epoch - 1, 2 * epoch):
            yield {"step": step, "train": {"loss": 2 / step, "learning_rate": 0.1, "images_per_second": 1e3}}
        yield {"step": 2 * epoch, "epoch": epoch, "train_seconds": 40.0, "val": {"top1": top1, "top5": 99.0}, **extra}


def starts_of(arch, torch_version="9.8.7"):
    versions = {"repopt": "0.2.0", "torch": torch_version, "python": "3.11.1", "processes": 1, "device": "cpu"}
    return {"command": f"main_repopt.py --arch {arch} --opts SEED 0", "time": "2026-01-02T03:04:05", **versions}


def make_run(folder, arch, records, settings=(), starts=1):
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    cfg = config.as_dict(config.build({"MODEL.ARCH": arch, "TRAIN.EPOCHS": 3, **dict(settings)}).cfg)
    (folder / "config.json").write_text(json.dumps(cfg))
    run = {"starts": [starts_of(arch)] * starts, "parameters": 878_910, "training_images": 300, "test_images": 1497}
    (folder / "run.json").write_text(json.dumps(run))
    return folder


def save(folder, mode):
    network = repopt.create_model(NANO, mode=mode, num_classes=10)
    content = {"model": network.state_dict(), "config": {"MODEL": {"ARCH": f"{NANO}-{mode}"}}}
    checkpoint.write(content, folder / "latest.pth")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders by name: a search, two seeds of a plain network, a baseline, and a quantization."""
    root = tmp_path_factory.mktemp("runs")
    model = repopt.create_model(NANO, mode="hs", num_classes=10)
    scales = repopt.extract_scales(model)
    means = {name: float(values.mean()) for name, values in scales.items()}
    search = make_run(root / f"{NANO}-hs" / "seed0", f"{NANO}-hs", metrics([20.0, 60.0, 70.0], scales=means))
    repopt.save_scales(scales, search / "scales.pth")
    target, second, baseline = (
        make_run(root / f"{NANO}-{mode}" / seed, f"{NANO}-{mode}", metrics(accuracies), {"SEED": int(seed[-1])})
        for mode, seed, accuracies in [
            ("target", "seed0", [31.0, 92.5, 91.25]),
            ("target", "seed1", [30.0, 80.0, 90.0]),
            ("repvgg", "seed0", [40.0, 50.0, 60.0]),
        ]
    )
    save(target, "target")
    save(baseline, "repvgg")
    quantized = root / "int8" / f"{NANO}-target" / "ptq"
    (quantized / "artifacts").mkdir(parents=True)
    rows = {
        name: {"top1": top1, "top5": 99.5, "loss": 0.25, "images": 1497}
        for name, top1 in (("fp32", 95.5), ("INT8", 94))
    }
    (quantized / "artifacts" / "results.json").write_text(json.dumps(rows))
    (quantized / "artifacts" / "signal_to_noise.json").write_text(
        json.dumps({"stage0.conv": 41.5, "stage1.0.conv": None, "linear": 12.25})
    )
    return {"search": search, "target": target, "second": second, "baseline": baseline, "quantized": quantized}


def cell(quantity, paper, mean, std, values, difference, decimals=2):
    numbers = {"mean": mean, "std": std, "values": values, "difference": difference, "decimals": decimals}
    return {"quantity": quantity, "paper": paper, **numbers}


def table_of(runs, /, **changes):
    """The JSON of a table."""
    return {
        "name": "table 4",
        "title": "Ablation",
        "scale": "demo",
        "notes": ["Three seeds share one search."],
        "labels": ["optimizer", "constants"],
        "rows": [
            {
                "labels": ["RepOptimizer", "Hyper-Search"],
                "cells": [
                    cell("top1", "78.47±0.03", 95.204, 0.1049, [95.1, 95.2, 95.312], 16.734),
                    cell("std", "0.0089", 0.0123, None, [0.0123], 0.0034, 4),
                ],
            },
            {
                "labels": ["SGD", None],
                "cells": [cell("top1", None, 51.95, 13, [], None), cell("std", "0.01", None, None, [], None, 4)],
            },
            {
                "labels": ["Adam", "none"],
                "cells": [
                    cell("top1", "96", 51.951, None, [52, 51.9], -44.049),
                    cell("std", 1, "yes", None, ["yes"], 0, 4),
                ],
            },
        ],
        "orderings": ["top1: 40 of 55 pairs are ordered as in the paper"],
        "pictures": [],
        "runs": {
            "search": [str(runs["search"])],
            "plain": [str(runs["target"]), str(runs["second"])],
            "RepVGG": [str(runs["baseline"])],
            "gone": ["not/there"],
        },
        "commands": ["python main_repopt.py --cfg a.yaml", "python main_repopt.py --cfg b.yaml"],
        "environment": {"machine": "a computer", "torch": "9.8.7"},
        **changes,
    }


def page_of(folder, *sources):
    out = folder / "page.md"
    assert report.main([*map(str, sources), "--out", str(out)]) == 0
    return Page(out)


def write(file, content):
    file.write_text(json.dumps(content))
    return file


@pytest.fixture(scope="module")
def sources(runs, tmp_path_factory):
    """A table, and every kind of run."""
    folder = tmp_path_factory.mktemp("sources")
    Image.new("RGB", (30, 20), "red").save(folder / "figure.png")
    table = table_of(runs, pictures=[{"title": "Figure 1", "file": "figure.png"}])
    return [write(folder / "table4.json", table), *(runs[name] for name in ("search", "target", "quantized"))]


@pytest.fixture(scope="module")
def page(sources, tmp_path_factory):
    return page_of(tmp_path_factory.mktemp("page"), *sources)


# --- the page


def test_the_table_beside_the_paper(page):
    heads = page.row("optimizer", "constants")
    assert heads == ["top1: paper", "this run", "difference", "std: paper", "this run", "difference"]
    assert page.row("RepOptimizer", "Hyper-Search") == [
        *("78.47±0.03", "95.20 ± 0.10 (95.10 · 95.20 · 95.31)", "+16.73"),
        *("0.0089", "0.0123", "+0.0034"),
    ]
    assert page.row("SGD", "–") == ["–", "51.95 ± 13.00", "–", "0.01", "–", "–"]
    assert page.row("Adam", "none") == ["96", "51.95 (52.00 · 51.90)", "−44.05", "1", "yes", "0.0000"]


def test_all_else_that_a_table_says(page):
    assert "## table 4: Ablation (demo)" in page.lines
    for text in ("Three seeds share one search.", "top1: 40 of 55 pairs are ordered as in the paper", "not/there"):
        assert f"- {text}" in page.lines
    assert "    python main_repopt.py --cfg a.yaml\n    python main_repopt.py --cfg b.yaml\n" in page.text
    assert page.row("machine") == ["a computer"]


def test_the_runs_in_numbers(page, runs):
    assert page.row("plain", str(runs["target"])) == ["91.25 %", "92.50 % (epoch 2)", "3 of 3", "0:02:00"]
    facts = ("final top-1", "best top-1", "epochs", "training time", "parameters", "training images", "test images")
    assert page.rows(*facts) == [[], []]  # of the search and the target
    assert page.row("91.25 %") == ["92.50 % (epoch 2)", "3 of 3", "0:02:00", "0.88 M", "300", "1497"]
    assert page.rows("0.2.0") == [["9.8.7", "3.11.1", "1", "cpu"]] * 2
    assert page.lines.count(f"    main_repopt.py --arch {NANO}-hs --opts SEED 0") == 1


def test_pictures(page):
    captions = [
        "Figure 1",
        "top-1 by epoch: the mean over the seeds, and the band between the worst and the best",
        "top-1 by epoch",
        "Training loss and learning rate by step",
        *(
            f"{name}: {what}"
            for name in ("search", f"{NANO}-hs")
            for what in (
                "searched scales by depth, mean and standard deviation over the channels",
                "how far the mean scale of every block moved since the first epoch (the deeper, the stronger)",
            )
        ),
        "Weights of stage3.7 of plain, RepVGG; a panel is as wide as the range of INT8",
        f"Signal to noise by layer, in INT8; the most noise: {NANO}-target: linear (12.2 dB)",
    ]
    assert set(captions) <= page.pictures.keys()
    files = [page.path.parent / file for file in page.pictures.values()]
    for file in files:
        with Image.open(file) as image:
            assert image.format == "PNG"
            assert len(set(image.convert("L").resize((99, 99)).tobytes())) > 1 or image.size == (30, 20)  # not blank
    (beside := page.path.parent / "folder").mkdir()
    assert files[0].parent.stat().st_mode == beside.stat().st_mode  # others may read it too
    for caption in captions:
        assert f"{caption}\n\n![{caption}](page_pictures/" in page.text


def test_kernels_in_numbers(page, runs):
    weights = checkpoint.read(runs["target"] / "latest.pth")["model"]["stage3.7.conv.weight"].double()
    row = page.row("plain", "raw")
    assert float(row[0]) == pytest.approx(float(weights.std(correction=0)), rel=5e-3)
    assert [row[0] for row in page.rows("RepVGG")][-3:] == [
        "before BN fusion",
        "after BN fusion",
        "after branch addition",
    ]


def test_quantization(page):
    assert page.row(f"{NANO}-target", "fp32") == ["95.50", "99.50", "0.2500", "1497"]
    assert page.row(f"{NANO}-target", "INT8") == ["94.00", "99.50", "0.2500", "1497"]
    assert page.row(f"{NANO}-target", "results.json") == ["0.00"]


def test_what_is_configured_differently_comes_first(page):
    assert page.rows("MODEL.ARCH")[0][1:4] == [f"{NANO}-hs", f"{NANO}-target", f"{NANO}-repvgg"]
    assert page.rows("TRAIN.EPOCHS")[0] == ["300", "3", "3", "3", KEYS["TRAIN.EPOCHS"].help]
    assert page.rows("TRAIN.BASE_LR") == [["0.0005", KEYS["TRAIN.BASE_LR"].help]] * 3
    assert len(re.findall(r"<summary>\d+ keys that have their defaults</summary>", page.text)) == 3


def test_one_html_file_has_everything_in_it(sources, tmp_path):
    out = tmp_path / "page.html"
    assert report.main([*map(str, sources), "--out", str(out)]) == 0
    html = out.read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
    pictures = re.findall('src="([^"]*)"', html)
    assert len(pictures) > 8
    for picture in pictures:
        kind, data = picture.split(",")
        assert kind == "data:image/png;base64"
        assert base64.b64decode(data).startswith(b"\x89PNG")
    assert "<h3" in html
    assert "<td>95.20 ± 0.10 (95.10 · 95.20 · 95.31)</td>" in html
    assert re.search(r"<summary>\d+ keys that have their defaults</summary>\s*<table>", html)
    assert re.findall('href="(?!#)', html) == []


@pytest.mark.parametrize("suffix", ["md", "html"])
def test_what_is_hostile_is_text(runs, tmp_path, suffix):
    bad = f"{SCRIPT}\x00\ud800\"'&|\n# [a](javascript:b) ![c](d)"
    folder = make_run(tmp_path / "a", SCRIPT, metrics([50.0], scales={f"{SCRIPT}.{SCRIPT}.weight": 1.0}))
    (folder / "run.json").write_text(json.dumps({"starts": [{"command": f"{bad}\n\n{bad}", "torch": bad}]}))
    content = table_of(
        runs,
        **dict.fromkeys(("name", "title", "scale"), bad),
        **{key: [bad] for key in ("notes", "orderings", "commands")},
        labels=[bad],
        rows=[{"labels": [bad], "cells": [cell(bad, bad, bad, None, [bad, bad], None)]}],
        runs={bad: [str(folder), bad]},
        environment={bad: bad},
    )
    out = tmp_path / f"page.{suffix}"
    assert report.main([str(write(tmp_path / "table.json", content)), str(folder), "--out", str(out)]) == 0
    page = out.read_text()
    assert page.count("&lt;script&gt;") > 15
    if suffix == "md":
        assert all(line.startswith("    ") for line in page.splitlines() if "<script" in line)  # code
        assert not re.search(r"(?<!\\)\]\(javascript", "\n".join(x for x in page.splitlines() if x[:4] != "    "))
    if suffix == "html":
        assert "<script" not in page
        assert not re.findall(r'(?:href|src)="(?!#|data:image/png)', page)
        assert page.count("<h2") == 2


def test_a_table_of_nothing(tmp_path):
    empty = {key: [] for key in ("notes", "labels", "rows", "orderings", "pictures", "commands")}
    content = {"name": "figure 6", "title": "Scales", "scale": "full", **empty, "runs": {}, "environment": {}}
    page = page_of(tmp_path, write(tmp_path / "table.json", content))
    assert [line for line in page.lines if line[:1] == "#"] == ["# RepOpt: results", "## figure 6: Scales (full)"]
    assert not page.pictures


def test_what_cannot_be_shown_is_said(tmp_path):
    folder = make_run(tmp_path / "run", f"{NANO}-hs", metrics([10.0]))
    for name in ("latest.pth", "scales.pth"):
        (folder / name).write_bytes(b"no checkpoint")
    page = page_of(tmp_path, folder)
    for name in ("latest.pth", "scales.pth"):
        assert sum(line.startswith("Not shown: ") and str(folder / name) in line for line in page.lines) == 1
    assert page.pictures  # the rest


def test_a_run_that_has_just_begun(tmp_path):
    folder = make_run(tmp_path / "run", f"{NANO}-target", [{"step": 1, "train": {"loss": None, "learning_rate": 0.5}}])
    assert [*page_of(tmp_path, folder).pictures] == ["Training loss and learning rate by step"]


def test_a_run_of_before_has_no_run_json(tmp_path):
    folder = make_run(tmp_path / "run", f"{NANO}-target", metrics([10.0]))
    (folder / "run.json").unlink()
    (folder / "log_rank0.txt").write_text("2026-01-02 03:04:05 main_repopt.py --eval\n")  # nothing is read from logs
    page = page_of(tmp_path, folder)
    assert page.row("10.00 %") == ["10.00 % (epoch 1)", "1 of 3", "0:00:40", "–", "–", "–"]
    assert "Command lines" not in page.text


def test_every_command_is_shown_once(tmp_path):
    folder = make_run(tmp_path / "run", f"{NANO}-target", metrics([10.0]), starts=3)
    content = json.loads((folder / "run.json").read_text())
    content["starts"].append(starts_of(f"{NANO}-target", "10.0"))
    write(folder / "run.json", content)
    page = page_of(tmp_path, folder)
    assert page.text.count("    main_repopt.py") == 1
    assert page.row("repopt") == ["torch", "python", "processes", "device"]
    assert page.rows("0.2.0") == [["9.8.7", "3.11.1", "1", "cpu"], ["10.0", "3.11.1", "1", "cpu"]]


# --- records of a run


def test_records_of_a_run(tmp_path):
    records = [*metrics([10.0, 20.0]), *[*metrics([11.0, 21.0, 30.0])][3:]]  # the second epoch twice
    records[0]["epoch"] = 1  # within the epoch
    folder = make_run(tmp_path / "run", NANO, records)
    assert epochs_of(tmp_path) == steps_of(tmp_path) == []
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "epoch": 4, "val": {"to')
    assert [(record["epoch"], record["val"]["top1"]) for record in epochs_of(folder)] == [
        (1, 10.0),
        (2, 21.0),
        (3, 30.0),
    ]
    assert [record["step"] for record in steps_of(folder)] == [1, 2, 3, 4, 5, 6]


def test_long_curves_are_thinned():
    curve = {step: None if step == 3 else float(step) for step in range(1, 1201)}
    points = report.thinned(curve)
    assert len(points) == 400
    assert (points[3], points[6], points[1200]) == (1.5, 5.0, 1199.0)
    assert report.thinned({1: None, 2: 3.0}) == {1: None, 2: 3.0}
    assert report.thinned({}) == {}


# --- mistakes


def edited(**changes):
    return lambda runs: table_of(runs, **changes)


DAMAGED = "' is damaged: "
MISTAKES = {
    "nothing": ("none", None, r"there is no file or folder '{out}none'"),
    "no run": (".", None, "is no folder of a run: it has neither metrics.jsonl nor config.json nor"),
    "no JSON": ("a.json", '{"name": ', "a.json' is no JSON: Expecting value"),
    "no text": ("a.json", b"\xff\xfe\x00", "a.json' is no JSON: 'utf-8' codec"),
    "a list": ("a.json", "[]", r"a.json' holds list, not values by name"),
    "too deep": ("a.json", "[" * 100_000, "a.json' is no JSON"),
    "another JSON": ("a.json", "{}", f"a.json{DAMAGED}KeyError: 'runs'"),
    "a number for rows": ("a.json", edited(rows=3), f"a.json{DAMAGED}TypeError: 'int' object"),
    "a number for a cell": ("a.json", edited(rows=[{"labels": ["a", "b"], "cells": [3]}]), f"a.json{DAMAGED}TypeError"),
    "another row": (
        "a.json",
        lambda runs: table_of(runs, rows=[*table_of(runs)["rows"], {"labels": ["a"], "cells": []}]),
        "a row of the table has other labels or quantities than the first",
    ),
    "no picture": (
        "a.json",
        edited(pictures=[{"title": "x", "file": "none.png"}]),
        "there is no picture '.*none.png'",
    ),
    "a picture of another kind": (
        "a.json",
        edited(pictures=[{"title": "x", "file": "a.json"}]),
        "a.json' is no picture: it is not a PNG",
    ),
    "broken records": ("run/metrics.jsonl", '{"step": 1}\n{"step": \n', "line 2 of '.*metrics.jsonl' is no record"),
    "records of another kind": ("run/metrics.jsonl", "[1]\n", "line 1 of '.*metrics.jsonl' is no record"),
    "endless seconds": (
        "run/metrics.jsonl",
        '{"step": 1, "epoch": 1, "train_seconds": 1e99}\n',
        f"run{DAMAGED}OverflowError",
    ),
    "broken configuration": ("run/config.json", "[]", "config.json' holds list, not values by name"),
    "broken results": ("run/artifacts/results.json", '{"fp32": 3}', f"run{DAMAGED}AttributeError"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_line_and_exit_code_2(name, runs, tmp_path, in_one_line):
    file, content, message = MISTAKES[name]
    path = tmp_path / file
    if content is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        content = json.dumps(content(runs)) if callable(content) else content
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    if file.startswith("run/"):
        path = tmp_path / "run"
    out = tmp_path / "page.md"
    assert report.main([str(path), "--out", str(out)]) == 2
    in_one_line("report.py", message, {"out": f"{tmp_path}/"})
    assert not out.exists()


def test_a_folder_is_no_page(runs, tmp_path, in_one_line):
    assert report.main([str(runs["quantized"]), "--out", str(tmp_path)]) == 2
    in_one_line("report.py", "Is a directory", {})


def test_what_is_printed(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert report.main([str(runs["second"])]) == 0
    assert capsys.readouterr().out == "output/report.md\n"
    page = Page(tmp_path / "output" / "report.md")
    assert page.pictures
    assert all((page.path.parent / file).is_file() for file in page.pictures.values())


def test_no_checkpoint_is_unpickled(tmp_path):
    """A file that would run code when it is unpickled is refused."""
    folder = make_run(tmp_path / "run", f"{NANO}-target", metrics([10.0]))
    ran = tmp_path / "ran"
    torch.save({"model": _Runs(ran)}, folder / "latest.pth")
    assert "Not shown" in page_of(tmp_path, folder).text
    assert not ran.exists()


class _Runs:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return self.path.touch, ()
